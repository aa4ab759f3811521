"""Paired heads: two heads attend to the keys of both in one softmax."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gohgraph.graphs.baselines.differential import check_pairs
from gohgraph.graphs.protocol import SiteGraph, Traits


class PairedHeads(SiteGraph):
    r"""Paired head attention: one softmax over the keys of heads 2i and 2i + 1, each with its own value.

    .. math::
        z_h(t) = \sum_{p \in \{2i,\, 2i+1\}} \sum_s \frac{e^{q_h(t) \cdot k_p(s) / \sqrt{D}}}{Z_h(t)}\, v_p(s),
        \qquad h \in \{2i,\, 2i+1\}

    Queries, keys and values of both interleave to one head of twice the tokens, (t, 2i) before (t, 2i + 1): causal, the
    first of the pair does not see the second at its own token. It has no parameters and is not neutral. The nodes at
    scores stay what they are; what its trait `joins_keys` changes is over which keys the softmax runs, which the form
    `"paired"` of attention computes.

    Source: paired head attention of modded-nanogpt (2026). Differs: rotary positions are those of the tokens, there
    they are those of the interleaved sequence.

    Args:
        num_heads, head_dim, context_dim: H, even, D and M (both not used).

    Raises:
        ValueError: an odd number of heads.

    Example:
        >>> import torch
        >>> import gohgraph as goh
        >>> attention = goh.MultiHeadAttention(32, 4, causal=True, score_graph=PairedHeads(4, 8, 32))
        >>> attention(torch.randn(2, 5, 32))[0].shape
        torch.Size([2, 5, 32])
    """

    def __init__(self, num_heads: int, head_dim: int, context_dim: int) -> None:
        super().__init__()
        check_pairs(num_heads)
        self.num_heads = num_heads
        self.traits = Traits(num_heads, frozenset({"scores"}), run=2, joins_keys=True)

    def forward(
        self, nodes: Tensor, context: Tensor | None = None, earlier: Any = (), active: Tensor | None = None, **call: Any
    ) -> Tensor:
        """Returns the nodes `[*, H, F]`: scores of a head on its own keys do not change."""
        return nodes

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"
