"""Time and memory of head graphs against plain attention: one table per size and part, as ratios to plain.

A size is d_model/heads/length/batch. Timed are two parts, causal, without dropout: `attention` (norm, attention,
residual) and `block` (that and the feed-forward). All forms have the weights of the plain one; edges are random, not
zero. moh-50 is Mixture-of-Head attention with 50 % active heads, moh-50-all the same computed for all heads; torch is
`nn.TransformerEncoderLayer`, x-transformers that library's attention (no biases) in our block. Forward runs in eval
mode without gradients (prefill); forward+backward gives gradients of input and weights; decode takes the last token
with the keys and values of the others in a cache, where the form has one here. Each round runs every form once, in
shuffled order, and gives one ratio to plain; shown are their median and quartiles.

Peak memory is that of forward+backward above what was live before, gradients included: on CUDA
`max_memory_allocated`, on CPU the running sum of the allocations and frees that `torch.profiler` records.

--compile runs every form under torch.compile, but for decode; kernel forms are left out then.

Forms named kernel are the Triton kernels for CUDA, measured by default where a GPU takes all sizes.

On Linux CPUs, malloc may return large score maps (eager) to the system after a call, or not, by what ran before: tens
of milliseconds. MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000 keep them; the header shows both.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.decoding import attention_of, filled_cache
from benchmarks.flags import add_shared_flags, check_shared_flags, numbers_of, place
from benchmarks.forms import VARIANTS, Size, build
from benchmarks.timing import WARM_UP, Call, interleaved, ratios
from gohgraph.common.tables import markdown_table

DEFAULT_SIZES = ("512/8/512/2", "1024/16/256/2", "256/8/1024/2")
SMOKE_SIZES = ("32/4/24/2",)
PARTS, PASSES = ("attention", "block"), ("forward", "forward+backward", "decode")
REPEATS = 20


class Step(Call):
    """One call to be measured: a part of a layer, forward or forward+backward, on inputs all forms share."""

    def __init__(self, layer: nn.Module, part: str, passes: str, x: Tensor, grad: Tensor) -> None:
        super().__init__(x.device)
        self.layer, self.x, self.grad, self.backward = layer, x, grad, passes != "forward"
        self.function: Callable[..., Any] = layer if part == "block" else getattr(layer, part)

    def prepare(self) -> None:
        """Forgets the gradients of the call before."""
        self.layer.train(self.backward)
        self.x.grad = None
        self.layer.zero_grad(set_to_none=True)

    def work(self) -> None:
        """Runs the part, and backward where that is measured."""
        with torch.set_grad_enabled(self.backward):
            y = self.function(self.x)[0]
        if self.backward:
            y.backward(self.grad)


class Decode(Call):
    """One token through a part of our layer, the keys and values of those before it in a cache."""

    def __init__(self, layer: nn.Module, part: str, x: Tensor) -> None:
        super().__init__(x.device)
        self.layer, self.x = layer, x[:, -1:].detach()  # [B, 1, M]
        attention = attention_of(layer)
        shape = (2, x.shape[0], x.shape[1] - 1, attention.num_kv_heads, attention.head_dim)
        self.cache, self.past = filled_cache(*torch.randn(shape, device=x.device, dtype=x.dtype)), x.shape[1] - 1
        whole, own = partial(layer, caches=(self.cache,)), layer.get_submodule("attention")
        self.function: Callable[..., Any] = whole if part == "block" else partial(own, cache=self.cache)

    def prepare(self) -> None:
        """Lets the cache forget the token of the call before."""
        self.layer.eval()
        self.cache.truncate(self.past)

    @torch.no_grad()
    def work(self) -> None:
        """Decodes the token."""
        self.function(self.x)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    parser.add_argument("--sizes", nargs="+", metavar="SIZE", help=f"default: {' '.join(DEFAULT_SIZES)}")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help=f"of {' '.join(VARIANTS)}; plain is always run")
    parser.add_argument("--compile", action="store_true", help="run every form under torch.compile")
    add_shared_flags(parser, REPEATS)


def cases(flags: argparse.Namespace) -> list[Size]:
    """Fills in the defaults of `flags`, its variants `only` among them, and returns the sizes to measure.

    Raises:
        ValueError: a flag that cannot be measured.
    """
    if unknown := sorted(set(flags.only or ()) - set(VARIANTS)):
        raise ValueError(f"Expected variants of {list(VARIANTS)} (got {unknown}). Do choose among them.")
    check_shared_flags(flags, REPEATS)
    texts = flags.sizes or (SMOKE_SIZES if flags.smoke else DEFAULT_SIZES)
    asked, flags.only = flags.only, [name for name in VARIANTS if name == "plain" or name in (flags.only or VARIANTS)]
    sizes = [_size(text, flags.only) for text in texts]
    # A compiled layer does not call the kernels.
    runs = {name: not (flags.compile and VARIANTS[name].form == "kernel") for name in flags.only}
    runs |= {name: runs[name] and all(_runs(name, size, flags) for size in sizes) for name in flags.only}
    if refused := [name for name in asked or () if not runs[name]]:
        raise ValueError(
            f"Expected a GPU, sizes and a type that the kernels take, not compiled (got {refused} on {flags.device} in "
            f"{flags.dtype}). Do read gohgraph.attention.kernels.mixed_attention.kernel_refuses."
        )
    flags.only = [name for name in flags.only if runs[name]]
    return sizes


def calls(size: Size, flags: argparse.Namespace) -> int:
    """Returns how many calls `measure` times."""
    return len(PARTS) * (2 * len(flags.only) + sum(map(_decodes, flags.only))) * (flags.repeats + WARM_UP)


def measure(size: Size, flags: argparse.Namespace, progress: tqdm) -> list[dict]:
    """Returns one row of measurements for each part and variant of a size."""
    layers = {name: build(name, size).to(**place(flags)) for name in flags.only}
    torch.manual_seed(1)
    x, grad = torch.randn(2, size.batch, size.length, size.d_model, **place(flags))  # [B, T, M] each
    x.requires_grad_()
    rows: list[dict[str, Any]] = []
    for part in PARTS:
        found = {name: {"size": size._asdict(), "part": part, "variant": name} for name in layers}
        for passes in PASSES:
            progress.set_description(f"{size.d_model}/{size.num_heads} {part} {passes}")
            steps = _steps(layers, part, passes, x, grad, flags.compile)
            seconds = interleaved(steps, flags.repeats, progress)
            for name, own in seconds.items():
                found[name][passes] = {"seconds": own, "ratio": ratios(own, seconds["plain"])}
            if passes == "forward+backward":
                for name, row in found.items():
                    row["peak_bytes"] = steps[name].peak_bytes()
        rows += found.values()
    return rows


def _steps(
    layers: dict[str, nn.Module], part: str, passes: str, x: Tensor, grad: Tensor, compiled: bool
) -> dict[str, Call]:
    if passes == "decode":
        return {name: Decode(layer, part, x) for name, layer in layers.items() if _decodes(name)}
    steps = {name: Step(layer, part, passes, x, grad) for name, layer in layers.items()}
    if compiled:
        for step in steps.values():
            step.function = torch.compile(step.function)
    return dict(steps)


def _decodes(name: str) -> bool:
    """Whether a form decodes here: one of ours, but the kernels, which refuse a single query."""
    return VARIANTS[name].foreign is None and VARIANTS[name].form != "kernel"


def tables(rows: list[dict]) -> list[str]:
    """Returns a Markdown table for each part of a size, from the rows of `measure`; the first row of each is plain."""
    return [_table([row for row in rows if row["part"] == part]) for part in PARTS]


def _table(rows: list[dict]) -> str:
    size = ", ".join(f"{name} {value}" for name, value in rows[0]["size"].items())
    ratio = "to plain (quartiles)"
    lines = [["", *(cell for passes in PASSES for cell in (passes, ratio)), "peak memory", "to plain"]]
    for row in rows:
        cells = [row["variant"]]
        for passes in PASSES:
            if passes not in row:
                cells += ["-", "-"]
                continue
            low, median, high = row[passes]["ratio"]
            milliseconds = statistics.median(row[passes]["seconds"]) * 1e3
            cells += [f"{milliseconds:.2f} ms", f"{median:.3f} ({low:.3f}-{high:.3f})"]
        memory = row["peak_bytes"]
        lines.append([*cells, f"{memory / 2**20:.1f} MiB", f"{memory / rows[0]['peak_bytes']:.3f}"])
    return markdown_table(lines, f"**{rows[0]['part']}**, {size}")


def _runs(name: str, size: Size, flags: argparse.Namespace) -> bool:
    return VARIANTS[name].runs(size, **place(flags))


def _size(text: str, names: list[str]) -> Size:
    size = Size(*numbers_of(text, "d_model/heads/length/batch", "512/8/512/2"))
    for name in names:
        if size.num_heads < (heads := VARIANTS[name].fewest_heads):
            raise ValueError(f"Expected at least {heads} heads for {name} (got {text!r}). Do leave it out with --only.")
    return size
