"""The weights of all edges for a few tokens at a time, and the gradients of what they are computed from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Numbers of the weights of one chunk of tokens, of which backward holds two: they stay in a core's cache between
# products. With fewer tokens products are too flat to be fast, those of the gradient of W above all.
CHUNK_NUMBERS, FEWEST_TOKENS = 2**20, 128


class TokenEdges(NamedTuple):
    r"""What the weights of edges are computed from, :math:`\alpha(t) = \mathrm{act}(W c(t) + s)`, over runs of heads.

    Args:
        context: c, `[N, M]`.
        weight, bias: W and s, `[E, M]` and `[E]`; E is a multiple of the edges of a run.
        squashes: act is tanh; otherwise the identity.
        width: h; heads pass messages in runs of h heads, every pair of them.

    Example:
        >>> edges = TokenEdges(torch.randn(7, 5), torch.randn(12, 5), torch.randn(12), squashes=True, width=2)
        >>> edges.matrices(edges.alpha(slice(0, 3))).shape
        torch.Size([9, 2, 2])
    """

    context: Tensor
    weight: Tensor
    bias: Tensor
    squashes: bool
    width: int

    def chunks(self, numbers: int | None = None) -> Iterator[slice]:
        """Yields the tokens of one chunk after the other, of so many weights each, or `CHUNK_NUMBERS`."""
        tokens = max(FEWEST_TOKENS, (CHUNK_NUMBERS if numbers is None else numbers) // len(self.weight))
        for start in range(0, len(self.context), tokens):
            yield slice(start, min(start + tokens, len(self.context)))

    def alpha(self, tokens: slice, out: Tensor | None = None) -> Tensor:
        """Returns the weights of some tokens, `[n, E]`, written to `out` if there is one."""
        # tanh(x) = 2 / (1 + exp(-2 x)) - 1, which takes a quarter of the time of torch's tanh.
        factor = 2 if self.squashes else 1
        alpha = torch.addmm(self.bias, self.context[tokens], self.weight.t(), beta=factor, alpha=factor, out=out)
        if not self.squashes:
            return alpha  # [n, E]
        return 2 * alpha.sigmoid() - 1 if out is None else alpha.sigmoid_().mul_(2).sub_(1)  # [n, E]

    def memory(self, numbers: int | None = None) -> Tensor:
        """Returns memory for the weights of one chunk, `[n, E]`; `numbers` as in `chunks`."""
        first = next(self.chunks(numbers), slice(0, 0))
        return self.context.new_empty(first.stop, len(self.weight))

    def before(self, alpha: Tensor, dalpha: Tensor, out: Tensor) -> Tensor:
        """Writes the gradients before the activation `[n, E]`, given the weights and theirs, to `out`."""
        if self.squashes:
            return torch.ops.aten.tanh_backward.grad_input(dalpha, alpha, grad_input=out)
        return out if out is dalpha else out.copy_(dalpha)

    def matrices(self, alpha: Tensor) -> Tensor:
        """Returns weights `[n, E]` as a matrix for every run, rows receive, `[n*H/h, h, h]`."""
        return alpha.view(-1, self.width, self.width)


class EdgeGradients:
    """Gradients of context, W and s, to which every chunk adds.

    Args:
        edges: the weights.
        needed: whether those of context, W and s are asked for; what is not stays `None`.
    """

    def __init__(self, edges: TokenEdges, needed: tuple[bool, bool, bool]) -> None:
        self.edges = edges
        self.context = torch.empty_like(edges.context) if needed[0] else None
        self.weight, self.bias = (
            torch.zeros_like(x) if asked else None for x, asked in zip(edges[1:3], needed[1:], strict=True)
        )

    def add(self, tokens: slice, dalpha: Tensor) -> None:
        """Adds the part of some tokens, given the gradients of their weights before the activation, `[n, E]`."""
        if self.context is not None:
            torch.mm(dalpha, self.edges.weight, out=self.context[tokens])
        if self.weight is not None:
            self.weight.addmm_(dalpha.t(), self.edges.context[tokens])
        if self.bias is not None:
            self.bias += dalpha.sum(dim=0)
