"""A training script that holds a contest: models at the best rates of one grid, over several seeds."""

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from gohgraph.common.command_line import ArgumentParser
from gohgraph.drawing import draw_curves
from gohgraph.learning.cli.flags import add_rate_flags
from gohgraph.learning.cli.script import Script
from gohgraph.learning.contests.contest import Contest, Result
from gohgraph.learning.contests.grid import Grid
from gohgraph.learning.loop import Training
from gohgraph.learning.run_folder import write_text


class ContestScript(Script, ABC):
    """A `Script` with the flag `--learning-rates`; a subclass fills the slots `models`, `start`, `finish`, `report`.

    Attributes:
        learning_rate: where `--learning-rates` does not say otherwise.
        result: the file with what `finish` returns, in the folder of every run.
    """

    learning_rate: ClassVar[float]
    result: ClassVar[str] = "result.json"

    @classmethod
    def parser(cls) -> ArgumentParser:
        """Returns the parser of all flags."""
        parser = super().parser()
        add_rate_flags(parser, learning_rate=cls.learning_rate)
        return parser

    def check(self) -> None:
        """Raises `ValueError` for flags of training that do not fit; a subclass calls it from its own."""
        for rate in self.flags.learning_rates:
            self.config(self.flags.seeds[0], rate)

    @abstractmethod
    def models(self) -> dict[str, Any]:
        """Reads the data and returns what to train by name, usually configurations."""

    @abstractmethod
    def start(self, model: Any, seed: int, rate: float, leaf: Path) -> Training:
        """Returns the `Training` of one of them in a folder, torch having been seeded."""

    @abstractmethod
    def finish(self, training: Training, leaf: Path) -> Result:
        """Returns the measures of a trained model: JSON values, and tensors for the report alone."""

    @abstractmethod
    def report(self, results: dict[tuple[int, str], Result]) -> None:
        """Prints what came out, by seed and name: what `finish` has returned, with the `learning_rate`, the `leaf` of
        the folder, and the `log`.
        """

    def train(self) -> None:
        """Trains all models, draws their curves in one figure and reports; ranks but the first only train."""
        contest = Contest(self.models(), self.flags.seeds, Grid.of_rates(self.flags.learning_rates), self.folder)
        results = contest.run(self._start, self._finish, resume=self.flags.resume)
        if len(results) > 1:
            draw_curves({result["leaf"]: result["log"] for result in results.values()}, self.folder / "curves.png")
        if results:
            self.report(results)

    def _start(self, model: Any, seed: int, rate: float, leaf: Path) -> Training:
        torch.manual_seed(seed)
        return self.start(model, seed, rate, leaf)

    def _finish(self, training: Training, leaf: Path) -> Result:
        result = self.finish(training, leaf)
        values = {name: value for name, value in result.items() if not isinstance(value, Tensor)}
        write_text(leaf / self.result, json.dumps(values, indent=2))
        return {**result, "log": training.folder.rows}
