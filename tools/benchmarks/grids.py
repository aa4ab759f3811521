"""Sizes that vary in one respect: the number of heads, the length, or the batch."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.flags import check_shared_flags
from benchmarks.forms import VARIANTS, Size
from gohgraph.common.checks import check_int
from gohgraph.common.tables import markdown_table

OURS = ("plain", "output", "output-ring4", "score-ring2", "score-complete", "talking-heads")
FORMS = (*OURS, "torch", "x-transformers", "x-talking-heads")
# Forms that hold whole maps of scores, and how many of them at a time, forward and backward.
MAPS = {"x-talking-heads": 8}
LARGEST_MAPS = 8 * 2**30


class Grid(NamedTuple):
    """One table: what varies, and the sizes that are its columns."""

    axis: str
    sizes: tuple[Size, ...]


HEADS, LENGTHS, BATCHES = (4, 8, 16, 32, 64, 128), (128, 512, 2048, 8192), (1, 4, 16, 64)


def grids(
    heads: Sequence[int] = HEADS, lengths: Sequence[int] = LENGTHS, batches: Sequence[int] = BATCHES
) -> list[Grid]:
    """Returns the tables of a benchmark over sizes, without those of nothing.

    Example:
        >>> [(grid.axis, len(grid.sizes)) for grid in grids()], [grid.axis for grid in grids((), (4096,), ())]
        ([('num_heads', 6), ('length', 4), ('batch', 4)], ['length'])
    """
    every = [
        Grid("num_heads", tuple(Size(512, number, 512, 2) for number in heads)),
        Grid("length", tuple(Size(512, 8, length, 1) for length in lengths)),
        Grid("batch", tuple(Size(512, 8, 128, batch) for batch in batches)),
    ]
    return [grid for grid in every if grid.sizes]


def add_grid_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that choose among forms and sizes."""
    parser.add_argument("--only", nargs="+", metavar="FORM", help=f"of {' '.join(FORMS)}; plain is always run")
    for name, default in {"heads": HEADS, "lengths": LENGTHS, "batches": BATCHES}.items():
        text = f"default: {' '.join(map(str, default))}; one of these flags leaves out the tables of the others"
        parser.add_argument(f"--{name}", nargs="+", type=int, default=(), metavar="N", help=text)


def grids_of(flags: argparse.Namespace, repeats: int) -> list[Grid]:
    """Checks the flags, fills in their defaults and returns the tables to measure.

    Raises:
        ValueError: a flag that cannot be measured.
    """
    if unknown := sorted(set(flags.only or ()) - set(FORMS)):
        raise ValueError(f"Expected forms of {list(FORMS)} (got {unknown}). Do choose among them.")
    check_shared_flags(flags, repeats)
    flags.only = [name for name in FORMS if name == "plain" or name in (flags.only or FORMS)]
    if flags.smoke:
        return [Grid("length", tuple(Size(32, 4, length, 2) for length in (5, 11)))]
    asked = (flags.heads, flags.lengths, flags.batches)
    for number in itertools.chain(*asked):
        check_int("--heads, --lengths and --batches", number, low=1)
    if odd := [number for number in flags.heads if 512 % number]:
        raise ValueError(f"Expected heads that divide a d_model of 512 (got {odd}). Do choose others.")
    return grids(*asked) if any(asked) else grids()


def forms_at(size: Size, names: list[str]) -> list[str]:
    """Returns the forms that a size is measured in: those whose maps fit into 8 GiB, and have as many heads.

    Example:
        >>> forms_at(Size(512, 8, 8192, 1), ["plain", "x-talking-heads"])
        ['plain']
    """
    maps = 4 * size.batch * size.num_heads * size.length**2
    fits = [name for name in names if MAPS.get(name, 0) * maps <= LARGEST_MAPS]
    return [name for name in fits if size.num_heads >= VARIANTS[name].fewest_heads]


def grid_table(title: str, rows: list[dict[str, Any]], value: str) -> str:
    """Returns a Markdown table of a number, or of quartiles, by form and size; `-` where a form was not measured.

    Args:
        title: of the table.
        rows: with `axis`, `size`, `variant` and the number.
        value: its name.
    """
    axis = rows[0]["axis"]
    columns = sorted({row["size"][axis] for row in rows})
    found = {(row["variant"], row["size"][axis]): row[value] for row in rows}
    fixed = ", ".join(f"{name} {number}" for name, number in rows[0]["size"].items() if name != axis)
    lines = [[axis.replace("_", " "), *map(str, columns)]]
    for name in dict.fromkeys(row["variant"] for row in rows):
        cells = (found.get((name, column)) for column in columns)
        lines.append([name, *map(_cell, cells)])
    return markdown_table(lines, f"**{title}**, {fixed}")


def _cell(value: float | Sequence[float] | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, (int, float)):
        return f"{value:.2f}"
    low, median, high = value
    return f"{median:.2f} ({low:.2f}-{high:.2f})"
