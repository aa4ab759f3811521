"""Gates on head outputs: each head weighs itself, none hears of another."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gohgraph.common.checks import check_choice, check_int, needed
from gohgraph.graphs.protocol import FEATURES, MAPS, SiteGraph, Traits

GRAINS = ("head", "element")


class SigmoidGate(SiteGraph):
    r"""A sigmoid gate on every head, or on every feature of every head, from the block's input.

    .. math:: z'_i(t) = \sigma(W_i x(t)) \odot z_i(t)

    With `rank = r`, W = W_2 W_1. As published it is not neutral at the start: W is drawn as a linear layer of the
    transformer (N(0, 0.02²)), so gates begin near one half.

    Source: Gated Attention (arXiv 2505.06708, section 2.3, position G1): `"head"` is its headwise, `"element"` its
    elementwise gate. Differs: a low rank is not in the paper.

    Args:
        num_heads, head_dim, context_dim: H, D and M.
        grain: `"head"`, one gate a head, or `"element"`, one for each of its features.
        rank: r >= 1 for a low-rank W, `None` for full rank.

    Shape:
        z `[*, H, D]`, context `[*, M]` -> `[*, H, D]`.

    Example:
        >>> gate = SigmoidGate(num_heads=5, head_dim=4, context_dim=20, grain="head")
        >>> gate(torch.randn(2, 3, 5, 4), torch.randn(2, 3, 20)).shape, gate.weight.shape
        (torch.Size([2, 3, 5, 4]), torch.Size([5, 20]))
    """

    def __init__(
        self, num_heads: int, head_dim: int, context_dim: int, *, grain: str = "element", rank: int | None = None
    ) -> None:
        super().__init__()
        check_choice("grain", grain, GRAINS)
        if rank is not None:
            check_int("rank", rank, low=1)
        self.num_heads, self.grain = num_heads, grain
        # A gate on every feature would be one on every key, where nodes are maps.
        is_linear = grain == "head"
        sites, limit = (FEATURES | MAPS, "") if is_linear else (FEATURES, 'grain="element"')
        self.traits = Traits(num_heads, sites, linear=is_linear, limited_by=limit)
        gates = num_heads if grain == "head" else num_heads * head_dim
        self.weight = nn.Parameter(torch.empty(gates, context_dim if rank is None else rank))
        self.down = None if rank is None else nn.Parameter(torch.empty(rank, context_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws W from N(0, 0.02²); of a low rank, the product has about this size."""
        nn.init.normal_(self.weight, std=0.02)
        if self.down is not None:
            nn.init.normal_(self.down, std=len(self.down) ** -0.5)

    def forward(
        self, nodes: Tensor, context: Tensor | None = None, earlier: Any = (), active: Tensor | None = None, **call: Any
    ) -> Tensor:
        """Weighs the nodes `[*, H, D]`; `active` changes nothing, no head hears of another."""
        return nodes * self._gates(needed("context", context)).to(nodes.dtype)

    def matrix(self, context: Tensor | None = None, active: Tensor | None = None) -> Tensor:
        """Returns the gates of whole heads as a diagonal matrix, `[*, H, H]`."""
        if not self.traits.linear:
            return super().matrix(context, active)
        return torch.diag_embed(self._gates(needed("context", context)).squeeze(-1))  # [*, H, H]

    def _gates(self, context: Tensor) -> Tensor:
        low = context if self.down is None else F.linear(context, self.down)  # [*, M] or [*, r]
        gates = F.linear(low, self.weight).sigmoid()  # [*, H] or [*, H*D]
        return gates.unflatten(-1, (self.num_heads, -1))  # [*, H, 1] or [*, H, D]

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, grain={self.grain!r}, rank={None if self.down is None else len(self.down)}"
