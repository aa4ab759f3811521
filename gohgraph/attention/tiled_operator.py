"""Attention in tiles as operators of torch: one call in a compiled graph, in place of the loop over its tiles.

A compiler that saw the loop would write it out, tile by tile, for one length. It sees instead the calls registered
here, of forward and backward, with what they return: shapes for any length, gradients, and the mapped dimension of
`torch.func.vmap`. Outside of `torch.compile` the functions of autograd run that these call.

Source: https://docs.pytorch.org/docs/stable/library.html#torch.library.custom_op
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gohgraph.attention.blocked import SECOND_GRADIENTS, _BlockedAttention, _BlockedGradients
from gohgraph.attention.kernels.folding import fold, unfold
from gohgraph.attention.tiled import _TiledAttention, _TiledGradients

Operator = Callable[..., list[Tensor]]


class Tiles(NamedTuple):
    """Attention as an operator, and its backward pass as another; both give lists of tensors `[B, *]`.

    Args:
        forward: of inputs as a function of autograd takes them: its outputs, `z [B, T, R, D]` first.
        backward: of these outputs, the gradient of z, and the inputs: the gradients of those inputs that there are.
    """

    forward: Operator
    backward: Operator

    def __call__(self, *inputs: Any) -> Tensor:
        """Returns z."""
        return self.forward(*inputs)[0]


def _registered(name: str, function: Any, gradients: Any, mixes: str, kept: tuple[str, ...]) -> Tiles:
    """Registers an operator and its backward pass.

    Args:
        name: of the operator.
        function, gradients: of autograd, what they compute.
        mixes: the inputs between values and mask, as a schema has them.
        kept: what forward gives beside z for backward, `[B, T, R, 1]` each.
    """
    inputs = f"Tensor q, Tensor k, Tensor v, {mixes}, Tensor? keep_mask, bool is_causal"
    outputs = "".join(f"Tensor {each}, " for each in ("z", *kept))

    @torch.library.custom_op(f"gohgraph::{name}", mutates_args=(), schema=f"({inputs}) -> Tensor[]")
    def forward(*given: Any) -> list[Tensor]:
        found = function.forward(*given)
        return [found] if isinstance(found, Tensor) else list(found)

    @torch.library.custom_op(
        f"gohgraph::{name}_backward", mutates_args=(), schema=f"({outputs}Tensor grad, {inputs}) -> Tensor[]"
    )
    def backward(*given: Any) -> list[Tensor]:
        return [x.contiguous() for x in gradients.forward(*given)]

    @forward.register_fake
    def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> list[Tensor]:
        rows = (*q.shape[:2], v.shape[2])
        return [q.new_empty(*rows, v.shape[3]), *(q.new_empty(*rows, 1) for _ in kept)]  # [B, T, R, D or 1]

    @backward.register_fake
    def _(*given: Any) -> list[Tensor]:
        return [x.new_empty(x.shape) for x in given[len(kept) + 2 : -2] if x is not None]

    def keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        *tensors, ctx.is_causal = inputs
        ctx.save_for_backward(*output, *tensors)

    def pull(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
        outputs, tensors = ctx.saved_tensors[: len(kept) + 1], ctx.saved_tensors[len(kept) + 1 :]
        found = iter(backward(*outputs, grads[0], *tensors, ctx.is_causal))
        return (*(None if x is None else next(found) for x in tensors[:-1]), None, None)

    forward.register_autograd(pull, setup_context=keep)
    backward.register_autograd(_no_second_backward)
    for operator in (forward, backward):
        operator.register_vmap(_mapped(operator))
    return Tiles(forward, backward)


def _mapped(operator: Operator) -> Callable[..., tuple[list[Tensor], list[int]]]:
    def mapped(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[list[Tensor], list[int]]:
        found = operator(*fold(info.batch_size, in_dims, inputs))
        return [unfold(info.batch_size, x) for x in found], [0] * len(found)

    return mapped


def _no_second_backward(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(SECOND_GRADIENTS)


tiles = _registered(
    "tiled_attention", _TiledAttention, _TiledGradients, "Tensor? mix_scores, Tensor? mix_weights", ()
)
blocks = _registered("blocked_attention", _BlockedAttention, _BlockedGradients, "Tensor mix_scores", ("sums",))
