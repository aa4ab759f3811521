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

from torch import Tensor, nn

from gohgraph.attention.call import NO_MASK, Core, Mask
from gohgraph.attention.slots import HeadSlots

PREFIX = "gohgraph_"
CHILD, CONTEXT, HOOKS = "head_graphs", "_head_graph_context", "_head_graph_hooks"
# The largest head size of the attention functions that have one.
WIDEST = {"flash_attention_2": 256, "flash_attention_3": 256, "flash_attention_4": 256}
# What an attention function is told beside the mask and changes nothing that the mask does not say.
TOLD_BY_MASK = {"dropout", "scaling", "is_causal", "sliding_window", "position_ids", "output_attentions", "use_cache"}
TOLD_BY_MASK |= {"cache_position", "output_hidden_states", "return_dict", "logits_to_keep", "num_items_in_batch"}


class HeadGraphs(HeadSlots):
    """The head graphs of one attention module of transformers, which calls them by its attention function.

    Masks, caches and position biases stay those of the attention function beneath. Where it can be told what it
    computes, every form of attention may stand in for it; elsewhere score graphs run as wider heads on it.

    Args:
        num_heads, **slots: as in `HeadSlots`.

    Shape:
        q `[B, T, H, D]`, x `[B, T, M]`, k, v `[B, S, G, D]` -> outputs `[B, T, H, D]`.
    """

    def __init__(self, num_heads: int, **slots: Any) -> None:
        # Nothing may depend on whole maps: a position bias keeps them beneath.
        super().__init__(num_heads, allowed=("whole",), **slots)

    def forward(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, core: Core, mask: Mask, options: dict[str, Any]
    ) -> tuple[Tensor, Any]:
        """Attends with messages before and after, on `core` or in its place."""
        routing = self.route(x)
        z, weights = self.attend(
            q, k, v, x, mask,
            dropout=options.get("dropout", 0.0), routing=routing, core=core, scale=options.get("scaling"),
        )  # fmt: skip
        return self.pass_messages(z, x, routing), weights


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

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, is_wide: bool) -> tuple[Tensor, Any]:
        known = options if scale is None else {**options, "scaling": scale}
        turned = (heads.transpose(1, 2) for heads in (q, k, v))  # [B, H or G, T or S, D] each
        return function(seen_by(base, module, is_wide), *turned, attention_mask, **known)

    heads = [heads.transpose(1, 2) for heads in (query, key, value)]  # [B, T or S, H or G, D] each
    mask, opaque = mask_of(function, module, query.shape[2], key.shape[2], attention_mask, options)
    core = Core(attend, opaque, WIDEST.get(base))
    return graphs(x, *heads, core, mask, options)


def mask_of(
    function: Callable[..., Any], module: nn.Module, tokens: int, keys: int, attention_mask: Any, options: dict
) -> tuple[Mask, str]:
    """Returns the mask an attention function goes by, and why nothing can stand in for it; empty where it can."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if function is not sdpa_attention_forward:
        return NO_MASK, f"{function.__name__} beneath may do more than attend"
    if told := sorted(name for name, value in options.items() if value is not None and name not in TOLD_BY_MASK):
        return NO_MASK, f"the attention beneath is told of {', '.join(told)}"
    if attention_mask is not None:
        # A mask may be made for more keys than there are.
        return Mask(attention_mask[..., :keys]), ""
    causal = options.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal) and tokens > 1
    if causal and tokens != keys:
        return NO_MASK, "the first query sees the first key alone, though there are more keys than queries"
    return Mask(causal=causal), ""


def base_function(module: nn.Module, base: str) -> Callable[..., Any]:
    """Returns the attention function of that name for a module, its modelling file's own where there is one."""
    files = [sys.modules[kind.__module__] for kind in type(module).__mro__]
    file = next(file for file in files if hasattr(file, "ALL_ATTENTION_FUNCTIONS"))
    return file.eager_attention_forward if base == "eager" else file.ALL_ATTENTION_FUNCTIONS[base]


class Overlay:
    """An object as another one sees it: some attributes are others, all else is its own."""

    def __init__(self, beneath: Any, **others: Any) -> None:
        self.__dict__.update(others, _beneath=beneath)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_beneath"], name)


def seen_by(base: str, module: nn.Module, wide: bool) -> Any:
    """Returns the module as the function beneath is to see it: one key head per query head, and its own name."""
    others: dict[str, Any] = {"num_key_value_groups": 1} if wide else {}
    # Flash attention looks its kernel up by the name.
    if base not in ("sdpa", "eager"):
        others["config"] = Overlay(module.config, _attn_implementation=base)
    return Overlay(module, **others) if others else module


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
