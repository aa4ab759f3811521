"""What a step of every form costs, counted and not timed: equal on every run, however busy the machine is.

Counted are calls of torch's operators, floating-point operations of their products (not those inside torch's own
attention on a CPU), bytes that they allocate, and the largest allocation: a form that copies caches, or leaves its
tiles for whole maps, is seen there. `block` is a causal block in training (forward and backward) on 256 tokens, `block
of` one of more heads or tokens,
`decode` adds one token to 255 cached ones, in our block, in our language model and in a converted Llama. The budgets
that the tests hold are `tools/benchmarks/budgets.json`:

    python tools/benchmark.py counts --json tools/benchmarks/budgets.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.backbones import BACKBONES, Case
from benchmarks.convert import VARIANTS as CONVERTED
from benchmarks.convert import Decode as DecodeModel
from benchmarks.convert import converted
from benchmarks.decoding import attention_of
from benchmarks.forms import Size, build
from benchmarks.speed import Decode, Step
from gohgraph.common.files import write_text_whole
from gohgraph.common.tables import markdown_table

# Heads of 32: sparse graphs of narrower ones do not run in tiles.
SIZE = Size(d_model=256, num_heads=8, length=256, batch=1)
# Of more edges a token than a feed-forward has numbers; and of more keys than a tile's rows hold in a cache.
MANY = {"64 heads": Size(d_model=256, num_heads=64, length=256, batch=1)}
LONG = {"2,048 tokens": Size(d_model=128, num_heads=4, length=2048, batch=1)}
CASE = Case(d_model=256, num_heads=8, num_layers=2, tokens=1, batch=1, past=255)
BUDGETS = Path(__file__).with_name("budgets.json")
TRAINED = (
    "plain", "output", "output-ring4", "score-ring2", "score-ring2-wide", "score-complete", "score-complete-eager",
    "talking-heads",
)  # fmt: skip
OF_MANY_HEADS = ("plain", "output", "output-ring4", "score-complete")
TRAINED_ELSEWHERE = [
    *((place, size, name) for place, size in MANY.items() for name in OF_MANY_HEADS),
    *((place, size, "score-ring2") for place, size in LONG.items()),
]
DECODED = ("plain", "output", "score-ring2", "score-complete", "talking-heads", "moh-50")


class Counts(NamedTuple):
    """What a step costs: operator calls, FLOPs of products, bytes allocated, and the most bytes of one allocation."""

    calls: int
    flops: int
    bytes: int
    largest: int


class Counter(TorchDispatchMode):
    """Counts what torch's operators do within, forward and backward.

    Example:
        >>> with Counter() as counter:
        ...     _ = torch.ones(5, 3) @ torch.ones(3, 2)
        >>> counter.counts
        Counts(calls=3, flops=60, bytes=124, largest=60)
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts(0, 0, 0, 0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = {_place(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = function(*args, **kwargs)
        made = {_place(x): x.untyped_storage().nbytes() for x in tree_leaves(result) if isinstance(x, Tensor)}
        new = [size for place, size in made.items() if place not in known]
        count = flop_registry.get(getattr(function, "overloadpacket", None))
        calls, flops, allocated, largest = self.counts
        self.counts = Counts(
            calls + 1,
            flops + (0 if count is None else count(*args, **kwargs, out_val=result)),
            allocated + sum(new),
            max([largest, *new]),
        )
        return result


def counted(call: Callable[[], object]) -> Counts:
    """Returns what a call costs; the first one may make what stays."""
    call()
    with Counter() as counter:
        call()
    return counter.counts


def trained(name: str, form: str | None = None, size: Size = SIZE) -> Counts:
    """Counts a training step of a block; `form` asks for one of attention, by its name."""
    layer = _built(name, form, size)
    x, grad = torch.randn(2, size.batch, size.length, size.d_model)  # [B, T, M] each
    return _counted_step(Step(layer, "block", "forward+backward", x.requires_grad_(), grad))


def decoded(name: str, form: str | None = None) -> Counts:
    """Counts the step of a block that adds one token to its cache."""
    layer = _built(name, form, SIZE)
    return _counted_step(Decode(layer, "block", torch.randn(SIZE.batch, SIZE.length, SIZE.d_model)))


def _built(name: str, form: str | None, size: Size) -> nn.Module:
    layer = build(name, size)
    if form is not None:
        attention_of(layer).form = form
    return layer


def decoded_by_model(backbone: str, variant: str) -> Counts:
    """Counts the step of a whole model that adds one token to its caches."""
    torch.manual_seed(0)
    model = converted(BACKBONES[backbone].build(CASE), CONVERTED[variant])
    return _counted_step(DecodeModel(BACKBONES[backbone], model, torch.zeros(1, 1, dtype=torch.long), CASE.past))


def all_counts() -> dict[str, Counts]:
    """Returns what every form costs, by what is done and its name."""
    counts = {f"block, {name}": trained(name) for name in TRAINED}
    counts |= {f"block of {place}, {name}": trained(name, size=size) for place, size, name in TRAINED_ELSEWHERE}
    counts |= {f"decode, {name}": decoded(name) for name in DECODED}
    models = [(backbone, variant) for backbone in BACKBONES for variant in CONVERTED]
    return counts | {f"decode, {', '.join(names)}": decoded_by_model(*names) for names in models}


def budgets() -> dict[str, Counts]:
    """Returns the stored budgets."""
    return {name: Counts(**values) for name, values in json.loads(BUDGETS.read_text()).items()}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"write the counts, as budgets: {BUDGETS.name}")


def run(flags: argparse.Namespace) -> None:
    """Counts every form and prints the table."""
    found = all_counts()
    lines = [["", "calls", "MFLOP", "KiB allocated", "KiB at once"]]
    for name, (calls, flops, allocated, largest) in found.items():
        lines.append([name, str(calls), f"{flops / 1e6:.2f}", f"{allocated / 1024:.0f}", f"{largest / 1024:.0f}"])
    print(markdown_table(lines, f"**one step**, block {SIZE._asdict()}, model {CASE._asdict()}"))
    if flags.json:
        text = json.dumps({name: counts._asdict() for name, counts in found.items()}, indent=1)
        write_text_whole(flags.json, text + "\n")


def _counted_step(step: Any) -> Counts:
    def once() -> None:
        step.prepare()
        step.work()

    return counted(once)


def _place(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
