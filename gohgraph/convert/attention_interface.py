"""Head graphs inside the attention functions of Hugging Face transformers.

transformers calls attention by a name. A converted attention module calls it by ours (`implementation_names`), whose
function calls the one beneath, eager, sdpa, flash or flex attention, between the two sites. The hidden states come by
themselves (`hidden_states`).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from gohgraph.attention.call import NO_MASK, Core, Mask
from gohgraph.attention.slots import HeadSlots
from gohgraph.common.checks import there
from gohgraph.convert import hidden_states
from gohgraph.convert.implementation_names import NamedByUs, Overlay, beneath

CHILD, HOOKS = "head_graphs", "_head_graph_hooks"
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
    function, graphs, x = base_function(type(module), base), getattr(module, CHILD), hidden_states.read(module)

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


# Of classes of attention modules, the attention functions of their modelling file and its eager one.
_FUNCTIONS: dict[type, tuple[Any, Callable[..., Any] | None]] = {}


def base_function(kind: type, base: str) -> Callable[..., Any]:
    """Returns the attention function of that name for a class of modules, its modelling file's own where it has one."""
    if kind not in _FUNCTIONS:
        _FUNCTIONS[kind] = (_interface(kind), _eager(kind))
    interface, eager = _FUNCTIONS[kind]
    if base == "eager" and base not in interface:
        return there(eager)
    return interface[base]


def _interface(kind: type) -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    files = (sys.modules[owner.__module__] for owner in kind.__mro__)
    return next(filter(None, (getattr(file, "ALL_ATTENTION_FUNCTIONS", None) for file in files)), None) or (
        ALL_ATTENTION_FUNCTIONS
    )


def _eager(kind: type) -> Callable[..., Any] | None:
    """The eager function that the methods of a class name; a file may have several."""
    for owner in kind.__mro__:
        for method in vars(owner).values():
            if not inspect.isfunction(method):
                continue
            method = inspect.unwrap(method)
            for name in method.__code__.co_names:
                if name.endswith("eager_attention_forward") and name in method.__globals__:
                    return method.__globals__[name]
    return None


def seen_by(base: str, module: nn.Module, wide: bool) -> Any:
    """Returns the module as the function beneath is to see it: one key head per query head, and its own name."""
    others: dict[str, Any] = {"num_key_value_groups": 1} if wide else {}
    # Flash attention looks its kernel up by the name.
    if base not in ("sdpa", "eager"):
        others["config"] = beneath(module.config)
    return Overlay(module, **others) if others else module


def attach(module: Any, graphs: Any, *, required: bool = True) -> None:
    """Gives head graphs to a module, and their context in every call; `required`, that they are called."""
    setattr(module, CHILD, graphs)
    module.__dict__[HOOKS] = hidden_states.note_for(module, "", required)
    module.config = NamedByUs(module.config)


def detach(module: nn.Module) -> None:
    """Takes the head graphs of an attention module away."""
    for hook in module.__dict__.pop(HOOKS):
        hook.remove()
    delattr(module, CHILD)
    module.config = beneath(module.config)
