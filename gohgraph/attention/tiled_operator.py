"""Attention in tiles as an operator of torch: one call in a compiled graph, in place of the loop over its tiles.

A compiler that saw the loop would write it out, tile by tile, for one length. It sees instead the two calls registered
here, of forward and backward, with what they return: shapes for any length, gradients, and the mapped dimension of
`torch.func.vmap`. Outside of `torch.compile` tiles are `_TiledAttention`, which computes the same.

Source: https://docs.pytorch.org/docs/stable/library.html#torch.library.custom_op
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gohgraph.attention.blocked import SECOND_GRADIENTS
from gohgraph.attention.kernels.folding import fold, unfold
from gohgraph.attention.tiled import _TiledAttention, _TiledGradients

INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? mix_scores, Tensor? mix_weights, Tensor? keep_mask, bool is_causal"


@torch.library.custom_op("gohgraph::tiled_attention", mutates_args=(), schema=f"({INPUTS}) -> Tensor")
def tiles(*inputs: Any) -> Tensor:
    """`_TiledAttention` of inputs `[B, *]`: q is scaled, k and v are of all heads; `[B, T, R, D]`."""
    return _TiledAttention.forward(*inputs)


@tiles.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Tensor:
    return q.new_empty(*q.shape[:2], *v.shape[2:])  # [B, T, R, D]


@torch.library.custom_op(
    "gohgraph::tiled_attention_backward", mutates_args=(), schema=f"(Tensor z, Tensor grad, {INPUTS}) -> Tensor[]"
)
def gradients(z: Tensor, grad: Tensor, *inputs: Any) -> list[Tensor]:
    """`_TiledGradients`: of q, k, v and the mixes that there are."""
    return [x.contiguous() for x in _TiledGradients.forward(z, grad, *inputs)]


@gradients.register_fake
def _(z: Tensor, grad: Tensor, *inputs: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in inputs[:5] if x is not None]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.is_causal = inputs
    ctx.save_for_backward(*tensors, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, z = ctx.saved_tensors
    found = iter(gradients(z, grad, *tensors, ctx.is_causal))
    return (*(None if x is None else next(found) for x in tensors[:5]), None, None)


def _no_second_backward(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(SECOND_GRADIENTS)


tiles.register_autograd(_backward, setup_context=_keep)
gradients.register_autograd(_no_second_backward)


@tiles.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
    return unfold(info.batch_size, tiles(*fold(info.batch_size, in_dims, inputs))), 0


@gradients.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[list[Tensor], list[int]]:
    found = gradients(*fold(info.batch_size, in_dims, inputs))
    return [unfold(info.batch_size, x) for x in found], [0] * len(found)
