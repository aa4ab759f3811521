"""Head graphs made otherwise: the choices that `HeadGraphConv` did not take."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gohgraph.common.checks import needed
from gohgraph.graphs.graph import head_graph
from gohgraph.graphs.protocol import FEATURES, SiteGraph, Traits


class SoftmaxMessages(SiteGraph):
    r"""Messages over a complete graph whose weights are normalised over senders, as in graph attention networks.

    .. math:: z'_i(t) = z_i(t) + g_i \sum_j \mathrm{softmax}_j\big((W x(t))_{ji}\big)\, z_j(t)

    Neutral at the start by g = 0; W is drawn from N(0, 0.02²), so that g has something to weigh.

    Source: GAT (arXiv 1710.10903, equations 3 and 4). Differs: scores come from a context that all edges share and not
    from pairs of nodes, which makes the normalisation the one difference to `HeadGraphConv`.

    Args:
        num_heads, head_dim, context_dim: H, D (not used: heads are weighted as a whole) and M.

    Shape:
        z `[*, H, D]`, context `[*, M]` -> `[*, H, D]`.

    Example:
        >>> z, x = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 20)
        >>> torch.equal(SoftmaxMessages(5, 4, 20)(z, x), z)
        True
    """

    def __init__(self, num_heads: int, head_dim: int, context_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.traits = Traits(num_heads, linear=True)
        self.weight = nn.Parameter(torch.empty(num_heads * num_heads, context_dim))
        self.gain = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws W and closes g."""
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.gain)

    def forward(
        self, nodes: Tensor, context: Tensor | None = None, earlier: Any = (), active: Tensor | None = None, **call: Any
    ) -> Tensor:
        """Passes messages between the nodes; heads that are off (`active` False) neither send nor receive."""
        return nodes + self._alpha(needed("context", context), active).to(nodes.dtype) @ nodes

    def matrix(self, context: Tensor | None = None, active: Tensor | None = None) -> Tensor:
        """Returns identity + alpha, `[*, H, H]`."""
        alpha = self._alpha(needed("context", context), active)
        return torch.eye(self.num_heads, dtype=alpha.dtype, device=alpha.device) + alpha

    def _alpha(self, context: Tensor, active: Tensor | None) -> Tensor:
        scores = F.linear(context, self.weight).unflatten(-1, (self.num_heads, self.num_heads))  # [*, H, H]
        if active is not None:
            scores = scores.masked_fill(~active.unsqueeze(-2), float("-inf"))
        alpha = scores.softmax(dim=-1) * self.gain.unsqueeze(-1)  # [*, H, H]
        if active is not None:
            # A row without any sender is not a number before it is masked.
            alpha = alpha.masked_fill(~active.unsqueeze(-1), 0.0)
        return alpha


class OwnContext(SiteGraph):
    """A head graph over a complete graph whose edges read the heads themselves, in place of the block's input.

    Formula, shapes and neutral start are those of `HeadGraphConv` with the context c(t) = concat_i z_i(t).

    Args:
        num_heads, head_dim, context_dim: H, D and M (not used: the context has H * D numbers).

    Example:
        >>> z, x = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 20)
        >>> torch.equal(OwnContext(5, 4, 20)(z, x), z)
        True
    """

    def __init__(self, num_heads: int, head_dim: int, context_dim: int) -> None:
        from gohgraph.graphs.conv import HeadGraphConv

        super().__init__()
        self.num_heads = num_heads
        self.traits = Traits(num_heads, FEATURES)
        self.conv = HeadGraphConv(head_graph(num_heads), head_dim, num_heads * head_dim)

    def forward(
        self, nodes: Tensor, context: Tensor | None = None, earlier: Any = (), active: Tensor | None = None, **call: Any
    ) -> Tensor:
        """Passes messages between the nodes; the context is not read."""
        return self.conv(nodes, nodes.flatten(-2), active=active)
