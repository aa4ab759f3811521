"""Messages over many edges, a few tokens at a time: the weights of all tokens are never in memory at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gohgraph.graphs.token_edges import EdgeGradients, TokenEdges

# Backward needs all weights again. Of the first tokens they are kept, as many numbers as all tokens would have with
# this many edges for every number of a context: a feed-forward of the usual width keeps as much. Those of the others
# are computed again, which costs a third of what edges cost.
KEPT_NUMBERS = 4


def add_in_chunks(z: Tensor, senders: Tensor, edges: TokenEdges) -> Tensor:
    r"""Returns nodes with what they receive over complete runs of heads, computing the weights for few tokens at once.

    .. math:: z'_i(t) = z_i(t) + \sum_j \mathrm{act}(W c(t) + s)_{ji}\, z_j(t)

    Equal to `add_product` with all the weights, its slow reference, which also computes second gradients.

    Args:
        z: `[*, H, D]`, of N tokens; senders: as z.
        edges: of these tokens.

    Example:
        >>> z = torch.randn(7, 4, 3)
        >>> edges = TokenEdges(torch.randn(7, 5), torch.randn(8, 5), torch.randn(8), squashes=True, width=2)
        >>> add_in_chunks(z, z, edges).shape
        torch.Size([7, 4, 3])
    """
    keeps = torch.is_grad_enabled() and any(x.requires_grad for x in (z, senders, *edges[:3]))
    flat = (x.reshape(-1, edges.width, x.shape[-1]) for x in (z, senders))  # [N*H/h, h, D] each
    return _InChunks.apply(*flat, *edges, keeps).view(z.shape)  # [*, H, D]


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, senders: Tensor, *arguments: Any) -> Tensor:
        edges, keeps = TokenEdges(*arguments[:-1]), arguments[-1]
        runs, size = len(z) // max(1, len(edges.context)), len(edges.weight)
        whole = [tokens for tokens in edges.chunks() if tokens.stop * size <= KEPT_NUMBERS * edges.context.numel()]
        kept = z.new_empty(whole[-1].stop if keeps and whole else 0, size)  # [K, E]
        result, memory = torch.empty_like(z), edges.memory()
        for tokens in edges.chunks():
            alpha = edges.alpha(tokens, _place(tokens, kept, memory))
            rows = slice(tokens.start * runs, tokens.stop * runs)
            torch.baddbmm(z[rows], edges.matrices(alpha), senders[rows], out=result[rows])
        ctx.save_for_backward(senders, *edges[:3], kept)
        ctx.options = edges[3:]
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        senders, *tensors, kept = ctx.saved_tensors
        edges, needed, rest = TokenEdges(*tensors, *ctx.options), ctx.needs_input_grad[1:5], (None,) * 3
        if torch.is_grad_enabled():
            return grad, *_differentiable(grad, senders, edges, needed), *rest
        runs, grad = len(senders) // max(1, len(edges.context)), grad.contiguous()
        dsenders, gradients = torch.empty_like(senders), EdgeGradients(edges, needed[1:])
        memory, dalpha = edges.memory(), edges.memory()
        for tokens in edges.chunks():
            alpha = _place(tokens, kept, memory)
            if tokens.stop > len(kept):
                edges.alpha(tokens, alpha)
            rows, own = slice(tokens.start * runs, tokens.stop * runs), dalpha[: len(alpha)]
            torch.bmm(edges.matrices(alpha).mT, grad[rows], out=dsenders[rows])
            if any(needed[1:]):
                torch.bmm(grad[rows], senders[rows].mT, out=edges.matrices(own))
                gradients.add(tokens, edges.before(alpha, own, out=own))
        return grad, dsenders, gradients.context, gradients.weight, gradients.bias, *rest


def _differentiable(grad: Tensor, senders: Tensor, edges: TokenEdges, needed: tuple[bool, ...]) -> list[Tensor | None]:
    """The same gradients of senders, context, W and s by torch's own operators, for second ones."""
    inputs = [senders, *edges[:3]]
    with torch.enable_grad():
        received = edges.matrices(edges.alpha(slice(None))) @ senders  # [N*H/h, h, D]
        asked = [x for x, is_asked in zip(inputs, needed, strict=True) if is_asked]
        found = iter(torch.autograd.grad(received, asked, grad, create_graph=True))
    return [next(found) if is_asked else None for is_asked in needed]


def _place(tokens: slice, kept: Tensor, memory: Tensor) -> Tensor:
    """Where the weights of a chunk are, or are to be written."""
    return kept[tokens] if tokens.stop <= len(kept) else memory[: tokens.stop - tokens.start]
