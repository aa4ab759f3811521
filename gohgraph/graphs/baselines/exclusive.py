"""Exclusive self attention: what a head tells a token is nothing that its own value says already."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gohgraph.common.checks import check_bool, needed
from gohgraph.graphs.protocol import SiteGraph, Traits


class ExclusiveHeads(SiteGraph):
    r"""Exclusive self attention (XSA): every head's output without its projection on the token's own value.

    .. math:: z'_i(t) = z_i(t) - a_i\, \frac{z_i(t) \cdot v_i(t)}{v_i(t) \cdot v_i(t)}\, v_i(t)

    A message along one edge a head, from the token's own value to the output. As published, a = 1 without parameters:
    not neutral at the start. Cross attention, whose tokens have no values of their own, is left as it is.

    Source: XSA (arXiv 2603.09078). The learned gate a_i that starts at 0, neutral, is modded-nanogpt's (record of 29
    April 2026).

    Args:
        num_heads, head_dim, context_dim: H, D and M (the last two not used); nodes are `[*, H, D]`.
        gate: learns a_i, from 0; without it a_i = 1.

    Example:
        >>> z, v = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
        >>> exclusive = ExclusiveHeads(num_heads=5, head_dim=4, context_dim=20)
        >>> bool(((exclusive(z, values=v) * v).sum(-1).abs() < 1e-5).all())
        True
    """

    def __init__(self, num_heads: int, head_dim: int, context_dim: int, *, gate: bool = False) -> None:
        super().__init__()
        check_bool("gate", gate)
        self.num_heads = num_heads
        self.traits = Traits(num_heads, frozenset({"outputs"}), reads_values=True)
        self.gate = nn.Parameter(torch.empty(num_heads)) if gate else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Closes the gate."""
        if self.gate is not None:
            nn.init.zeros_(self.gate)

    def forward(
        self,
        nodes: Tensor,
        context: Tensor | None = None,
        earlier: Any = (),
        active: Tensor | None = None,
        *,
        values: Tensor | None = None,
        **call: Any,
    ) -> Tensor:
        """Takes the part along `values [*, H, D]` from the nodes `[*, H, D]`, each by itself."""
        direction = F.normalize(needed("value of the token", values), dim=-1)  # [*, H, D]
        along = (nodes * direction).sum(-1, keepdim=True)  # [*, H, 1]
        if self.gate is not None:
            along = along * self.gate.unsqueeze(-1).to(nodes.dtype)
        return nodes - along * direction

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, gate={self.gate is not None}"
