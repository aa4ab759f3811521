"""The runs of a contest in processes: each independent of the others, its result in a file."""

import math
from collections.abc import Callable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from gohgraph.learning.contests.runs import Run
from gohgraph.learning.contests.sweep import sweep


class InProcesses:
    """Calls a function for every run, by a `sweep`: what is finished is read from its file.

    Args:
        function, folder, jobs, upgrade, on_result: as in `sweep`.
        arguments: of a run, the keyword arguments of its call.
        loss: of a result, what rates are chosen by, perhaps on other data than what is reported of it.
        file_name: of a run.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: Callable[[Run], dict[str, Any]],
        folder: str | Path,
        *,
        loss: Callable[[Any], float],
        jobs: int = 1,
        file_name: Callable[[Run], str] = attrgetter("file_name"),
        upgrade: Callable[[dict[str, Any]], dict[str, Any]] = dict,
        on_result: Callable[[str, Any], None] | None = None,
    ) -> None:
        self._function, self._arguments, self._folder = function, arguments, folder
        self._loss, self._file_name = loss, file_name
        self._jobs, self._upgrade, self._on_result = jobs, upgrade, on_result

    def try_rates(self, runs: Sequence[Run]) -> dict[Run, float]:
        """Calls what is missing; returns the loss of each run, infinite where it has run away."""
        results = self._sweep(runs, may_diverge=True)
        return {run: math.inf if result is None else self._loss(result) for run, result in results.items()}

    def train(self, runs: Sequence[Run]) -> dict[Run, Any]:
        """Calls what is missing and returns all results."""
        results = self._sweep(runs, may_diverge=False)
        # Another grid or first seed may have left such a run behind.
        if lost := [self._file_name(run) for run, result in results.items() if result is None]:
            raise FloatingPointError(
                f"Expected finite losses at the chosen learning rates (got others in {lost}). Do leave those rates out."
            )
        return results

    def _sweep(self, runs: Sequence[Run], *, may_diverge: bool) -> dict[Run, Any]:
        named = {self._file_name(run): self._arguments(run) for run in runs}
        results = sweep(
            self._function,
            named,
            self._folder,
            jobs=self._jobs,
            may_diverge=may_diverge,
            upgrade=self._upgrade,
            on_result=self._on_result,
        )
        return dict(zip(runs, results.values(), strict=True))
