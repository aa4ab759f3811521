"""Head graphs in `torch.nn.MultiheadAttention`: each is replaced by the drop-in, which has its very weights."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from gohgraph.convert.blocks import Block, Search
from gohgraph.convert.dropin import GraphMultiheadAttention


def find(model: nn.Module, search: Search, example: Any) -> None:
    """Adds every `nn.MultiheadAttention` of the model."""
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and not name:
            search.skipped["itself"] = "no model around it: take GraphMultiheadAttention.from_torch"
        elif type(module) is nn.MultiheadAttention:
            sizes = (module.num_heads, module.head_dim, module.embed_dim)
            weight = module.out_proj.weight
            search.add(Block(name, *sizes, weight, module.out_proj, partial(_replace, model, name)))
        elif isinstance(module, nn.MultiheadAttention):
            search.skipped[name] = f"{type(module).__name__}, a subclass that may compute something else"


def undo(model: nn.Module) -> None:
    """Puts torch's modules back."""
    for name, module in list(model.named_modules()):
        if isinstance(module, GraphMultiheadAttention):
            set_module(model, name, module.to_torch())
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = module.enable_nested_tensor and _is_fast(module.layers[0])


def set_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Puts a module at a name."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)


def _replace(model: nn.Module, name: str, **slots: nn.Module | None) -> None:
    set_module(model, name, GraphMultiheadAttention.from_torch(model.get_submodule(name), **slots))
    # Encoders built before would still hand nested tensors on in eval mode without gradients.
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def _is_fast(layer: nn.Module) -> bool:
    """What `nn.TransformerEncoder` asks of its layers before it makes nested tensors."""
    if type(layer) is not nn.TransformerEncoderLayer or type(layer.self_attn) is not nn.MultiheadAttention:
        return False
    attention = layer.self_attn
    packed = attention._qkv_same_embed_dim and attention.in_proj_bias is not None and attention.batch_first
    plain = not layer.norm_first and bool(layer.activation_relu_or_gelu) and layer.norm1.eps == layer.norm2.eps
    return packed and plain and attention.num_heads % 2 == 0
