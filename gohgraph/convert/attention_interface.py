"""Head graphs inside the attention functions of Hugging Face transformers.

transformers calls attention by a name, `config._attn_implementation`. A converted model has a name of its own for the
implementation it had (`gohgraph_sdpa` for `sdpa`, and so on for eager, flash and flex attention), under which both the
attention function and its mask are registered; the function calls the one beneath between the two sites. The hidden
states are handed over by a hook on the attention module.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gohgraph.attention.routing import Routing
from gohgraph.attention.slots import HeadSites

PREFIX = "gohgraph_"
CHILD, CONTEXT, HOOKS = "head_graphs", "_head_graph_context", "_head_graph_hooks"
# What the attention function beneath does: q, k, v `[B, H, T, D]` to outputs `[B, T, H, D]` and weights or None.
Attend = Callable[..., tuple[Tensor, Any]]


class HeadGraphs(HeadSites):
    """The head graphs of one attention module of transformers, which calls them by its attention function.

    Score graphs of any in-degree run as wider heads on the attention function beneath, be it eager, sdpa or flash:
    masks, caches and position biases stay its own.

    Args:
        num_heads, **slots: as in `HeadSites`.

    Shape:
        q `[B, H, T, D]`, x `[B, T, M]`, k, v `[B, G, S, D]` -> outputs `[B, T, H, D]`.
    """

    def forward(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, attend: Attend, scaling: float | None = None
    ) -> tuple[Tensor, Any]:
        """Attends by `attend(q, k, v, scaling=, wide=)`, with messages before and after."""
        routing = self.route(x)
        if self.score_graph is None:
            z, weights = attend(q, k, v, scaling=scaling, wide=False)
        else:
            scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
            wide = self._widen(*(heads.transpose(1, 2) for heads in (q, k, v)), x, routing)  # [B, T, H, k*D] each
            wide_z, weights = attend(*(heads.transpose(1, 2) for heads in wide), scaling=scaling, wide=True)
            z = wide_z[..., : v.shape[-1]]  # [B, T, H, D]
        return self.pass_messages(z, x, routing), weights

    def _widen(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, routing: Routing | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.wide is not None:
            return self.wide.widen(q, k, v, self.score_weights(x, routing))
        # Every head receives from all: the map of all rounds, its rows the heads' weights of their senders.
        eye = torch.eye(self.num_heads, dtype=q.dtype, device=q.device).expand(*x.shape[:-1], -1, -1)  # [B, T, H, H]
        mixing = self.mixing(x, routing)(eye)  # [B, T, H, H]
        groups, width = self.num_heads // k.shape[2], self.num_heads * q.shape[-1]
        k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)  # [B, S, H, D]
        wide_q = (mixing.unsqueeze(-1) * q.unsqueeze(2)).flatten(-2)  # [B, T, H, H*D]
        wide_k = k.flatten(-2).unsqueeze(2).expand(-1, -1, self.num_heads, -1)  # [B, S, H, H*D]
        return wide_q, wide_k, F.pad(v, (0, width - v.shape[-1]))


def graph_attention(
    base: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, Any]:
    """The attention function a converted model calls: the base's, with the module's head graphs around it."""
    function = base_function(module, base)
    graphs = getattr(module, CHILD, None)
    if graphs is None:
        return function(module, query, key, value, attention_mask, **options)
    x = getattr(module, CONTEXT)
    setattr(module, CONTEXT, None)
    scaling = options.pop("scaling", None)

    def attend(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, wide: bool) -> tuple[Tensor, Any]:
        known = options if scaling is None else {**options, "scaling": scaling}
        return function(seen_by(base, module, wide), q, k, v, attention_mask, **known)

    return graphs(x, query, key, value, attend, scaling)


def base_function(module: nn.Module, base: str) -> Callable[..., Any]:
    """Returns the attention function of that name for a module, its modelling file's own where there is one."""
    files = [sys.modules[kind.__module__] for kind in type(module).__mro__]
    file = next(file for file in files if hasattr(file, "ALL_ATTENTION_FUNCTIONS"))
    return file.eager_attention_forward if base == "eager" else file.ALL_ATTENTION_FUNCTIONS[base]


class Seen:
    """An object as another one sees it: some attributes are others, all else is its own."""

    def __init__(self, seen: Any, **others: Any) -> None:
        self.__dict__.update(others, _seen=seen)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_seen"], name)


def seen_by(base: str, module: nn.Module, wide: bool) -> Any:
    """Returns the module as the function beneath is to see it: one key head per query head, and its own name."""
    others: dict[str, Any] = {"num_key_value_groups": 1} if wide else {}
    # Flash attention looks its kernel up by the name.
    if base not in ("sdpa", "eager"):
        others["config"] = Seen(module.config, _attn_implementation=base)
    return Seen(module, **others) if others else module


def register(base: str) -> str:
    """Registers the attention function and the mask of a base implementation; returns the name of both."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    name = PREFIX + base
    AttentionInterface.register(name, partial(graph_attention, base))
    # Without one, padding and causality would be lost without a word.
    if base in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def base_of(config: Any) -> str:
    """Returns the implementation of a configuration, without our prefix; `None` stands for eager."""
    return (config._attn_implementation or "eager").removeprefix(PREFIX)


def implementations(model: nn.Module) -> dict[int, Any]:
    """Returns the transformers configurations inside a model by their identity."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return {id(config): config for config in configs if hasattr(config, "_attn_implementation_internal")}


def switch_on(model: nn.Module) -> None:
    """Lets a model call attention by our names."""
    for config in implementations(model).values():
        config._attn_implementation_internal = register(base_of(config))


def switch_off(model: nn.Module) -> None:
    """Lets a model call attention by the names it had."""
    for config in implementations(model).values():
        if (config._attn_implementation or "").startswith(PREFIX):
            config._attn_implementation_internal = base_of(config)


def attach(module: nn.Module, graphs: Any, *, required: bool = True) -> None:
    """Gives head graphs to a module, and their context before every call; `required`, that they were called after."""
    setattr(module, CHILD, graphs)
    hooks = [module.register_forward_pre_hook(_remember, with_kwargs=True)]
    if required:
        hooks.append(module.register_forward_hook(_check_called))
    setattr(module, HOOKS, hooks)


def detach(module: nn.Module) -> None:
    """Takes the head graphs of an attention module away."""
    for hook in module.__dict__.pop(HOOKS):
        hook.remove()
    delattr(module, CHILD)
    module.__dict__.pop(CONTEXT, None)


def hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Returns the first argument of an attention module, by place or name."""
    return args[0] if args else kwargs.get("hidden_states")


def _remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    setattr(module, CONTEXT, hidden_states(args, kwargs))


def _check_called(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if getattr(module, CONTEXT, None) is not None:
        setattr(module, CONTEXT, None)
        raise RuntimeError(
            f"Expected an attention implementation that calls the head graphs (got "
            f"{module.config._attn_implementation!r}, set after the conversion). Do unconvert the model, choose the "
            "implementation and convert it again."
        )
