"""Many independent runs: side by side in processes, each remembered on disk once it is done."""

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gohgraph.common.checks import check_int, there
from gohgraph.common.files import make_folder, read_json, write_text_whole

# Held by a process of its own while it makes a run.
_running = threading.Lock()


def sweep(
    function: Callable[..., Any],
    runs: dict[str, dict[str, Any]],
    folder: str | Path,
    *,
    jobs: int = 1,
    may_diverge: bool = False,
    upgrade: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    on_result: Callable[[str, Any], None] | None = None,
) -> dict[str, Any]:
    """Calls `function(**runs[name])` for every name whose result is not in `folder` yet.

    Returns the results by name, in the order of `runs`. A run's result goes to `folder/name.json`, written
    atomically together with the arguments that gave it; a call after an interruption goes on with what is missing. When
    this process ends, however it does, those beside it are asked to end by SIGTERM.

    Args:
        function: of a module's top level when `jobs > 1`; returns what JSON can hold.
        runs: keyword arguments, which JSON can hold, by name.
        folder: where results are kept.
        jobs: processes side by side; with one, runs stay in this process.
        may_diverge: a run that raises `FloatingPointError`, since its loss is no longer finite, has the result `None`.
        upgrade: of the arguments in a file, what they are today, such as a configuration with its later fields.
        on_result: called with the name and result of every run that has just finished, once it is on disk.

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
    check_int("jobs", jobs, low=1)
    make_folder(folder := Path(folder))
    files = {name: folder / f"{name}.json" for name in runs}
    results = {name: _finished(file, runs[name], upgrade) for name, file in files.items() if file.exists()}
    missing = {name: arguments for name, arguments in runs.items() if name not in results}
    bar = tqdm(total=len(runs), initial=len(results), unit="run", desc=folder.name)
    with bar, closing(_calls(function, missing, jobs)) as calls:
        for name, call in calls:
            bar.set_postfix_str(name)
            try:
                results[name] = call()
            except FloatingPointError:
                if not may_diverge:
                    raise
                results[name] = None
            saved = {"arguments": runs[name], "result": results[name]}
            write_text_whole(files[name], json.dumps(saved, indent=1))
            if on_result is not None:
                on_result(name, results[name])
            bar.update()
    return {name: results[name] for name in runs}


def _calls(
    function: Callable[..., Any], runs: dict[str, dict[str, Any]], jobs: int
) -> Generator[tuple[str, Callable[[], Any]], None, None]:
    """Yields each name with what returns its result: by a call in this process, or once another one has it."""
    if jobs == 1:
        yield from ((name, partial(function, **arguments)) for name, arguments in runs.items())
        return
    # Spawned, not forked: a fork of a process with running threads can hang.
    others, is_done = set(multiprocessing.active_children()), False
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_follow_parent)
    bars = os.environ.get("TQDM_DISABLE")
    # Bars of several processes would overwrite each other; tqdm reads this when a process imports it.
    os.environ["TQDM_DISABLE"] = "1"
    try:
        futures = {pool.submit(_run, function, arguments): name for name, arguments in runs.items()}
        for future in as_completed(futures):
            yield futures[future], future.result
        is_done = True
    finally:
        # Nobody waits for their results.
        for process in () if is_done else set(multiprocessing.active_children()) - others:
            process.terminate()
        pool.shutdown(cancel_futures=True)
        os.environ.pop("TQDM_DISABLE") if bars is None else os.environ.update(TQDM_DISABLE=bars)


def _run(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    with _running:
        return function(**arguments)


def _follow_parent() -> None:
    """Lets this process end when the one that started it has, which may have had no time to say so."""
    threading.Thread(target=_end_after_parent, daemon=True).start()


def _end_after_parent() -> None:
    wait([there(multiprocessing.parent_process()).sentinel])
    # A training under way writes its checkpoint first; a process that has none ends here.
    os.kill(os.getpid(), signal.SIGTERM)
    with _running:
        os._exit(1)


def _finished(
    file: Path, arguments: dict[str, Any], upgrade: Callable[[dict[str, Any]], dict[str, Any]]
) -> Any:
    """Returns the result in a file that the same arguments gave."""
    saved = read_json(file, "delete it")
    if not isinstance(saved, dict) or not isinstance(saved.get("arguments"), dict) or "result" not in saved:
        raise ValueError(f"Expected a finished run in {file} (got something else). Do delete it.")
    before, given = json.loads(json.dumps([upgrade(saved["arguments"]), arguments]))
    if before != given:
        changed = sorted(key for key in {*before, *given} if before.get(key) != given.get(key))
        raise ValueError(
            f"Expected {file} to come from the same arguments (got other {changed}). Do choose another run folder."
        )
    return saved["result"]
