"""Time and memory of head graphs against plain attention: one table per size and part, as ratios to plain.

A size is d_model/heads/length/batch. Timed are two parts, causal, without dropout: `attention` (norm, attention,
residual) and `block` (that and the feed-forward). All forms have the weights of the plain one; edges are random, not
zero. moh-50 is Mixture-of-Head attention with 50 % active heads, moh-50-all the same computed for all heads. Forward
runs in eval mode without gradients; forward+backward gives gradients of input and weights. Each round runs every form
once, in shuffled order, and gives one ratio to plain; shown are their median and quartiles.

Peak memory is that of forward+backward above what was live before, gradients included: on CUDA
`max_memory_allocated`, on CPU the running sum of the allocations and frees that `torch.profiler` records.

On Linux CPUs, malloc may return large score maps (eager) to the system after a call, or not, by what ran before: tens
of milliseconds. MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000 keep them; the header shows both.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gohgraph.benchmarks.decoding import budget
from gohgraph.benchmarks.flags import add_shared_flags, check_shared_flags, numbers_of, place
from gohgraph.benchmarks.timing import WARM_UP, Call, interleaved, markdown_table, ratios
from gohgraph.config import TransformerConfig
from gohgraph.fold import fold
from gohgraph.graph_config import HeadGraphConfig
from gohgraph.site_config import SiteConfig
from gohgraph.stacks import EncoderLayer

DEFAULT_SIZES = ("512/8/512/2", "1024/16/256/2", "256/8/1024/2")
SMOKE_SIZES = ("32/4/24/2",)
PARTS, PASSES = ("attention", "block"), ("forward", "forward+backward")
REPEATS = 20


class Size(NamedTuple):
    """What is measured: M, H, T and B."""

    d_model: int
    num_heads: int
    length: int
    batch: int


@dataclass(frozen=True)
class Variant:
    """One form of attention.

    Args:
        head_graph: its graphs.
        change: applied to its `MultiHeadAttention` once the edges have their weights.
        fewest_heads: of a size that can be measured.
        active: percentage of heads that work for a token, under a router; `None` for no router.
    """

    head_graph: HeadGraphConfig | None = None
    change: Callable[[nn.Module], object] = lambda attention: None
    fewest_heads: int = 1
    active: int | None = None


def _force_eager(attention: nn.Module) -> None:
    attention.wide = None


def _force_all_heads(attention: nn.Module) -> None:
    attention.skip = False


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
    **{f"moh-{percent}": Variant(fewest_heads=4, active=percent) for percent in (75, 50, 25)},
    "moh-50-all": Variant(None, _force_all_heads, fewest_heads=4, active=50),
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
    """Returns the causal layer of a variant, in float32 on the CPU, with the same weights for all.

    Example:
        >>> build("output", Size(d_model=12, num_heads=4, length=5, batch=2)).attention.object.output_graph.num_heads
        4
    """
    variant = VARIANTS[name]
    # No rotary positions, as in torch's layer: the same cost in every form, they would flatter the ratios.
    config = TransformerConfig(1, size.d_model, size.num_heads, d_ff=4 * size.d_model, positions="learned")
    torch.manual_seed(0)
    plain = EncoderLayer(config, causal=True)
    if name == "torch":
        return TorchLayer(plain, size)
    graphs = variant.head_graph
    if variant.active is not None:
        graphs = HeadGraphConfig(outputs=None, routing=budget(size.num_heads, variant.active))
    layer = EncoderLayer(replace(config, head_graph=graphs, num_layers=1), causal=True)
    layer.load_state_dict(plain.state_dict(), strict=False)
    for key, parameter in layer.named_parameters():
        if ".edges." in key or ".router." in key:
            nn.init.normal_(parameter, std=0.02)
    variant.change(layer.attention.object)
    return layer


class Step(Call):
    """One call to be measured: a part of a layer, forward or forward+backward, on inputs all forms share."""

    def __init__(self, layer: nn.Module, part: str, passes: str, x: Tensor, grad: Tensor) -> None:
        super().__init__(x.device)
        self.layer, self.x, self.grad, self.backward = layer, x, grad, passes != "forward"
        self.function = layer.attention if part == "attention" else layer

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


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    parser.add_argument("--sizes", nargs="+", metavar="SIZE", help=f"default: {' '.join(DEFAULT_SIZES)}")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help=f"of {' '.join(VARIANTS)}; plain is always run")
    add_shared_flags(parser, REPEATS)


def cases(flags: argparse.Namespace) -> list[Size]:
    """Fills in the defaults of `flags`, its variants `only` among them, and returns the sizes to measure.

    Raises:
        ValueError: a flag that cannot be measured.
    """
    if unknown := sorted(set(flags.only or ()) - set(VARIANTS)):
        raise ValueError(f"Expected variants of {list(VARIANTS)} (got {unknown}). Do choose among them.")
    check_shared_flags(flags, REPEATS)
    flags.only = [name for name in VARIANTS if name == "plain" or name in (flags.only or VARIANTS)]
    return [_size(text, flags.only) for text in flags.sizes or (SMOKE_SIZES if flags.smoke else DEFAULT_SIZES)]


def calls(size: Size, flags: argparse.Namespace) -> int:
    """Returns how many calls `measure` times."""
    return len(PARTS) * len(PASSES) * len(flags.only) * (flags.repeats + WARM_UP)


def measure(size: Size, flags: argparse.Namespace, progress: tqdm) -> list[dict]:
    """Returns one row of measurements for each part and variant of a size."""
    names = flags.only
    layers = {name: build(name, size).to(**place(flags)) for name in names}
    torch.manual_seed(1)
    x, grad = torch.randn(2, size.batch, size.length, size.d_model, **place(flags))  # [B, T, M] each
    x.requires_grad_()
    rows = []
    for part in PARTS:
        found = {name: {"size": size._asdict(), "part": part, "variant": name} for name in names}
        for passes in PASSES:
            progress.set_description(f"{size.d_model}/{size.num_heads} {part} {passes}")
            steps = {name: Step(layer, part, passes, x, grad) for name, layer in layers.items()}
            seconds = interleaved(steps, flags.repeats, progress)
            for name, row in found.items():
                row[passes] = {"seconds": seconds[name], "ratio": ratios(seconds[name], seconds["plain"])}
        for name, row in found.items():
            row["peak_bytes"] = steps[name].peak_bytes()
        rows += found.values()
    return rows


def tables(rows: list[dict]) -> list[str]:
    """Returns a Markdown table for each part of a size, from the rows of `measure`; the first row of each is plain."""
    return [_table([row for row in rows if row["part"] == part]) for part in PARTS]


def _table(rows: list[dict]) -> str:
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
    return markdown_table(f"**{rows[0]['part']}**, {size}", lines)


def _size(text: str, names: list[str]) -> Size:
    size = Size(*numbers_of(text, "d_model/heads/length/batch", "512/8/512/2"))
    for name in names:
        if size.num_heads < (heads := VARIANTS[name].fewest_heads):
            raise ValueError(f"Expected at least {heads} heads for {name} (got {text!r}). Do leave it out with --only.")
    return size
