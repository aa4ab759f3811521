"""The rows that speed is judged by: ours beside what people would pick instead, wherever attention is used.

Each row lets all its forms take turns, in shuffled order; every round gives one ratio of each to the row's first form,
shown with quartiles. `limit` is the ratio that this machine allows: the first form's time and what a graph cannot do
without, its products at the speed of a large one (`sgemm`, measured in the same rounds) and its weights at that of a
long sum. Training is forward and backward; memory is the peak of it, as in `speed`. On one thread the time is that of
the processor, on more that of the wall. `first call` has what happens once, as compiling, by the wall: compilers are
processes of their own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks import row_forms
from benchmarks.flags import add_round_flags, check_round_flags
from benchmarks.limits import Product, Read
from benchmarks.row_forms import Forms
from benchmarks.timing import WARM_UP, Call, interleaved, ratios
from gohgraph.common.tables import markdown_table

# Small enough to be in every round, large enough to be as fast as larger ones.
SIDE, NUMBERS, SMOKE_SIDE, SMOKE_NUMBERS = 1024, 2**25, 64, 2**16
LIMITS = "sgemm", "read"


class Row(NamedTuple):
    """One row.

    Args:
        build: the forms of a size, the first of which all are compared with.
        names: of the numbers of a size.
        full: its sizes; small: a tiny one.
        repeats: rounds.
        memory: whether the peaks are told.
        compiles: whether the first call is told.
    """

    build: Callable[..., Forms]
    names: tuple[str, ...]
    full: tuple[tuple[int, ...], ...]
    small: tuple[int, ...]
    repeats: int
    memory: bool = False
    compiles: bool = False

    def sizes(self, smoke: bool) -> tuple[tuple[int, ...], ...]:
        """Returns the sizes to measure."""
        return (self.small,) if smoke else self.full

    def forms(self, size: tuple[int, ...]) -> Forms:
        """Builds the forms of a size."""
        return self.build(*size)

    def title(self, size: tuple[int, ...]) -> str:
        """Returns a size in words."""
        return ", ".join(f"{name} {number:,}" for name, number in zip(self.names, size, strict=True))


BLOCK, LLAMA = ("d_model", "heads", "length", "batch"), ("heads", "tokens")
SMALL = (24, 4, 7, 2)
ROWS = {
    "converted-decode": Row(row_forms.converted_decode, ("heads", "keys"), ((32, 2048),), (4, 7), 60),
    "converted-training": Row(
        row_forms.converted_training, LLAMA, ((8, 1024), (16, 1024), (32, 1024)), (4, 7), 8
    ),
    "drop-in": Row(row_forms.dropin, BLOCK, ((256, 8, 1024, 2),), SMALL, 8, memory=True),
    "routed-decode": Row(row_forms.routed, ("d_model", "heads", "keys"), ((1024, 16, 512),), (32, 8, 7), 100),
    "small-maps": Row(
        partial(row_forms.blocks, ("score-complete", "talking-heads")), BLOCK, ((128, 8, 128, 8),), SMALL, 20
    ),
    "small-decode": Row(
        row_forms.loop, ("d_model", "heads", "layers", "d_ff", "keys"),
        ((128, 8, 4, 512, 128), (512, 8, 6, 1408, 512)), (24, 4, 2, 16, 7), 100,
    ),
    "output-heads": Row(
        partial(row_forms.blocks, ("output", "output-ring4")), BLOCK,
        ((512, 32, 512, 2), (512, 64, 512, 2), (512, 128, 512, 2)), SMALL, 6, memory=True,
    ),
    "score-heads": Row(
        partial(row_forms.blocks, ("score-complete",)), BLOCK,
        ((512, 32, 512, 2), (512, 64, 512, 2), (512, 128, 512, 2)), SMALL, 6, memory=True,
    ),
    "length": Row(
        partial(row_forms.blocks, ("score-ring2", "score-complete")), BLOCK,
        ((512, 8, 2048, 1), (512, 8, 4096, 1), (512, 8, 8192, 1)), SMALL, 4,
    ),
    "bf16": Row(row_forms.half_blocks, BLOCK, ((512, 8, 512, 1),), SMALL, 8),
    "eager": Row(
        partial(row_forms.blocks, ("output", "score-ring2", "score-complete")), BLOCK, ((512, 8, 512, 1),), SMALL, 12
    ),
    "compiled": Row(row_forms.compiled_blocks, BLOCK, ((512, 8, 512, 1),), SMALL, 12, compiles=True),
}  # fmt: skip


class Case(NamedTuple):
    """One row on a number of threads."""

    name: str
    threads: int


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), help="(default: all)")
    add_round_flags(parser, 0, threads=[1])


def cases(flags: argparse.Namespace) -> list[Case]:
    """Fills in the defaults of `flags` and returns the rows to measure.

    Raises:
        ValueError: a flag that cannot be measured.
    """
    asked = flags.repeats
    check_round_flags(flags, 2, fewest=2)
    # Every row has rounds of its own, unless they are asked for.
    flags.rounds = {name: flags.repeats if asked or flags.smoke else row.repeats for name, row in ROWS.items()}
    flags.device, flags.dtype = "cpu", "float32"
    flags.repeats = "/".join(str(flags.rounds[name]) for name in flags.only)
    return [Case(name, threads) for threads in flags.threads for name in flags.only]


def calls(case: Case, flags: argparse.Namespace) -> int:
    """Returns how many rounds `measure` runs, over all sizes of a row."""
    return len(ROWS[case.name].sizes(flags.smoke)) * (flags.rounds[case.name] + WARM_UP)


def measure(case: Case, flags: argparse.Namespace, progress: tqdm) -> list[dict[str, Any]]:
    """Returns one measurement for every form at every size of a row."""
    progress.set_description(case.name)
    torch.set_num_threads(case.threads)
    row, rows = ROWS[case.name], []
    for size in row.sizes(flags.smoke):
        rows += _measured(row, case, size, flags)
        progress.update(flags.rounds[case.name] + WARM_UP)
    return rows


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """Returns the Markdown table of a row."""
    lines = [["", "", "median", "to the first (quartiles)", "limit", "memory", "first call"]]
    for row in rows:
        low, median, high = row["ratio"]
        cells = [row["size"], row["form"], f"{statistics.median(row['seconds']) * 1e3:.2f} ms"]
        cells += [f"{median:.2f} ({low:.2f}-{high:.2f})", f"{row['limit']:.2f}"]
        cells.append("-" if row["memory"] is None else f"{row['memory']:.2f}")
        lines.append([*cells, f"{row['first']:.1f} s" if row["compiles"] else "-"])
    return [markdown_table(lines, f"**{rows[0]['row']}**, threads: {rows[0]['threads']}")]


def _measured(row: Row, case: Case, size: tuple[int, ...], flags: argparse.Namespace) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    forms = row.forms(size)
    limits = (Product(SMOKE_SIDE), Read(SMOKE_NUMBERS)) if flags.smoke else (Product(SIDE), Read(NUMBERS))
    steps = {**dict(zip(LIMITS, limits, strict=True)), **{name: form.call for name, form in forms.items()}}
    for step in steps.values():
        step.clock = time.process_time if case.threads == 1 else time.perf_counter
    first = {name: _wall_seconds(step) for name, step in steps.items()}
    seconds = interleaved(steps, flags.rounds[case.name], tqdm(disable=True))
    memory = {name: form.call.peak_bytes() for name, form in forms.items()} if row.memory else {}
    base = next(iter(forms))
    rows = []
    for name, form in forms.items():
        added = zip(*(seconds[limit] for limit in LIMITS), seconds[base], strict=True)
        bounds = [
            1 + (form.added.flops * product / limits[0].amount + form.added.bytes * read / limits[1].amount) / own
            for product, read, own in added
        ]
        measured = {"seconds": seconds[name], "ratio": ratios(seconds[name], seconds[base]), "first": first[name]}
        measured |= {"limit": statistics.median(bounds), "memory": memory and memory[name] / memory[base] or None}
        told = {"row": case.name, "threads": case.threads, "size": row.title(size), "form": name}
        rows.append({**told, **measured, "compiles": row.compiles})
    return rows


def _wall_seconds(call: Call) -> float:
    call.prepare()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
