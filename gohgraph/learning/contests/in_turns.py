"""The runs of a contest in turns: all models of a seed side by side in one process, each in its run folder."""

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from operator import attrgetter
from typing import Any

from gohgraph.learning.contests.runs import Run
from gohgraph.learning.loop import Training, train_together
from gohgraph.parallel.ranks import on_first_rank

VALIDATION_LOSS = "validation_loss"


class InTurns:
    """Trains the models of a seed by `train_together`; what an interrupted run goes on from is its run folder.

    Args:
        start: makes the training of a run, or resumes it.
        finish: `(training, run)` to its result, called in the main process.
        chosen_by: column of the log to choose rates by, lower is better.
    """

    def __init__(
        self, start: Callable[[Run], Training], finish: Callable[[Training, Run], Any], chosen_by: str = VALIDATION_LOSS
    ) -> None:
        self._start, self._finish, self._chosen_by = start, finish, chosen_by
        self._tried: dict[Run, Training] = {}

    def try_rates(self, runs: Sequence[Run]) -> dict[Run, float]:
        """Trains runs of the first seed; returns the last loss of each, infinite where it has run away."""
        trainings = {run: self._start(run) for run in runs}
        train_together(list(trainings.values()), may_diverge=True)
        self._tried |= trainings
        # The log is the first rank's.
        return on_first_rank(lambda: {run: self._loss(training) for run, training in trainings.items()})

    def train(self, runs: Sequence[Run]) -> dict[Run, Any]:
        """Trains the runs that have not been tried, one seed after the other; returns the results of all."""
        results = {}
        for _, runs_of_seed in groupby(runs, key=attrgetter("seed")):
            trainings = {run: self._tried.get(run) or self._start(run) for run in runs_of_seed}
            train_together([training for run, training in trainings.items() if run not in self._tried])
            for run, training in trainings.items():
                if training.accelerator.is_main_process:
                    results[run] = self._finish(training, run)
            # What was not chosen is not needed any more, and may be large.
            self._tried = {}
        return results

    def _loss(self, training: Training) -> float:
        if training.has_diverged:
            return math.inf
        losses = [row[self._chosen_by] for row in training.folder.rows if row.get(self._chosen_by) is not None]
        if not losses:
            raise ValueError(
                f"Expected {self._chosen_by} in the log of {training.folder.path} to choose its learning rate by "
                f"(got {training.folder.columns}). Do return one from evaluate, or pass one rate."
            )
        return losses[-1]
