"""How the memory of head graphs grows with heads, length and batch, as ratios to plain attention.

Measured is the peak of a block above what was live before, as in `speed`: in training (forward and backward, gradients
included) and in prefill (forward in eval mode without gradients). Forms whose maps of scores would not fit into 8 GiB
are not run at that size.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.flags import add_shared_flags, place
from benchmarks.forms import build
from benchmarks.grids import Grid, add_grid_flags, forms_at, grid_table, grids_of
from benchmarks.speed import Step

# Allocations do not vary between rounds.
REPEATS = 2
MODES = {"training": "forward+backward", "prefill": "forward"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    add_grid_flags(parser)
    add_shared_flags(parser, REPEATS)


def cases(flags: argparse.Namespace) -> list[Grid]:
    """Returns the tables to measure."""
    return grids_of(flags, REPEATS)


def calls(grid: Grid, flags: argparse.Namespace) -> int:
    """Returns how many calls `measure` makes."""
    return len(MODES) * sum(len(forms_at(size, flags.only)) for size in grid.sizes)


def measure(grid: Grid, flags: argparse.Namespace, progress: tqdm) -> list[dict[str, Any]]:
    """Returns one row for every form at every size."""
    rows = []
    for size in grid.sizes:
        progress.set_description(f"{grid.axis} {size._asdict()[grid.axis]}")
        x, grad = torch.randn(2, size.batch, size.length, size.d_model, **place(flags))  # [B, T, M] each
        x.requires_grad_()
        found: list[dict[str, Any]] = []
        for name in forms_at(size, flags.only):
            row: dict[str, Any] = {"axis": grid.axis, "size": size._asdict(), "variant": name}
            for mode, passes in MODES.items():
                step = Step(build(name, size).to(**place(flags)), "block", passes, x, grad)
                # The first call may allocate what stays.
                step.seconds()
                row[f"{mode} bytes"] = step.peak_bytes()
                progress.update()
            found.append(row)
        for row in found:
            row |= {mode: row[f"{mode} bytes"] / found[0][f"{mode} bytes"] for mode in MODES}
        rows += found
    return rows


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """Returns a Markdown table of one grid for training and one for prefill."""
    return [grid_table(f"peak memory of a block in {mode}, to plain", rows, mode) for mode in MODES]
