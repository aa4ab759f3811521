"""How far the main forms are from what this machine can do: its matrix products and its memory.

`sgemm` is one large product in float32, `read` a sum over numbers that no cache holds. They run in the same shuffled
rounds as the forms, so every round gives each form's time over its limit: the floating-point operations of its products
at the speed of `sgemm` (training: three times those of forward, nothing computed twice, half the maps where causal), or
the bytes of weights, keys and values at the speed of `read` (decode of one token, each read once), whichever is longer.
On one thread of a CPU the time is that of the processor, on more that of the wall.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import generate
from benchmarks.backbones import BACKBONES
from benchmarks.convert import Decode
from benchmarks.flags import add_round_flags, check_round_flags
from benchmarks.forms import Size, build
from benchmarks.speed import Step
from benchmarks.timing import WARM_UP, Call, interleaved, ratios
from gohgraph.common.tables import markdown_table

REPEATS = 12
TRAINED = {
    "training, plain": ("plain", Size(512, 8, 512, 1)),
    "training, complete score graph": ("score-complete", Size(256, 8, 1024, 2)),
}
DECODED = tuple(generate.Case(*sizes) for sizes in (
    (128, 8, 4, 512, 128, 1), (512, 8, 6, 1408, 512, 1), (1024, 16, 4, 2816, 512, 1)
))  # fmt: skip
SMOKE_TRAINED = {name: (form, Size(24, 4, 7, 2)) for name, (form, _) in TRAINED.items()}
SMOKE_DECODED = (generate.Case(24, 4, 2, 16, 7, 1),)
# The side of the product's matrices, and how many numbers are read.
SIDE, NUMBERS, SMOKE_SIDE, SMOKE_NUMBERS = 2048, 2**26, 64, 2**16


class Work(NamedTuple):
    """What a form cannot do without: floating-point operations of products, and bytes to read."""

    flops: float
    bytes: float

    def seconds(self, sgemm: float, read: float) -> float:
        """Returns the limit at so many operations and bytes a second.

        Example:
            >>> Work(flops=6.0, bytes=4.0).seconds(sgemm=2.0, read=1.0)
            4.0
        """
        return max(self.flops / sgemm, self.bytes / read)


class Product(Call):
    """One product of square matrices, `sgemm`."""

    def __init__(self, side: int) -> None:
        super().__init__(torch.device("cpu"))
        self.a, self.b, self.out = torch.randn(3, side, side)
        self.amount = 2.0 * side**3

    def work(self) -> None:
        """Multiplies."""
        torch.mm(self.a, self.b, out=self.out)


class Read(Call):
    """A sum over many numbers."""

    def __init__(self, numbers: int) -> None:
        super().__init__(torch.device("cpu"))
        self.x = torch.ones(numbers)
        self.amount = 4.0 * numbers

    def work(self) -> Tensor:
        """Adds up."""
        return self.x.sum()


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    add_round_flags(parser, REPEATS, threads=[1, 2])


def cases(flags: argparse.Namespace) -> list[int]:
    """Fills in the defaults of `flags` and returns the numbers of threads.

    Raises:
        ValueError: a flag that cannot be measured.
    """
    check_round_flags(flags, REPEATS, fewest=2)
    flags.device, flags.dtype = "cpu", "float32"
    return flags.threads


def calls(threads: int, flags: argparse.Namespace) -> int:
    """Returns how many calls `measure` times."""
    return (2 + len(_works(flags.smoke))) * (flags.repeats + WARM_UP)


def measure(threads: int, flags: argparse.Namespace, progress: tqdm) -> list[dict[str, Any]]:
    """Returns a row for each of the two limits and for each form."""
    progress.set_description(f"{threads} threads")
    torch.set_num_threads(threads)
    limits: dict[str, Product | Read] = {
        "sgemm": Product(SMOKE_SIDE if flags.smoke else SIDE), "read": Read(SMOKE_NUMBERS if flags.smoke else NUMBERS)
    }  # fmt: skip
    works = _works(flags.smoke)
    steps: dict[str, Call] = {**limits, **{name: step for name, (step, _) in works.items()}}
    for step in steps.values():
        step.clock = time.process_time if threads == 1 else time.perf_counter
    seconds = interleaved(steps, flags.repeats, progress)
    speeds = {name: [limit.amount / each for each in seconds[name]] for name, limit in limits.items()}
    rows: list[dict[str, Any]] = [{"threads": threads, "limit": name, "speed": own} for name, own in speeds.items()]
    for name, (_, work) in works.items():
        bounds = [work.seconds(*speed) for speed in zip(*speeds.values(), strict=True)]
        row = {"threads": threads, "form": name, "flops": work.flops, "bytes": work.bytes, "seconds": seconds[name]}
        rows.append({**row, "ratio": ratios(seconds[name], bounds)})
    return rows


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """Returns the Markdown table of a number of threads."""
    lines = [["", "median", "to its limit (quartiles)"]]
    for row in rows:
        if "limit" in row:
            low, median, high = (each / 1e9 for each in statistics.quantiles(row["speed"], method="inclusive"))
            unit = "GFLOP/s" if row["limit"] == "sgemm" else "GB/s"
            lines.append([row["limit"], f"{median:.1f} {unit} ({low:.1f}-{high:.1f})", ""])
            continue
        low, median, high = row["ratio"]
        milliseconds = statistics.median(row["seconds"]) * 1e3
        lines.append([row["form"], f"{milliseconds:.2f} ms", f"{median:.2f} ({low:.2f}-{high:.2f})"])
    return [markdown_table(lines, f"**threads: {rows[0]['threads']}**")]


def trained_work(size: Size, *, mixes: bool) -> Work:
    """Returns what a causal block of attention and feed-forward (4 M) cannot do without in training.

    With `mixes`, a complete score graph: its edges of full rank, and one product over heads for every map.

    Example:
        >>> trained_work(Size(d_model=2, num_heads=1, length=3, batch=1), mixes=False).flops
        972.0
    """
    width, heads, length, batch = size
    tokens = batch * length
    flops = 2 * tokens * 12 * width**2 + 4 * tokens * length * width / 2
    if mixes:
        flops += 2 * tokens * width * heads**2 + 2 * tokens * length * heads**2 / 2
    return Work(3.0 * flops, 0.0)


def _works(smoke: bool) -> dict[str, tuple[Call, Work]]:
    works: dict[str, tuple[Call, Work]] = {}
    for name, (form, size) in (SMOKE_TRAINED if smoke else TRAINED).items():
        x, grad = torch.randn(2, size.batch, size.length, size.d_model)  # [B, T, M] each
        training = Step(build(form, size), "block", "forward+backward", x.requires_grad_(), grad)
        title = f"{name}, {'/'.join(map(str, size))}"
        works[title] = training, trained_work(size, mixes=form != "plain")
    for case in SMOKE_DECODED if smoke else DECODED:
        model = generate.build("plain", case, 1)
        step = Decode(BACKBONES["own"], model, torch.zeros(case.batch, 1, dtype=torch.long), case.prompt)
        weights = sum(parameter.numel() for parameter in model.parameters())
        flops = 2.0 * case.batch * (weights + 2 * case.num_layers * case.prompt * case.d_model)
        work = Work(flops, 4.0 * (weights + 2 * case.batch * case.num_layers * case.prompt * case.d_model))
        works[f"decode, plain, {'/'.join(map(str, case))}"] = step, work
    return works
