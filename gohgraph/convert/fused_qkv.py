"""Head graphs in attention with one projection for queries, keys and values, as in timm's vision transformers."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gohgraph.attention.call import Mask
from gohgraph.attention.slots import HeadSlots, Slots
from gohgraph.convert.blocks import Block, Search
from gohgraph.convert.trial_runs import quietly

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Children that not every module of this kind has.
OPTIONAL = ("q_norm", "k_norm", "attn_drop", "norm", "proj_drop")
TOKENS = 5


class GraphFusedAttention(HeadSlots):
    """timm's `Attention` with slots for head graphs: what a module becomes that computes this, with all that is its.

    Shape:
        x `[B, T, M]`, attn_mask as in `scaled_dot_product_attention` -> `[B, T, M]`.
    """

    qkv: nn.Linear
    proj: nn.Linear

    @classmethod
    def adopt(cls, module: Any, **slots: Unpack[Slots]) -> None:
        """Turns the module itself into one with slots: its weights, hooks and names stay."""
        was, module.__class__ = type(module), cls
        module.was = was
        module.fill_slots(module.num_heads, **slots)
        module.order_heads(None)

    def release(self) -> None:
        """Turns it back into what it was."""
        self.empty_slots()
        self.__class__ = self.__dict__.pop("was")

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Attends from `x` to itself."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # [B, T, H, D] each
        q_norm, k_norm, attn_drop, norm, proj_drop = (getattr(self, name, None) or _same for name in OPTIONAL)
        q, k = q_norm(q), k_norm(k)
        routing = self.route(x)
        dropout = attn_drop.p if self.training and isinstance(attn_drop, nn.Dropout) else 0.0
        z, _ = self.attend(q, k, v, x, Mask(attn_mask), dropout=dropout, routing=routing)
        z = self.pass_messages(z, x, routing).flatten(-2)  # [B, T, H*D]
        return proj_drop(self.proj(norm(z)))


def _same(x: Tensor) -> Tensor:
    return x


def find(model: nn.Module, search: Search, example: Any) -> None:
    """Adds modules with timm's names that compute what the replacement computes; others stay for the projections."""
    for name, module in model.named_modules():
        if not name or search.contains_or_is_inside(name) or not _looks_fused(module):
            continue
        if _agrees(module):
            inputs = module.qkv.in_features
            head_dim = module.qkv.out_features // 3 // module.num_heads
            attach = partial(GraphFusedAttention.adopt, module)
            sizes = (module.num_heads, head_dim, inputs)
            search.add(Block(name, *sizes, module.qkv.weight, module.proj, attach))


def undo(model: nn.Module) -> None:
    """Makes the modules again what they were."""
    for module in model.modules():
        if isinstance(module, GraphFusedAttention):
            module.release()


def _looks_fused(module: nn.Module) -> bool:
    qkv, proj = getattr(module, "qkv", None), getattr(module, "proj", None)
    if not isinstance(qkv, nn.Linear) or not isinstance(proj, nn.Linear) or isinstance(module, HeadSlots):
        return False
    if "forward" in vars(module):
        return False
    heads = getattr(module, "num_heads", None)
    return isinstance(heads, int) and qkv.out_features == 3 * proj.in_features and proj.in_features % heads == 0


def _agrees(module: Any) -> bool:
    """Whether the replacement computes the same: position biases, other norms or arguments would show."""
    weight, twin = module.qkv.weight, copy.copy(module)
    if weight.is_meta:
        return False
    # Of a copy, the children are the same and the dictionary of them is not.
    twin._modules, twin._buffers = dict(module._modules), dict(module._buffers)
    twin._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    GraphFusedAttention.adopt(twin)
    with quietly(module), quietly(twin):
        x = torch.randn(2, TOKENS, module.qkv.in_features, device=weight.device, dtype=weight.dtype)
        try:
            expected, actual = module.forward(x), twin.forward(x)
        except (TypeError, RuntimeError, ValueError):
            return False
    close = 1e-5 if weight.dtype in (torch.float32, torch.float64) else 2e-2
    return expected.shape == actual.shape and torch.allclose(expected, actual, rtol=close, atol=close)
