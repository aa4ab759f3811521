"""The table of what all learning rates led to."""

from __future__ import annotations

import math
from collections.abc import Mapping

from gohgraph.common.tables import markdown_table
from gohgraph.learning.contests.grid import Point


def rates_table(losses: Mapping[tuple[str, Point], float]) -> str:
    """Returns losses by the first setting of the points, a row for every model and values of the other settings.

    Example:
        >>> points = [Point.of(learning_rate=rate, matrix_learning_rate=0.02) for rate in (0.1, 0.2)]
        >>> print(rates_table({("goh", points[0]): 2.0, ("goh", points[1]): float("inf")}))
        | loss or error at a rate of     |    0.1 |      0.2 |
        | ------------------------------ | -----: | -------: |
        | goh, matrix_learning_rate 0.02 | 2.0000 | diverged |
    """
    by_row: dict[str, dict[str, str]] = {}
    for (name, point), loss in losses.items():
        (_, first), *others = point.settings
        row = ", ".join([name, *(f"{setting} {value:g}" for setting, value in others)])
        by_row.setdefault(row, {})[f"{first:g}"] = f"{loss:.4f}" if math.isfinite(loss) else "diverged"
    columns = list(dict.fromkeys(column for cells in by_row.values() for column in cells))
    rows = [["loss or error at a rate of", *columns]]
    rows += [[row, *(cells.get(column, "-") for column in columns)] for row, cells in by_row.items()]
    return markdown_table(rows)
