"""Settings of a training to choose among: points of a grid, and the search for the best of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any


@dataclass(frozen=True)
class Point:
    """Settings of a training by name, such as its learning rate; hashable, and in the order of its grid.

    Example:
        >>> point = Point.of(learning_rate=0.002, matrix_learning_rate=0.02)
        >>> str(point), point["matrix_learning_rate"], point.to_dict()
        ('0.002-0.02', 0.02, {'learning_rate': 0.002, 'matrix_learning_rate': 0.02})
    """

    settings: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, **settings: float) -> Point:
        """Makes a point of its settings."""
        return cls(tuple(settings.items()))

    def __getitem__(self, name: str) -> float:
        return dict(self.settings)[name]

    def __str__(self) -> str:
        """The values alone, for names of files."""
        return "-".join(f"{value:g}" for _, value in self.settings)

    def to_dict(self) -> dict[str, float]:
        """Returns the settings by name."""
        return dict(self.settings)

    def replaced(self, name: str, value: float) -> Point:
        """Returns the point that differs in one setting."""
        return Point(tuple((setting, value if setting == name else kept) for setting, kept in self.settings))


@dataclass(frozen=True)
class Grid:
    """Values of settings, searched along one setting after the other.

    The search starts in the middle, tries all values of the first setting, goes to the best, tries all values of the
    second there, and so on; it ends when a whole round over the settings moves nothing. Of one setting that tries all
    values; of two with three values each 5 to 9 points.

    Args:
        settings: the values of each setting, of which the first is the slowest to be searched anew.

    Raises:
        ValueError: a setting has no value, a repeated one, or one not above 0.

    Example:
        >>> grid = Grid({"learning_rate": [1, 2, 4], "matrix_learning_rate": [10, 20, 40]})
        >>> losses = {}
        >>> while points := grid.next_points(losses):
        ...     losses |= {point: abs(point["learning_rate"] - 4) + point["matrix_learning_rate"] for point in points}
        >>> str(grid.best(losses)), len(losses), grid.border_of(grid.best(losses))
        ('4-10', 7, ['learning_rate', 'matrix_learning_rate'])
    """

    settings: Mapping[str, Sequence[float]]

    def __post_init__(self) -> None:
        for name, values in self.settings.items():
            # Two values that read alike would share the name of a run.
            read = {f"{value:g}" for value in values}
            if not values or len(read) < len(values) or not all(0 < value < math.inf for value in values):
                flag = f"--{name.replace('_', '-')}s"
                raise ValueError(f"Expected different {flag} above 0 (got {list(values)}). Do change them.")

    @classmethod
    def of_rates(cls, rates: Sequence[float]) -> Grid:
        """Returns the grid of learning rates alone."""
        return cls({"learning_rate": tuple(rates)})

    @property
    def points(self) -> list[Point]:
        """All points."""
        return [Point(tuple(zip(self.settings, values, strict=True))) for values in product(*self.settings.values())]

    @property
    def centre(self) -> Point:
        """Where the search starts: the middle value of every setting, the lower one of two."""
        middle = {name: sorted(values)[(len(values) - 1) // 2] for name, values in self.settings.items()}
        return Point.of(**middle)

    def next_points(self, losses: Mapping[Point, float]) -> list[Point]:
        """Returns which points to try next, none when the search is over or there is nothing to choose.

        Args:
            losses: of all points tried so far; one that is not finite is the worst.
        """
        best, before = self.centre, None
        while best != before:
            before = best
            for name, values in self.settings.items():
                line = [best.replaced(name, value) for value in values]
                if len(line) > 1 and (missing := [point for point in line if point not in losses]):
                    return missing
                best = min(line, key=lambda point: _finite(losses.get(point, math.inf))) if len(line) > 1 else best
        return []

    def best(self, losses: Mapping[Point, float]) -> Point:
        """Returns the point of the lowest loss, the only one where there is nothing to choose.

        Raises:
            ValueError: no loss is finite.
        """
        if len(self.points) == 1:
            return self.centre
        point = min(losses, key=lambda point: _finite(losses[point]), default=None)
        if point is None or not math.isfinite(losses[point]):
            tried = sorted(map(str, losses))
            raise ValueError(f"Expected a finite loss at one of {tried} (got none). Do add lower learning rates.")
        return point

    def border_of(self, point: Point) -> list[str]:
        """Returns the settings that have their lowest or highest value there: beyond it might be a better one."""
        return [
            name
            for name, values in self.settings.items()
            if len(values) > 1 and point[name] in (min(values), max(values))
        ]


def best_points(grids: Mapping[str, Grid], losses: Mapping[tuple[str, Point], float]) -> dict[str, Point]:
    """Returns the best point of every model.

    Args:
        grids: by the model's name.
        losses: by name and point.

    Raises:
        ValueError: a model has no finite loss.

    Example:
        >>> low, high = Point.of(learning_rate=0.1), Point.of(learning_rate=0.2)
        >>> best = best_points({"goh": Grid.of_rates([0.1, 0.2])}, {("goh", low): 2.0, ("goh", high): float("nan")})
        >>> str(best["goh"])
        '0.1'
    """
    best, lost = {}, []
    for name, grid in grids.items():
        try:
            best[name] = grid.best({point: loss for (model, point), loss in losses.items() if model == name})
        except ValueError:
            lost.append(name)
    if lost:
        tried = ", ".join(map(str, sorted({point for _, point in losses}, key=lambda point: point.settings)))
        raise ValueError(
            f"Expected a finite loss at one of the learning rates [{tried}] (got none for {', '.join(lost)}). "
            "Do add a lower one."
        )
    return best


def _finite(loss: Any) -> float:
    return loss if math.isfinite(loss) else math.inf
