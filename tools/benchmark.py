"""Time and memory of head graphs against plain attention: one table per size and part, as ratios to plain.

    python tools/benchmark.py --sizes 512/8/512/2 --repeats 30 --only output score-ring2 --markdown benchmark.md

A size is d_model/heads/length/batch. Timed are two parts, causal, without dropout: `attention` (norm, attention,
residual) and `block` (that and the feed-forward). All forms have the weights of the plain one; edges are random, not
zero. Forward runs in eval mode without gradients; forward+backward gives gradients of input and weights. Each round
runs every form once, in shuffled order, and gives one ratio to plain; shown are their median and quartiles.

Peak memory is that of forward+backward above what was live before, gradients included: on CUDA
`max_memory_allocated`, on CPU the running sum of the allocations and frees that `torch.profiler` records.

On Linux CPUs, malloc may return large score maps (eager) to the system after a call, or not, by what ran before: tens
of milliseconds. MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000 keep them; the header shows both.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gohgraph import EncoderLayer, HeadGraphConfig, SiteConfig, TransformerConfig, fold
from gohgraph.command_line import ArgumentParser, run

DEFAULT_SIZES = ("512/8/512/2", "1024/16/256/2", "256/8/1024/2")
SMOKE_SIZES = ("32/4/24/2",)
DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
PARTS, PASSES = ("attention", "block"), ("forward", "forward+backward")
WARM_UP = 2
Size = namedtuple("Size", "d_model num_heads length batch")


@dataclass(frozen=True)
class Variant:
    """One form of attention; `change` is applied to its `MultiHeadAttention` once the edges have their weights."""

    head_graph: HeadGraphConfig | None = None
    change: Callable[[nn.Module], object] = lambda attention: None
    fewest_heads: int = 1


def _force_eager(attention: nn.Module) -> None:
    attention.wide = None


def _score_ring(in_degree: int, *change: Callable) -> Variant:
    return Variant(HeadGraphConfig(outputs=None, scores=SiteConfig.ring(in_degree)), *change, fewest_heads=in_degree)


VARIANTS = {
    "plain": Variant(),
    "torch": Variant(),
    "output": Variant(HeadGraphConfig()),
    "output-pyg": Variant(HeadGraphConfig(SiteConfig(backend="pyg"))),
    "output-folded": Variant(HeadGraphConfig(SiteConfig(edges="static")), fold),
    "output-ring4": Variant(HeadGraphConfig(SiteConfig.ring(4)), fewest_heads=4),
    **{f"score-ring{k}": _score_ring(k) for k in (2, 3, 4)},
    **{f"score-ring{k}-eager": _score_ring(k, _force_eager) for k in (2, 3, 4)},
}


class TorchLayer(nn.Module):
    """The outside opponent, `torch.nn.TransformerEncoderLayer`, with the weights of a plain causal `EncoderLayer`."""

    def __init__(self, plain: EncoderLayer, size: Size) -> None:
        super().__init__()
        self.layer = own = nn.TransformerEncoderLayer(
            size.d_model, size.num_heads, 4 * size.d_model, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(size.length))
        attention, feed_forward = plain.attention.object, plain.feed_forward.object
        projections = (attention.query, attention.key, attention.value)
        with torch.no_grad():
            own.self_attn.in_proj_weight.copy_(torch.cat([linear.weight for linear in projections]))  # [3*M, M]
            own.self_attn.in_proj_bias.copy_(torch.cat([linear.bias for linear in projections]))  # [3*M]
        theirs = (own.self_attn.out_proj, own.norm1, own.norm2, own.linear1, own.linear2)
        ours = (attention.output, plain.attention.norm, plain.feed_forward.norm, feed_forward.inner, feed_forward.outer)
        for target, source in zip(theirs, ours, strict=True):
            target.load_state_dict(source.state_dict())

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """The whole block, `[B, T, M]`."""
        return (self.layer(x, src_mask=self.mask, is_causal=True),)

    def attention(self, x: Tensor) -> tuple[Tensor]:
        """The attention sublayer alone, `[B, T, M]`."""
        y = self.layer.norm1(x)
        return (x + self.layer.self_attn(y, y, y, need_weights=False, attn_mask=self.mask, is_causal=True)[0],)


def build(name: str, size: Size) -> nn.Module:
    """Returns the causal layer of a variant, in float32 on the CPU, with the same weights for all."""
    variant = VARIANTS[name]
    # No rotary positions, as in torch's layer: the same cost in every form, they would flatter the ratios.
    config = TransformerConfig(1, size.d_model, size.num_heads, d_ff=4 * size.d_model, positions="learned")
    torch.manual_seed(0)
    plain = EncoderLayer(config, causal=True)
    if name == "torch":
        return TorchLayer(plain, size)
    layer = EncoderLayer(replace(config, head_graph=variant.head_graph), causal=True)
    layer.load_state_dict(plain.state_dict(), strict=False)
    for key, parameter in layer.named_parameters():
        if ".edges." in key:
            nn.init.normal_(parameter, std=0.02)
    variant.change(layer.attention.object)
    return layer


class Step:
    """One call to be measured: a part of a layer, forward or forward+backward, on inputs all forms share."""

    def __init__(self, layer: nn.Module, part: str, passes: str, x: Tensor, grad: Tensor) -> None:
        self.layer, self.x, self.grad, self.backward = layer, x, grad, passes != "forward"
        self.function = layer.attention if part == "attention" else layer

    def __call__(self) -> None:
        with torch.set_grad_enabled(self.backward):
            y = self.function(self.x)[0]
        if self.backward:
            y.backward(self.grad)
        if self.x.is_cuda:
            torch.cuda.synchronize(self.x.device)

    def seconds(self) -> float:
        """Runs once and returns the wall-clock time, the device's work included."""
        self._prepare()
        start = time.perf_counter()
        self()
        return time.perf_counter() - start

    def peak_bytes(self) -> int:
        """Runs once and returns the peak of allocated bytes above those live before."""
        self._prepare()
        if not self.x.is_cuda:
            return cpu_peak(self)
        torch.cuda.reset_peak_memory_stats(self.x.device)
        before = torch.cuda.memory_allocated(self.x.device)
        self()
        return torch.cuda.max_memory_allocated(self.x.device) - before

    def _prepare(self) -> None:
        self.layer.train(self.backward)
        self.x.grad = None
        self.layer.zero_grad(set_to_none=True)


def cpu_peak(function: Callable[[], object]) -> int:
    """Returns the most bytes the CPU allocator held for `function` at a time, from the profiler's memory events."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    return max(accumulate((event["args"]["Bytes"] for event in memory), initial=0))


def ratios(seconds: list[float], plain: list[float]) -> list[float]:
    """Returns the lower quartile, median and upper quartile of the per-round ratios."""
    per_round = [own / other for own, other in zip(seconds, plain, strict=True)]
    return statistics.quantiles(per_round, n=4, method="inclusive")


def interleaved(steps: dict[str, Step], repeats: int, progress: tqdm) -> dict[str, list[float]]:
    """Returns the seconds of each step in each round; a round runs all once in an order of its own."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(-WARM_UP, repeats):
        for name in random.Random(index).sample(list(steps), len(steps)):
            seconds[name].append(steps[name].seconds())
            progress.update()
    return {name: found[WARM_UP:] for name, found in seconds.items()}


def compare(size: Size, names: list[str], arguments: argparse.Namespace, progress: tqdm) -> list[dict]:
    """Returns one row of measurements for each part and variant of a size."""
    place = {"device": arguments.device, "dtype": DTYPES[arguments.dtype]}
    layers = {name: build(name, size).to(**place) for name in names}
    torch.manual_seed(1)
    x, grad = torch.randn(2, size.batch, size.length, size.d_model, **place)  # [B, T, M] each
    x.requires_grad_()
    rows = []
    for part in PARTS:
        found = {name: {"size": size._asdict(), "part": part, "variant": name} for name in names}
        for passes in PASSES:
            progress.set_description(f"{size.d_model}/{size.num_heads} {part} {passes}")
            steps = {name: Step(layer, part, passes, x, grad) for name, layer in layers.items()}
            seconds = interleaved(steps, arguments.repeats, progress)
            for name, row in found.items():
                row[passes] = {"seconds": seconds[name], "ratio": ratios(seconds[name], seconds["plain"])}
        for name, row in found.items():
            row["peak_bytes"] = steps[name].peak_bytes()
        rows += found.values()
    return rows


def table(rows: list[dict]) -> str:
    """Returns the aligned Markdown table of one size and part; the first row is plain."""
    size = ", ".join(f"{name} {value}" for name, value in rows[0]["size"].items())
    ratio = "to plain (quartiles)"
    lines = [["", PASSES[0], ratio, PASSES[1], ratio, "peak memory", "to plain"]]
    for row in rows:
        cells = [row["variant"]]
        for passes in PASSES:
            low, median, high = row[passes]["ratio"]
            milliseconds = statistics.median(row[passes]["seconds"]) * 1e3
            cells += [f"{milliseconds:.2f} ms", f"{median:.3f} ({low:.3f}-{high:.3f})"]
        memory = row["peak_bytes"]
        lines.append([*cells, f"{memory / 2**20:.1f} MiB", f"{memory / rows[0]['peak_bytes']:.3f}"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    signs = "<" + ">" * len(widths[1:])
    aligned = ([f"{c:{s}{w}}" for c, s, w in zip(cells, signs, widths, strict=True)] for cells in lines)
    return f"**{rows[0]['part']}**, {size}\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in aligned)


def machine(arguments: argparse.Namespace) -> str:
    """Returns the line that says where and how the numbers were taken."""
    device = platform.processor() or platform.machine()
    if arguments.device.startswith("cuda"):
        device = torch.cuda.get_device_name(arguments.device)
    elif Path("/proc/cpuinfo").exists():
        found = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        device = found[0].partition(":")[2].strip() if found else device
    malloc = "".join(f", {name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_"))
    settings = f"{arguments.dtype}, {arguments.repeats} interleaved rounds{malloc}"
    return f"{device}, {arguments.threads} CPU threads, torch {torch.__version__}, {settings}"


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", metavar="SIZE", help=f"default: {' '.join(DEFAULT_SIZES)}")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help=f"of {' '.join(VARIANTS)}; plain is always run")
    parser.add_argument("--repeats", type=int, help="rounds (default: 20, 2 with --smoke)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="default: %(default)s")
    parser.add_argument("--smoke", action="store_true", help="a tiny size, to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the printed tables")
    return parser


def _size(text: str, names: list[str]) -> Size:
    numbers = [int(part) if part.isdecimal() else 0 for part in text.split("/")]
    if len(numbers) != 4 or min(numbers) < 1 or numbers[0] % numbers[1]:
        raise ValueError(
            f"Expected d_model/heads/length/batch, heads dividing d_model (got {text!r}). Do pass e.g. 512/8/512/2."
        )
    for name in names:
        if numbers[1] < (heads := VARIANTS[name].fewest_heads):
            raise ValueError(f"Expected at least {heads} heads for {name} (got {text!r}). Do leave it out with --only.")
    return Size(*numbers)


def _checked(arguments: argparse.Namespace) -> tuple[list[Size], list[str]]:
    """Fills in the defaults and returns sizes and variants; everything is checked before anything is measured."""
    if unknown := sorted(set(arguments.only or ()) - set(VARIANTS)):
        raise ValueError(f"Expected variants of {list(VARIANTS)} (got {unknown}). Do choose among them.")
    arguments.repeats = (2 if arguments.smoke else 20) if arguments.repeats is None else arguments.repeats
    for name, low in (("repeats", 2), ("threads", 1)):
        if getattr(arguments, name) < low:
            raise ValueError(f"Expected --{name} of at least {low} (got {getattr(arguments, name)}). Do raise it.")
    devices = ["cpu", "cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    devices = devices if torch.cuda.is_available() else ["cpu"]
    if arguments.device not in devices:
        raise ValueError(f"Expected --device of {devices} (got {arguments.device!r}). Do choose one of them.")
    for path in filter(None, (arguments.json, arguments.markdown)):
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ValueError(f"Expected a file that can be written (got {path}). Do choose another.")
    names = [name for name in VARIANTS if name == "plain" or name in (arguments.only or VARIANTS)]
    texts = arguments.sizes or (SMOKE_SIZES if arguments.smoke else DEFAULT_SIZES)
    return [_size(text, names) for text in texts], names


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    # Or the profiler writes lines of its own between the tables.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    threads = torch.get_num_threads()
    gc.disable()
    try:
        return run(_parser(), benchmark, argv)
    finally:
        gc.enable()
        torch.set_num_threads(threads)


def benchmark(arguments: argparse.Namespace) -> None:
    """Measures and prints the tables."""
    sizes, names = _checked(arguments)
    torch.set_num_threads(arguments.threads)
    texts, rows = [machine(arguments)], []
    total = len(sizes) * len(PARTS) * len(PASSES) * len(names) * (arguments.repeats + WARM_UP)
    print(texts[0])
    with tqdm(total=total, unit="call") as progress:
        for size in sizes:
            found = compare(size, names, arguments, progress)
            texts += [table([row for row in found if row["part"] == part]) for part in PARTS]
            progress.write("\n" + "\n\n".join(texts[-len(PARTS) :]))
            rows += found
            gc.collect()
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": texts[0], "rows": rows}, indent=2) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text("\n\n".join(texts) + "\n")


if __name__ == "__main__":
    sys.exit(main())
