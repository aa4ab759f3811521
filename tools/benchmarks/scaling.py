"""How the time of head graphs grows with heads, length and batch, as ratios to plain attention.

Timed is a block, forward and backward, as in `speed`; shown are the median and the quartiles over rounds of the ratio
to plain within a round. On one CPU thread the time is that of the processor. Forms whose maps of scores would not fit
into 8 GiB are not run at that size.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.flags import add_shared_flags, place
from benchmarks.forms import build
from benchmarks.grids import Grid, add_grid_flags, forms_at, grid_table, grids_of
from benchmarks.speed import Step
from benchmarks.timing import WARM_UP, interleaved, ratios

REPEATS = 8


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    add_grid_flags(parser)
    add_shared_flags(parser, REPEATS)


def cases(flags: argparse.Namespace) -> list[Grid]:
    """Returns the tables to measure."""
    return grids_of(flags, REPEATS)


def calls(grid: Grid, flags: argparse.Namespace) -> int:
    """Returns how many calls `measure` times."""
    return sum(len(forms_at(size, flags.only)) for size in grid.sizes) * (flags.repeats + WARM_UP)


def measure(grid: Grid, flags: argparse.Namespace, progress: tqdm) -> list[dict[str, Any]]:
    """Returns one row for every form at every size."""
    rows = []
    for size in grid.sizes:
        progress.set_description(f"{grid.axis} {size._asdict()[grid.axis]}")
        torch.manual_seed(1)
        x, grad = torch.randn(2, size.batch, size.length, size.d_model, **place(flags))  # [B, T, M] each
        x.requires_grad_()
        steps = {
            name: Step(build(name, size).to(**place(flags)), "block", "forward+backward", x, grad)
            for name in forms_at(size, flags.only)
        }
        if flags.device == "cpu" and flags.threads == 1:
            for step in steps.values():
                step.clock = time.process_time
        seconds = interleaved(steps, flags.repeats, progress)
        for name, own in seconds.items():
            row = {"axis": grid.axis, "size": size._asdict(), "variant": name, "seconds": own}
            quartiles = ratios(own, seconds["plain"])
            rows.append({**row, "ratio": quartiles[1], "quartiles": quartiles})
    return rows


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """Returns the Markdown table of one grid."""
    return [grid_table("time of a block, forward+backward, to plain", rows, "quartiles")]
