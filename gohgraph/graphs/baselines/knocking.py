"""Knocking heads: one small map that all heads share, applied to each of them before attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gohgraph.common.checks import check_choice
from gohgraph.graphs.protocol import FEATURES, SiteGraph, Traits

FORMS = ("mlp", "linear")


class KnockingHeads(SiteGraph):
    r"""Knocking-heads attention: the features of every head pass through weights that all heads share.

    .. math::
        \text{linear: } z'_i = z_i T, \qquad
        \text{mlp: } z'_i = 2\, \big((z_i W_\text{up}) \odot \sigma(z_i W_\text{gate})\big) W_\text{down}

    T, W_up and W_down start as the identity, W_gate at zero: the start is plain attention. Heads meet in the shared
    weights only; what one head found in a text never reaches another.

    Source: KHA (arXiv 2510.23052, equations 5 to 7 and 9, section 3.3); `"mlp"` on values is its recommended form.

    Args:
        num_heads, head_dim, context_dim: H (key/value heads at keys and values), D and M (not used); nodes `[*, H, D]`.
        form: `"mlp"` or `"linear"`.

    Example:
        >>> z = torch.randn(2, 3, 5, 4)
        >>> torch.equal(KnockingHeads(num_heads=5, head_dim=4, context_dim=20)(z), z)
        True
    """

    def __init__(self, num_heads: int, head_dim: int, context_dim: int, *, form: str = "mlp") -> None:
        super().__init__()
        check_choice("form", form, FORMS)
        self.num_heads, self.form = num_heads, form
        self.traits = Traits(num_heads, FEATURES, static=form == "linear")
        self.up = nn.Parameter(torch.empty(head_dim, head_dim))
        self.gate = nn.Parameter(torch.empty(head_dim, head_dim)) if form == "mlp" else None
        self.down = nn.Parameter(torch.empty(head_dim, head_dim)) if form == "mlp" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Returns to the identity."""
        nn.init.eye_(self.up)
        if self.gate is not None and self.down is not None:
            nn.init.zeros_(self.gate)
            nn.init.eye_(self.down)

    def forward(
        self, nodes: Tensor, context: Tensor | None = None, earlier: Any = (), active: Tensor | None = None, **call: Any
    ) -> Tensor:
        """Maps the nodes `[*, H, D]`, each by itself."""
        raised = nodes @ self.up.to(nodes.dtype)  # [*, H, D]
        if self.gate is None or self.down is None:
            return raised
        opened = raised * (nodes @ self.gate.to(nodes.dtype)).sigmoid()  # [*, H, D]
        return 2 * opened @ self.down.to(nodes.dtype)  # [*, H, D]

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, form={self.form!r}"
