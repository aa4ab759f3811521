"""Finds the attention of Hugging Face transformers: one forward pass shows which modules call it by the interface."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from gohgraph.attention.call import Core
from gohgraph.attention.slots import Slots
from gohgraph.convert.attention_interface import CHILD, HOOKS, HeadGraphs, attach, detach
from gohgraph.convert.blocks import Block, Search
from gohgraph.convert.example_inputs import example_inputs
from gohgraph.convert.trial_runs import quietly

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Below 5.19 saved models come back without their head graphs; 5.20 is the lowest that is tested.
MINIMUM = (5, 20)
FACTOR = 16.0


class Call(NamedTuple):
    """What an attention module handed over: its input, queries, values, head outputs, and the attention beneath.

    `scales`: whether that attention goes by the scale it is given.
    """

    x: Any
    q: Tensor
    v: Tensor
    z: Tensor
    core: Core
    scales: bool


class Observer:
    """Stands where head graphs would and notes what an attention module hands them."""

    def __init__(self, name: str, calls: dict[str, Call]) -> None:
        self.name, self.calls = name, calls

    def __call__(
        self, x: Any, q: Tensor, k: Tensor, v: Tensor, core: Core, mask: Any, options: dict[str, Any]
    ) -> tuple[Tensor, Any]:
        """Attends as ever and keeps x, q, v and the outputs."""
        scale = options.get("scaling")
        z, weights = core.attend(q, k, v, scale, False)
        z = z.contiguous()
        known = q.shape[-1] ** -0.5 if scale is None else scale
        # A power of two, exact in floats: whoever goes by the scale computes the very same.
        scaled, _ = core.attend(q * FACTOR, k, v, known / FACTOR, False)
        scales = z.is_meta or torch.allclose(scaled, z, rtol=1e-3, atol=1e-5, equal_nan=True)
        self.calls[self.name] = Call(x, q, v, z, core, scales)
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
            search.add(_block(full, call, module, projections.get(name)))


def transformers_models(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the outermost transformers models inside a model, with their names."""
    library = sys.modules.get("transformers.modeling_utils")
    prefixes: list[str] = []
    if library is None:
        return
    for name, module in model.named_modules():
        if isinstance(module, library.PreTrainedModel) and not any(f"{name}.".startswith(outer) for outer in prefixes):
            prefixes.append(f"{name}." if name else "")
            yield name, module


def observe(
    model: nn.Module, example: dict[str, Any] | None
) -> tuple[dict[str, Call], dict[str, nn.Module]]:
    """Runs one forward pass; returns what every attention module handed over, and its output projection."""
    calls: dict[str, Call] = {}
    projections: dict[str, nn.Module] = {}

    def find_reader(module: nn.Module, args: tuple[Any, ...]) -> None:
        # A view of the outputs of heads has their storage.
        read = storage_of(args[0]) if args and isinstance(args[0], Tensor) else None
        for name, call in calls.items():
            if read is not None and read == storage_of(call.z):
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
        with quietly(model):
            _run(model, example)
    finally:
        for module in candidates.values():
            if HOOKS in vars(module):
                detach(module)
        for hook in hooks:
            hook.remove()
    return calls, projections


def storage_of(x: Tensor) -> int:
    """Returns what tells storages apart, on meta too; 0 for tensors without one."""
    try:
        return x.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return 0


def undo(model: nn.Module) -> None:
    """Takes all head graphs out; PEFT may have wrapped them, so they are known by their hooks."""
    for module in model.modules():
        if HOOKS in vars(module) and hasattr(module, "config"):
            detach(module)


def _block(name: str, call: Call, module: nn.Module, projection: nn.Module | None) -> Block:
    x, q, v, z, core, scales = call
    no_scores = "" if q.shape[-1] == v.shape[-1] else "queries and values of unequal widths"
    no_scores = no_scores or ("" if scales else "its attention function does not go by the scale it is given")
    attaching = partial(give, module, q.shape[2])
    # The dtype and device it computes in, whatever its weights are quantised to or offloaded to.
    like = x.new_empty(0)
    return Block(name, q.shape[2], z.shape[-1], x.shape[-1], like, projection, attaching, no_scores, ("whole",), core)


def give(module: nn.Module, num_heads: int, **slots: Unpack[Slots]) -> None:
    """Gives head graphs to an attention module that calls its attention by the interface."""
    attach(module, HeadGraphs(num_heads, **slots))


def _reason(module: nn.Module, call: Call) -> str:
    x, q, z = call.x, call.q, call.z
    if not isinstance(x, Tensor) or x.shape[:-1] != z.shape[:2]:
        return "its first argument is not the hidden states of its queries"
    return "" if q.shape[2] == z.shape[2] else "its attention does not keep the heads of its queries"


def _run(model: nn.Module, example: dict[str, Any] | None) -> None:
    inputs = example_inputs(model) if example is None else example
    try:
        # A copy, since a pass may write into a cache that it was given.
        model(**copy.deepcopy(inputs))
    except Exception as error:
        raise ValueError(
            f"Expected a model that runs on {sorted(inputs)} (got {type(error).__name__}: {error}). Do pass the inputs "
            "of one forward pass as example={...}."
        ) from error


def _check_version() -> None:
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < MINIMUM:
        raise ImportError(
            f"Expected transformers >= 5.20 (got {transformers.__version__}). Do pip install 'gohgraph[hf]'."
        )
