"""Many independent runs: side by side in processes, each remembered on disk once it is done."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm


def sweep(
    function: Callable[..., Any],
    runs: dict[str, dict[str, Any]],
    folder: str | Path,
    *,
    jobs: int = 1,
    may_diverge: bool = False,
) -> dict[str, Any]:
    """Calls `function(**runs[name])` for every name whose result is not in `folder` yet.

    A run's result goes to `folder/name.json`, written atomically together with the arguments that gave it; calling
    again after an interruption goes on with what is missing.

    Args:
        function: of a module's top level when `jobs > 1`; returns what JSON can hold.
        runs: keyword arguments, which JSON can hold, by name.
        folder: where results are kept.
        jobs: processes side by side; with one, runs stay in this process.
        may_diverge: a run that raises `FloatingPointError`, since its loss is no longer finite, has the result `None`.

    Returns:
        The results by name, in the order of `runs`.

    Raises:
        ValueError: jobs below 1, a damaged result, or one that other arguments gave.
        OSError: the folder cannot be written.
        FloatingPointError: a loss is no longer finite, unless it may be.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sweep(pow, {"square": {"base": 3, "exp": 2}}, folder)
        {'square': 9}
    """
    if jobs < 1:
        raise ValueError(f"Expected jobs >= 1 (got {jobs}). Do pass the number of processes.")
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"Expected a run folder that can be written (got {folder}: {error.strerror}). Do choose another."
        ) from error
    results = {name: _read(folder / f"{name}.json", arguments) for name, arguments in runs.items()}
    missing = [name for name, result in results.items() if result is None]
    bar = tqdm(total=len(runs), initial=len(runs) - len(missing), unit="run", desc=folder.name)
    with bar:
        if jobs == 1:
            for name in missing:
                bar.set_postfix_str(name)
                result = _result(partial(function, **runs[name]), may_diverge)
                results[name] = _write(folder / f"{name}.json", runs[name], result)
                bar.update()
            return {name: result["result"] for name, result in results.items()}
        # Spawned, not forked: a fork of a process with running threads can hang.
        pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))
        bars = os.environ.get("TQDM_DISABLE")
        # Bars of several processes would overwrite each other; tqdm reads this when a process imports it.
        os.environ["TQDM_DISABLE"] = "1"
        try:
            futures = {pool.submit(function, **runs[name]): name for name in missing}
            for future in as_completed(futures):
                name = futures[future]
                results[name] = _write(folder / f"{name}.json", runs[name], _result(future.result, may_diverge))
                bar.set_postfix_str(name)
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)
            os.environ.pop("TQDM_DISABLE") if bars is None else os.environ.update(TQDM_DISABLE=bars)
    return {name: result["result"] for name, result in results.items()}


def _result(run: Callable[[], Any], may_diverge: bool) -> Any:
    try:
        return run()
    except FloatingPointError:
        if not may_diverge:
            raise
        return None


def _read(path: Path, arguments: dict[str, Any]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        saved = json.loads(path.read_text())
        before = saved["arguments"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"Expected a finished run in {path} (got a damaged file). Do delete it.") from None
    if before != json.loads(json.dumps(arguments)):
        changed = sorted(key for key in {*before, *arguments} if before.get(key) != arguments.get(key))
        raise ValueError(
            f"Expected {path} to come from the same arguments (got other {changed}). Do choose another run folder."
        )
    return saved


def _write(path: Path, arguments: dict[str, Any], result: Any) -> dict[str, Any]:
    saved = {"arguments": arguments, "result": result}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(saved, indent=1))
    os.replace(temporary, path)
    return saved
