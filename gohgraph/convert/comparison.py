"""One forward pass before and after a conversion: new head graphs change nothing.

In the pass after it every attention module is compared with itself on the very inputs it had before: where its output
has been compared, the one from before goes on. So rounding does not add up over layers, and a difference names its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gohgraph.convert.blocks import SLOTS, Block, slots_at
from gohgraph.convert.example_inputs import example_inputs
from gohgraph.convert.trial_runs import is_on_meta, quietly

# By the bits of a number: rounding in other kernels is below, a mask or a scale gone wrong far above.
TOLERANCES = {torch.float64: 1e-7, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
ON_META = "weights on meta compute nothing"
Outputs = dict[str, list[Tensor]]


class Comparison:
    """What attention modules compute on example inputs, kept to be compared after a conversion.

    Args:
        model: before the conversion.
        blocks: that are to be converted.
        parts: models inside it that run on inputs of their own, by name.
        example: inputs of the first part, or of the model where there is none.

    Attributes:
        unchecked: names of blocks that no forward pass reaches, with the reason.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[Block], parts: dict[str, nn.Module], example: dict[str, Any] | None
    ) -> None:
        self.model, self.blocks = model, {block.name: block for block in blocks}
        self.unchecked: dict[str, str] = {}
        if not parts and example is not None and not is_on_meta(model):
            parts = {"": model}
        self.passes: list[tuple[nn.Module, dict[str, Any]]] = []
        for name, part in parts.items():
            inside = [block for block in self.blocks if f"{block}.".startswith(f"{name}." if name else "")]
            if inside and is_on_meta(part):
                self.unchecked |= dict.fromkeys(inside, ON_META)
            elif inside:
                self.passes.append((part, example_inputs(part) if example is None else example))
        self.alone = {}
        for name, block in self.blocks.items():
            if block.inputs is not None and is_on_meta(model.get_submodule(name)):
                self.unchecked[name] = ON_META
            elif block.inputs is not None and any(p.is_meta for p in model.get_submodule(name).parameters()):
                self.unchecked[name] = "torch's own module does not run with offloaded weights"
            elif block.inputs is not None:
                self.alone[name] = block.inputs()
        self.before, self.results = self._run(None)
        for name in self.blocks:
            if name not in self.before:
                self.unchecked.setdefault(name, "pass the inputs of one forward pass as example={...} to compare it")

    def check(self) -> None:
        """Runs the converted model; `ValueError` names the attention module that computes something else now."""
        if not self.passes and not self.alone:
            return
        with _neutral(self.model, self.blocks.values()):
            _, results = self._run(self._compare)
        for (part, _), before, after in zip(self.passes, self.results, results, strict=True):
            if not all(map(_close, before, after)):
                raise ValueError(
                    f"Expected {type(part).__name__} to compute what it did before it was converted (got something "
                    "else, though its attention does). Do leave out some of it by where=."
                )

    def _run(self, compare: Callable[[str, int, Tensor], Tensor] | None) -> tuple[Outputs, list[list[Tensor]]]:
        seen: Outputs = {}

        def take(name: str, output: Any) -> Any:
            first = output[0] if isinstance(output, (tuple, list)) else output
            if not isinstance(first, Tensor):
                return output
            calls = seen.setdefault(name, [])
            calls.append(first.clone())
            if compare is None:
                return output
            return _with_first(output, compare(name, len(calls) - 1, first))

        with ExitStack() as hooks:
            hooks.enter_context(quietly(self.model))
            for name in self.blocks:
                module = self.model.get_submodule(name)
                hooks.enter_context(module.register_forward_hook(lambda m, a, output, name=name: take(name, output)))
            # A copy, since a pass may write into a cache that it was given.
            results = [list(tensors_in(part(**copy.deepcopy(inputs)))) for part, inputs in self.passes]
            for name, inputs in self.alone.items():
                # Past the hooks: a user's are not to see tokens that are not theirs.
                take(name, self.model.get_submodule(name).forward(*inputs))
        return seen, results

    def _compare(self, name: str, call: int, after: Tensor) -> Tensor:
        before = next(iter(self.before.get(name, [])[call:]), None)
        if before is None or not _close(before, after):
            raise ValueError(
                f"Expected {name} to compute what it did before it was converted (got outputs "
                f"{_size_of(before, after)}). Do leave it out by where=, or convert it with graphs at outputs alone."
            )
        return before


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yields the floating tensors of a model's output."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from tensors_in(one)
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from tensors_in(one)


def _with_first(output: Any, first: Tensor) -> Any:
    if isinstance(output, Tensor):
        return first
    if hasattr(output, "_fields"):
        return output._replace(**{output._fields[0]: first})
    return type(output)((first, *output[1:]))


def _close(before: Tensor, after: Tensor) -> bool:
    if before.shape != after.shape or before.dtype != after.dtype:
        return False
    tolerance = TOLERANCES.get(before.dtype, 1e-4)
    finite = before[before.isfinite()]
    size = finite.abs().max().item() if finite.numel() else 0.0
    return torch.allclose(after, before, rtol=0, atol=tolerance * max(size, 1e-6), equal_nan=True)


@contextmanager
def _neutral(model: nn.Module, blocks: Iterable[Block]) -> Iterator[None]:
    """Without routers, and without graphs that are not neutral at the start: these change what a model computes."""
    taken = []
    try:
        for block in blocks:
            slots = slots_at(model, block.name)
            for name in SLOTS:
                slot = getattr(slots, name)
                if slot is not None and (name == "router" or not _is_neutral(slot, block, name)):
                    taken.append((slots, name, slot))
                    setattr(slots, name, None)
        yield
    finally:
        for slots, name, slot in taken:
            setattr(slots, name, slot)


@torch.no_grad()
def _is_neutral(graph: nn.Module, block: Block, slot: str) -> bool:
    """Whether a graph gives its nodes back: heads with features at outputs, maps over five keys at scores."""
    features = block.head_dim if slot == "output_graph" else 5
    weight = next(graph.parameters(), block.weight_like)
    with torch.random.fork_rng(devices=[]):
        nodes = torch.randn(2, 3, block.num_heads, features, device="cpu").to(weight.device, weight.dtype)
        context = torch.randn(2, 3, block.d_model, device="cpu").to(nodes)
    return _close(nodes, graph(nodes, context))


def _size_of(before: Tensor | None, after: Tensor) -> str:
    if before is None or before.shape != after.shape:
        return f"of shape {list(after.shape)}"
    return f"off by {(before - after).abs().max().item():.3g}"
