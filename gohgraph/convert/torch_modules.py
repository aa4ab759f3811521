"""Head graphs in `torch.nn.MultiheadAttention`: each becomes the drop-in, with its own weights, hooks and names."""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gohgraph.attention.slots import Slots
from gohgraph.convert.blocks import Block, Search
from gohgraph.convert.dropin import GraphMultiheadAttention
from gohgraph.convert.trial_runs import device_of, dtype_for

if TYPE_CHECKING:
    from typing_extensions import Unpack

# What accelerate keeps of a forward that it wraps.
WRAPPED = "_old_forward"


def find(model: nn.Module, search: Search, example: Any) -> None:
    """Adds every `nn.MultiheadAttention` of the model."""
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and not name:
            search.skipped["itself"] = "no model around it: take GraphMultiheadAttention.from_torch"
        elif type(module) is nn.MultiheadAttention and "forward" in vars(module) and WRAPPED not in vars(module):
            search.skipped[name] = "its forward was replaced by another function"
        elif type(module) is nn.MultiheadAttention:
            sizes = (module.num_heads, module.head_dim, module.embed_dim)
            like = torch.empty(0, dtype=dtype_for(module.out_proj.weight), device=device_of(module))
            attach, inputs = partial(give, model, module), partial(_inputs, module, like)
            search.add(Block(name, *sizes, like, module.out_proj, attach, inputs=inputs))
        elif isinstance(module, nn.MultiheadAttention):
            search.skipped[name] = f"{type(module).__name__}, a subclass that may compute something else"


def undo(model: nn.Module) -> None:
    """Makes the modules torch's again."""
    for module in model.modules():
        if isinstance(module, GraphMultiheadAttention):
            module.release()
            _rebind(module)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = module.enable_nested_tensor and _is_fast(module.layers[0])


def give(model: nn.Module, module: nn.MultiheadAttention, **slots: Unpack[Slots]) -> None:
    """Gives head graphs to one of torch's modules inside a model."""
    GraphMultiheadAttention.adopt(module, **slots)
    _rebind(module)
    # Encoders built before would still hand nested tensors on in eval mode without gradients.
    for outer in model.modules():
        if isinstance(outer, nn.TransformerEncoder):
            outer.use_nested_tensor = False


def _rebind(module: nn.Module) -> None:
    if WRAPPED in vars(module):
        setattr(module, WRAPPED, MethodType(type(module).forward, module))


def _inputs(module: nn.MultiheadAttention, like: Tensor) -> tuple[Tensor, ...]:
    """A query, key and value of five tokens."""
    sizes = (module.embed_dim, module.kdim, module.vdim)
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 5, size, generator=generator, device="cpu").to(like) for size in sizes)


def _is_fast(layer: nn.Module) -> bool:
    """What `nn.TransformerEncoder` asks of its layers before it makes nested tensors."""
    if type(layer) is not nn.TransformerEncoderLayer or type(layer.self_attn) is not nn.MultiheadAttention:
        return False
    attention = layer.self_attn
    packed = attention._qkv_same_embed_dim and attention.in_proj_bias is not None and attention.batch_first
    plain = not layer.norm_first and bool(layer.activation_relu_or_gelu) and layer.norm1.eps == layer.norm2.eps
    return packed and plain and attention.num_heads % 2 == 0
