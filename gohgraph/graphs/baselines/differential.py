"""Differential attention: the maps of two heads are subtracted, so that what both attend to cancels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gohgraph.common.checks import needed
from gohgraph.graphs.protocol import SiteGraph, Sparse, Traits


class DifferentialPairs(SiteGraph):
    r"""Differential attention as a head graph at weights: heads 2i and 2i + 1 both get the difference of their maps.

    .. math:: A'_{2i}(t, s) = A'_{2i+1}(t, s) = A_{2i}(t, s) - \sigma\big(W_i x(t)\big)\, A_{2i+1}(t, s)

    One differential head reads the values of both. Where both share a key/value head, it is computed on their outputs,
    at the price of plain attention. As published it is not neutral: W is drawn from N(0, 0.02²), so one half of the
    second map is subtracted.

    Source: DIFF V2 (Microsoft, January 2026, unilm/Diff-Transformer-V2), the Differential Transformer (arXiv
    2410.05258) with a lambda of token and head, and without a norm. Differs: there the number of queries is doubled
    beside an output projection of the former width, here it stays, as in the first version; with a shared key/value
    head the output projection therefore reads every difference by two of its blocks, whose sum is the published one.

    Args:
        num_heads, head_dim, context_dim: H, even, D (not used) and M.

    Shape:
        maps `[B, T, H, S]`, context `[B, T, M]` -> `[B, T, H, S]`.

    Raises:
        ValueError: an odd number of heads.

    Example:
        >>> pairs = DifferentialPairs(num_heads=4, head_dim=4, context_dim=16)
        >>> maps = pairs(torch.rand(2, 3, 4, 7), torch.randn(2, 3, 16))
        >>> torch.equal(maps[:, :, 0], maps[:, :, 1])
        True
    """

    def __init__(self, num_heads: int, head_dim: int, context_dim: int) -> None:
        super().__init__()
        check_pairs(num_heads)
        self.num_heads = num_heads
        self.traits = Traits(num_heads, frozenset({"weights"}), linear=True, in_degree=2, run=2)
        self.weight = nn.Parameter(torch.empty(num_heads // 2, context_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws W."""
        nn.init.normal_(self.weight, std=0.02)

    def forward(
        self, nodes: Tensor, context: Tensor | None = None, earlier: Any = (), active: Tensor | None = None, **call: Any
    ) -> Tensor:
        """Subtracts within pairs of the nodes `[*, H, F]`; heads that are off neither send nor receive."""
        weights = self._weights(needed("context", context), active).to(nodes.dtype)  # [*, H, 2]
        weights = weights.unflatten(-2, (-1, 2))  # [*, H/2, 2, 2]
        first, second = nodes.unflatten(-2, (-1, 2)).split(1, dim=-2)  # [*, H/2, 1, F]
        pairs = weights[..., :1] * first + weights[..., 1:] * second  # [*, H/2, 2, F]
        return pairs.flatten(-3, -2)  # [*, H, F]

    def matrix(self, context: Tensor | None = None, active: Tensor | None = None) -> Tensor:
        """Returns the pairs' blocks `[1, -sigma; 1, -sigma]` as one matrix, `[*, H, H]`."""
        weights = self._weights(needed("context", context), active)  # [*, H, 2]
        whole = weights.new_zeros(*weights.shape[:-1], self.num_heads)  # [*, H, H]
        return whole.scatter(-1, self._senders(weights).expand_as(weights), weights)

    def sparse(self, context: Tensor | None, active: Tensor | None = None, keys: Tensor | None = None) -> Sparse:
        """Returns the two senders of every head, and their weights."""
        weights = self._weights(needed("context", context), active)
        return Sparse(self._senders(weights), weights)

    def _weights(self, context: Tensor, active: Tensor | None) -> Tensor:
        second = -F.linear(context, self.weight).sigmoid()  # [*, H/2]
        weights = torch.stack((torch.ones_like(second), second), dim=-1)  # [*, H/2, 2]
        weights = weights.repeat_interleave(2, dim=-2)  # [*, H, 2]
        if active is None:
            return weights
        sending = active.unflatten(-1, (-1, 2)).repeat_interleave(2, dim=-2)  # [*, H, 2]
        itself = torch.eye(2, dtype=weights.dtype, device=weights.device).repeat(self.num_heads // 2, 1)  # [H, 2]
        return torch.where(active.unsqueeze(-1), weights * sending, itself)

    def _senders(self, like: Tensor) -> Tensor:
        pairs = torch.arange(self.num_heads, device=like.device).unflatten(0, (-1, 2))  # [H/2, 2]
        return pairs.repeat_interleave(2, dim=0)  # [H, 2]

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"


def check_pairs(num_heads: int) -> None:
    """Raises `ValueError` for heads that do not form pairs."""
    if num_heads % 2:
        raise ValueError(f"Expected an even number of heads, for pairs (got {num_heads}). Do change num_heads.")
