"""Where the time of a row of `rows` goes: every form by torch's operators, beside the row's first form.

A round runs every form once under torch's profiler, in an order of its own. An operator's time is its own, without that
of operators it calls, the median over rounds; `extra` is what it takes beyond that, in percent of all of the first
form. Python between operators is in the operator that called it, or in none. The profiler tells the time of the wall:
on a busy machine only large numbers mean something.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections import defaultdict
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from benchmarks.flags import add_round_flags, check_round_flags
from benchmarks.rows import ROWS, Case
from benchmarks.timing import WARM_UP, Call
from gohgraph.common.tables import markdown_table

REPEATS, SHOWN = 7, 14
Times = dict[str, tuple[float, float]]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), help="(default: all)")
    parser.add_argument("--sizes", type=int, nargs="+", metavar="N", help="which sizes of a row, from 0 (default: all)")
    add_round_flags(parser, REPEATS, threads=[1])


def cases(flags: argparse.Namespace) -> list[Case]:
    """Fills in the defaults of `flags` and returns the rows to measure.

    Raises:
        ValueError: a flag that cannot be measured.
    """
    check_round_flags(flags, REPEATS, fewest=1)
    flags.device, flags.dtype = "cpu", "float32"
    return [Case(name, threads) for threads in flags.threads for name in flags.only]


def calls(case: Case, flags: argparse.Namespace) -> int:
    """Returns how many rounds `measure` runs, over all sizes of a row."""
    return len(_sizes(case, flags)) * (flags.repeats + WARM_UP)


def measure(case: Case, flags: argparse.Namespace, progress: tqdm) -> list[dict[str, Any]]:
    """Returns for every form at every size of a row its operators with their milliseconds and calls."""
    progress.set_description(case.name)
    torch.set_num_threads(case.threads)
    rows = []
    for size in _sizes(case, flags):
        torch.manual_seed(0)
        forms = {name: form.call for name, form in ROWS[case.name].forms(size).items()}
        told = {"row": case.name, "threads": case.threads, "size": ROWS[case.name].title(size)}
        found = _interleaved(forms, flags.repeats, progress)
        first = found[next(iter(forms))]
        rows += [{**told, "form": name, "operators": own, "first": first} for name, own in found.items()]
    return rows


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """Returns a Markdown table for every form but the first of its row and size."""
    return [_table(row) for row in rows if row["operators"] is not row["first"]]


def _sizes(case: Case, flags: argparse.Namespace) -> list[tuple[int, ...]]:
    sizes = ROWS[case.name].sizes(flags.smoke)
    return [size for index, size in enumerate(sizes) if flags.sizes is None or index in flags.sizes]


def _interleaved(forms: dict[str, Call], repeats: int, progress: tqdm) -> dict[str, Times]:
    rounds: dict[str, list[Times]] = {name: [] for name in forms}
    for index in range(-WARM_UP, repeats):
        for name in random.Random(index).sample(list(forms), len(forms)):
            rounds[name].append(profiled(forms[name]))
        progress.update()
    return {name: _medians(found[WARM_UP:]) for name, found in rounds.items()}


def profiled(call: Call) -> Times:
    """Returns of every operator within a call its own milliseconds, and how often it ran."""
    call.prepare()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    return {event.key: (event.self_cpu_time_total / 1e3, event.count) for event in profiler.key_averages()}


def _medians(rounds: list[Times]) -> Times:
    of: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for found in rounds:
        for name, numbers in found.items():
            of[name].append(numbers)
    return {name: tuple(map(statistics.median, zip(*numbers, strict=True))) for name, numbers in of.items()}


def _table(row: dict[str, Any]) -> str:
    first, own = row["first"], row["operators"]
    extra = {name: own.get(name, (0.0, 0))[0] - first.get(name, (0.0, 0))[0] for name in {*own, *first}}
    total, before = sum(extra.values()), sum(time for time, _ in first.values())
    lines = [["operator", "ms", "calls", "first: ms", "calls", "extra"]]
    for name in sorted(extra, key=lambda name: -abs(extra[name]))[:SHOWN]:
        (time, count), (other, others) = (times.get(name, (0.0, 0)) for times in (own, first))
        cells = [f"{time:.2f}", f"{count:.0f}", f"{other:.2f}", f"{others:.0f}"]
        lines.append([name, *cells, f"{extra[name] / before:+.1%}"])
    lines.append(["all", f"{before + total:.2f}", "", f"{before:.2f}", "", f"{total / before:+.1%} of the first"])
    return markdown_table(lines, f"**{row['row']}**, {row['form']}, {row['size']}, threads: {row['threads']}")
