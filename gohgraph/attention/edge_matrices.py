"""Messages between the scores of many heads: the matrices of a tile's queries are computed where they are used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gohgraph.attention.tiled import _TiledAttention, _TiledGradients
from gohgraph.graphs.token_edges import EdgeGradients, TokenEdges

Place = tuple[int, slice]

# Numbers of the matrices in memory, beside which tiles hold three maps (a block of 64 heads, 512 tokens, batch 2 in
# training, to plain, one thread: 2^20 1.27 of memory and 1.32 of time, this 1.25 and 1.38, 2^19 1.23 and 1.37).
WINDOW_NUMBERS = 3 * 2**18


class EdgeMatrices:
    r"""The matrices :math:`I + \alpha(t)` of a complete graph, read as a tensor `[B, T, H, H]` is, by item and tokens.

    In memory are those of a window of tokens: tiles of many heads have few queries, and products over so few would read
    all of W for each. Tiles are taken in order, and in backward each gives its gradients last, which take the place of
    its matrices.

    Args:
        edges: of all tokens, of one run of heads.
        batch: B.
        needed: whether gradients of context, W and s are asked for.

    Example:
        >>> edges = TokenEdges(torch.randn(6, 5), torch.zeros(4, 5), torch.zeros(4), squashes=True, width=2)
        >>> EdgeMatrices(edges, batch=2)[1, slice(0, 3)].shape
        torch.Size([3, 2, 2])
    """

    def __init__(self, edges: TokenEdges, batch: int, needed: tuple[bool, bool, bool] = (True, True, True)) -> None:
        self.needed = needed
        self.edges, self.tokens = edges, len(edges.context) // max(1, batch)
        self.shape = (batch, self.tokens, edges.width, edges.width)
        self.window = slice(0, 0)
        self.memory = edges.memory(WINDOW_NUMBERS)  # [n, E]
        self.gradients: MatrixGradients | None = None

    def __getitem__(self, place: Place) -> Tensor:
        """Returns the matrices of some tokens of one item, `[t, H, H]`."""
        return self.edges.matrices(self.memory[self.within(place)])

    def within(self, place: Place) -> slice:
        """Returns where tokens of one item are in the window, which is moved to them if they are not in it."""
        item, rows = place
        start, stop = (item * self.tokens + each for each in (rows.start, rows.stop))
        if not self.window.start <= start <= stop <= self.window.stop:
            # Of the old window, what comes before the tokens: a tile may not have ended with it.
            self.leave(start)
            self.window = slice(start, min(start + len(self.memory), len(self.edges.context)))
            alpha = self.edges.alpha(self.window, self.memory[: self.window.stop - start])  # [n, E]
            self.diagonal(alpha).add_(1.0)
        return slice(start - self.window.start, stop - self.window.start)

    def leave(self, stop: int) -> None:
        """Adds the gradients of the window up to the token `stop` to their sums, if they are asked for."""
        if self.gradients is None:
            return
        tokens = slice(self.window.start, min(stop, self.window.stop))
        self.gradients.sums.add(tokens, self.memory[: tokens.stop - tokens.start])

    def room(self) -> MatrixGradients:
        """Returns what takes in the gradients of the matrices."""
        self.gradients = MatrixGradients(self)
        return self.gradients

    def diagonal(self, alpha: Tensor) -> Tensor:
        """Returns the self-loops among weights `[n, E]`."""
        return self.edges.matrices(alpha).diagonal(dim1=1, dim2=2)  # [n, H]


class MatrixGradients:
    """The gradients of what matrices are computed from, given those of the matrices, by item and tokens, in order."""

    def __init__(self, matrices: EdgeMatrices) -> None:
        self.matrices, self.sums = matrices, EdgeGradients(matrices.edges, matrices.needed)

    def __setitem__(self, place: Place, gradients: Tensor) -> None:
        """Takes in the gradients `[t, H, H]` of the matrices of some tokens of one item, and writes over these."""
        alpha = self.matrices.memory[self.matrices.within(place)]  # [t, E]
        self.matrices.diagonal(alpha).sub_(1.0)
        self.matrices.edges.before(alpha, gradients.flatten(1), out=alpha)  # [t, E]

    def of_edges(self) -> tuple[Tensor | None, ...]:
        """Returns the gradients of context, W and s, after the last tile."""
        self.matrices.leave(self.matrices.window.stop)
        return self.sums.context, self.sums.weight, self.sums.bias


def edge_tiles(
    q: Tensor, k: Tensor, v: Tensor, mix: EdgeMatrices, _: None, keep_mask: Tensor | None, is_causal: bool
) -> Tensor:
    """Tiles under messages between scores, whose matrices no tensor holds; for `tiled_attention`: `[B, T, H, D]`.

    Example:
        >>> edges = TokenEdges(torch.randn(6, 5), torch.zeros(4, 5), torch.zeros(4), squashes=True, width=2)
        >>> q, k, v = torch.randn(3, 2, 3, 2, 7)
        >>> edge_tiles(q, k, v, EdgeMatrices(edges, batch=2), None, None, is_causal=True).shape
        torch.Size([2, 3, 2, 7])
    """
    return _EdgeTiles.apply(q, k, v, keep_mask, is_causal, *mix.edges)


class _EdgeTiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, keep_mask: Tensor | None, *others: Any) -> Tensor:
        is_causal, *edges = others
        z = _TiledAttention.forward(q, k, v, EdgeMatrices(TokenEdges(*edges), len(q)), None, keep_mask, is_causal)
        ctx.save_for_backward(q, k, v, keep_mask, *edges[:3], z)
        ctx.options = is_causal, *edges[3:]
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, z = ctx.saved_tensors
        needed = ctx.needs_input_grad[5:8]
        dq, dk, dv, *of_edges = _EdgeGradients.apply(z, grad, needed, *tensors, *ctx.options)
        return dq, dk, dv, None, None, *of_edges, None, None


class _EdgeGradients(_TiledGradients):
    """The backward pass, of which there is no second one."""

    @staticmethod
    def forward(z: Tensor, grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        needed, q, k, v, keep_mask, context, weight, bias, is_causal, squashes, width = arguments
        matrices = EdgeMatrices(TokenEdges(context, weight, bias, squashes, width), len(q), needed)
        of_matrices: Any
        *of_heads, of_matrices = _TiledGradients.forward(z, grad, q, k, v, matrices, None, keep_mask, is_causal)
        return *of_heads, *of_matrices.of_edges()
