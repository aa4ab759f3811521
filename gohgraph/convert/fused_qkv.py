"""Head graphs in attention with one projection for queries, keys and values, as in timm's vision transformers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gohgraph.attention.call import Mask
from gohgraph.attention.slots import HeadSlots
from gohgraph.convert.blocks import Block, Search
from gohgraph.convert.torch_modules import set_module

CHILDREN = ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop")
TOKENS = 5


class GraphFusedAttention(HeadSlots):
    """timm's `Attention` with slots for head graphs: the same children, under the same names.

    Args:
        module: of which the children are taken.
        **slots: as in `HeadSlots`.

    Shape:
        x `[B, T, M]`, attn_mask as in `scaled_dot_product_attention` -> `[B, T, M]`.
    """

    def __init__(self, module: nn.Module, **slots: nn.Module | None) -> None:
        super().__init__(module.num_heads, **slots)
        self.scale = getattr(module, "scale", None)
        # What stood here before, out of sight of parameters and state dicts.
        self.__dict__["replaced"] = module
        for name in CHILDREN:
            setattr(self, name, getattr(module, name, nn.Identity()))
        self.train(module.training)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Attends from `x` to itself."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # [B, T, H, D] each
        q, k = self.q_norm(q), self.k_norm(k)
        routing = self.route(x)
        dropout = self.attn_drop.p if self.training and isinstance(self.attn_drop, nn.Dropout) else 0.0
        z, _ = self.attend(q, k, v, x, Mask(attn_mask), dropout=dropout, routing=routing)
        z = self.pass_messages(z, x, routing).flatten(-2)  # [B, T, H*D]
        return self.proj_drop(self.proj(self.norm(z)))


def find(model: nn.Module, search: Search, example: Any) -> None:
    """Adds modules with timm's names that compute what the replacement computes; others stay for the projections."""
    for name, module in model.named_modules():
        if not name or search.contains_or_is_inside(name) or not _looks_fused(module):
            continue
        with torch.no_grad(), torch.random.fork_rng():
            same = _agrees(module)
        if same:
            inputs = module.qkv.in_features
            head_dim = module.qkv.out_features // 3 // module.num_heads
            attach = partial(_replace, model, name)
            sizes = (module.num_heads, head_dim, inputs)
            search.add(Block(name, *sizes, module.qkv.weight, module.proj, attach))


def undo(model: nn.Module) -> None:
    """Puts the modules back that were replaced."""
    for name, module in list(model.named_modules()):
        if isinstance(module, GraphFusedAttention):
            set_module(model, name, module.replaced.train(module.training))


def _replace(model: nn.Module, name: str, **slots: nn.Module | None) -> None:
    set_module(model, name, GraphFusedAttention(model.get_submodule(name), **slots))


def _looks_fused(module: nn.Module) -> bool:
    qkv, proj = getattr(module, "qkv", None), getattr(module, "proj", None)
    if not isinstance(qkv, nn.Linear) or not isinstance(proj, nn.Linear) or isinstance(module, HeadSlots):
        return False
    heads = getattr(module, "num_heads", None)
    return isinstance(heads, int) and qkv.out_features == 3 * proj.in_features and proj.in_features % heads == 0


def _agrees(module: nn.Module) -> bool:
    """Whether the replacement computes the same: position biases, other norms or arguments would show."""
    weight, training = module.qkv.weight, module.training
    x = torch.randn(2, TOKENS, module.qkv.in_features, device=weight.device, dtype=weight.dtype)
    try:
        expected, actual = module.eval()(x), GraphFusedAttention(module)(x)
    except (TypeError, RuntimeError, ValueError):
        return False
    finally:
        module.train(training)
    close = 1e-5 if weight.dtype in (torch.float32, torch.float64) else 2e-2
    return expected.shape == actual.shape and torch.allclose(expected, actual, rtol=close, atol=close)
