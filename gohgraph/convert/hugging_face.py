"""Finds the attention of Hugging Face transformers: one forward pass shows which modules call it by the interface."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gohgraph.attention.call import Core
from gohgraph.convert.attention_interface import (
    CHILD,
    HeadGraphs,
    attach,
    base_of,
    detach,
    implementations,
    switch_off,
    switch_on,
)
from gohgraph.convert.blocks import Block, Search
from gohgraph.convert.example_inputs import example_inputs

MINIMUM = (5, 0)


class Call(NamedTuple):
    """What an attention module handed over: its input, queries, values, head outputs, and the attention beneath."""

    x: Any
    q: Tensor
    v: Tensor
    z: Tensor
    core: Core


class Observer:
    """Stands where head graphs would and notes what an attention module hands them."""

    def __init__(self, name: str, calls: dict[str, Call]) -> None:
        self.name, self.calls = name, calls

    def __call__(
        self, x: Any, q: Tensor, k: Tensor, v: Tensor, core: Core, mask: Any, options: dict[str, Any]
    ) -> tuple[Tensor, Any]:
        """Attends as ever and keeps x, q, v and the outputs."""
        z, weights = core.attend(q, k, v, options.get("scaling"), False)
        z = z.contiguous()
        self.calls[self.name] = Call(x, q, v, z, core)
        return z, weights


def find(model: nn.Module, search: Search, example: dict[str, Any] | None) -> None:
    """Adds every attention module of transformers that calls its attention by the interface."""
    for prefix, part in transformers_models(model):
        _check_version()
        calls, projections = observe(part, example)
        for name, call in calls.items():
            full = ".".join(filter(None, (prefix, name)))
            module = part.get_submodule(name)
            if reason := _reason(module, call):
                search.skipped[full] = reason
                continue
            search.add(_block(full, part, module, call, projections.get(name)))


def transformers_models(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the outermost transformers models inside a model, with their names."""
    library = sys.modules.get("transformers.modeling_utils")
    found: list[str] = []
    for name, module in model.named_modules() if library else ():
        if isinstance(module, library.PreTrainedModel) and not any(f"{name}.".startswith(outer) for outer in found):
            found.append(f"{name}." if name else "")
            yield name, module


def observe(
    model: nn.Module, example: dict[str, Any] | None
) -> tuple[dict[str, Call], dict[str, nn.Module]]:
    """Runs one forward pass; returns what every attention module handed over, and its output projection."""
    calls: dict[str, Call] = {}
    projections: dict[str, nn.Module] = {}

    def find_reader(module: nn.Module, args: tuple[Any, ...]) -> None:
        # A view of the outputs of heads has their address.
        for name, call in calls.items():
            if args and isinstance(args[0], Tensor) and args[0].data_ptr() == call.z.data_ptr():
                projections.setdefault(name, module)

    candidates = {
        name: module
        for name, module in model.named_modules()
        if hasattr(getattr(module, "config", None), "_attn_implementation_internal") and not hasattr(module, CHILD)
        and not hasattr(module, "main_input_name")
    }
    hooks = [
        module.register_forward_pre_hook(find_reader)
        for module in model.modules()
        if getattr(getattr(module, "weight", None), "dim", lambda: 0)() == 2 and not isinstance(module, nn.Embedding)
    ]
    try:
        for name, module in candidates.items():
            attach(module, Observer(name, calls), required=False)
        switch_on(model)
        with _quietly(model):
            _run(model, example)
    finally:
        switch_off(model)
        for module in candidates.values():
            if hasattr(module, CHILD):
                detach(module)
        for hook in hooks:
            hook.remove()
    return calls, projections


def undo(model: nn.Module) -> None:
    """Takes all head graphs out and gives the attention implementations their names back."""
    for module in list(model.modules()):
        if isinstance(getattr(module, CHILD, None), HeadGraphs):
            detach(module)
    if implementations(model):
        switch_off(model)


def _block(
    name: str, model: nn.Module, module: nn.Module, call: Call, projection: nn.Module | None
) -> Block:
    x, q, v, z, core = call
    like = next((p for p in module.parameters() if p.is_floating_point()), x)
    no_scores = "" if q.shape[-1] == v.shape[-1] else "queries and values of unequal widths"
    attaching = partial(_attach, model, module, q.shape[2])
    return Block(name, q.shape[2], z.shape[-1], x.shape[-1], like, projection, attaching, no_scores, ("whole",), core)


def _attach(model: nn.Module, module: nn.Module, num_heads: int, **slots: nn.Module | None) -> None:
    attach(module, HeadGraphs(num_heads, **slots))
    switch_on(model)


def _reason(module: nn.Module, call: Call) -> str:
    x, q, _, z, _ = call
    if not isinstance(x, Tensor) or x.shape[:-1] != z.shape[:2]:
        return "its first argument is not the hidden states of its queries"
    if getattr(module, "reorder_and_upcast_attn", False) and base_of(module.config) == "eager":
        return "reorder_and_upcast_attn, which only eager attention without the interface does"
    return "" if q.shape[2] == z.shape[2] else "its attention does not keep the heads of its queries"


def _run(model: nn.Module, example: dict[str, Any] | None) -> None:
    inputs = example_inputs(model) if example is None else example
    try:
        model(**inputs)
    except Exception as error:
        raise ValueError(
            f"Expected a model that runs on {sorted(inputs)} (got {type(error).__name__}: {error}). Do pass the inputs "
            "of one forward pass as example={...}."
        ) from error


@contextmanager
def _quietly(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, and the random state left as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _check_version() -> None:
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < MINIMUM:
        raise ImportError(
            f"Expected transformers >= 5.0 (got {transformers.__version__}). Do pip install 'gohgraph[hf]'."
        )
