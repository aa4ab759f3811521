"""The runs of a contest, and what it needs of whoever trains them."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from gohgraph.learning.contests.grid import Point


class Run(NamedTuple):
    """A model at a point of its grid, with a seed."""

    name: str
    point: Point
    seed: int

    @property
    def rate(self) -> float:
        """The learning rate."""
        return self.point["learning_rate"]

    @property
    def file_name(self) -> str:
        """The name of its folder or result, such as `plain-0.002-0`."""
        return f"{self.name}-{self.point}-{self.seed}"


class Runner(Protocol):
    """Trains the runs of a contest; raises `FloatingPointError` where a loss has to stay finite and does not."""

    def try_rates(self, runs: Sequence[Run]) -> dict[Run, float]:
        """Trains runs of the first seed; returns the loss to choose by, infinite where it has not stayed finite.

        It is called again for what those losses lead the search to.
        """

    def train(self, runs: Sequence[Run]) -> dict[Run, Any]:
        """Trains what `try_rates` has not, and returns the results, seed by seed."""
