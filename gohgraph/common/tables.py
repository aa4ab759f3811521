"""Numbers as text: tables in Markdown, and means with their deviation."""

import statistics
from collections.abc import Sequence
from typing import Any


def markdown_table(lines: Sequence[Sequence[Any]], title: str = "") -> str:
    """Returns an aligned Markdown table: first column to the left, the others to the right.

    Args:
        lines: cells; the first line is the head.
        title: a line of Markdown above it.

    Example:
        >>> print(markdown_table([["", "heads"], ["small", 8]], "**sizes**"))
        **sizes**
        <BLANKLINE>
        |       | heads |
        | ----- | ----: |
        | small |     8 |
    """
    head, *rows = [[str(cell) for cell in cells] for cells in lines]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    signs = "<" + ">" * len(widths[1:])
    aligned = ([f"{c:{s}{w}}" for c, s, w in zip(cells, signs, widths, strict=True)] for cells in (head, rule, *rows))
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in aligned)
    return f"{title}\n\n{table}" if title else table


def mean_and_deviation(values: Sequence[float], digits: int = 3, *, signed: bool = False) -> str:
    """Returns the mean, and with several values the standard deviation, as text.

    Example:
        >>> mean_and_deviation([1.0, 2.0]), mean_and_deviation([1.5], signed=True)
        ('1.500 ± 0.707', '+1.500')
    """
    shown = f"{statistics.mean(values):{'+' if signed else ''}.{digits}f}"
    return f"{shown} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else shown
