"""Head graphs that lose their weakest edges while they train."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch_geometric.data import Data

from gohgraph.common.checks import check_int
from gohgraph.graphs.conv import HeadGraphConv
from gohgraph.graphs.edge_tables import EdgeTables
from gohgraph.graphs.protocol import Traits

MEMORY = 0.99


class LearnedTopologyConv(HeadGraphConv):
    r"""Head graph whose topology is learned: it starts with all edges of `graph` and keeps the strongest.

    .. math:: \alpha'_{ji}(t) = \mathrm{kept}_{ji}\, \alpha_{ji}(t), \qquad
        \text{strength}_{ji} = \mathrm{mean}_{t, r}\, |\alpha_{ji}(t)|

    `prune(k)` leaves every head its k strongest incoming edges, for good and for all tokens; strength is a running
    mean over the tokens of training (a share of 0.01 for every batch). The training loop prunes in steps
    (`TrainConfig.anneal_in_degree`). `top_edges` of `HeadGraphConv` chooses for each token anew instead.

    Args:
        graph, head_dim, context_dim, **options: as in `HeadGraphConv`.
        in_degree: k >= 1, edges that every head is to keep, its self-loop among them where it is strong enough.

    Shape:
        as `HeadGraphConv`: nodes `[*, H, D]`, context `[*, M]` -> `[*, H, D]`.

    Attributes:
        kept: bool `[E]`, the edges that are left; saved with the weights, as their strength `[E]` is.

    Example:
        >>> from gohgraph.graphs.graph import head_graph
        >>> conv = LearnedTopologyConv(head_graph(5), head_dim=4, context_dim=20, in_degree=2)
        >>> conv.prune(conv.in_degree)
        >>> conv.kept.sum().item(), conv.topology().edge_index.shape
        (10, torch.Size([2, 10]))
    """

    in_chunks = False
    kept: Tensor
    strength: Tensor
    options: ClassVar[dict[str, str]] = {**HeadGraphConv.options, "in_degree": "keep_in_degree"}

    def __init__(self, graph: Data, head_dim: int, context_dim: int, in_degree: int, **options: Any) -> None:
        super().__init__(graph, head_dim, context_dim, **options)
        check_int("in_degree", in_degree, low=1)
        self.in_degree = in_degree
        self.register_buffer("kept", torch.ones(self.edges.num_edges, dtype=torch.bool))
        self.register_buffer("strength", torch.zeros(self.edges.num_edges))

    def reset_parameters(self) -> None:
        """Returns to the neutral start, with all edges."""
        super().reset_parameters()
        nn.init.ones_(self.kept)
        nn.init.zeros_(self.strength)

    @property
    def largest_in_degree(self) -> int:
        """Edges into the head that has most of them, in the graph this one started from."""
        return int(torch.bincount(self.edge_index[1]).max()) if self.edges.num_edges else 0

    @torch.no_grad()
    def prune(self, in_degree: int) -> None:
        """Leaves every head its `in_degree` strongest incoming edges, of those left; ties go to the lower sender."""
        size = torch.where(self.kept, self.strength.float(), -1.0)
        order = self._dense(size + 2)  # [H, S], 0 where there is no edge, below 2 where it is gone
        best = order.argsort(dim=-1, descending=True, stable=True)[:, :in_degree]  # [H, k]
        chosen = torch.zeros_like(order).scatter(-1, best, 1.0).flatten().index_select(0, self.cell_of_edge)  # [E]
        self.kept &= chosen.bool()

    def _traits(self, tables: EdgeTables) -> Traits:
        # What is pruned is measured on all heads.
        return super()._traits(tables)._replace(sharded=False, learned=True)

    def keep_edges(self, kept: Tensor) -> None:
        """Leaves the edges of a bool mask `[E]` in the graph."""
        super().keep_edges(kept)
        kept = kept.to(self.kept.device)
        self.kept, self.strength = self.kept[kept], self.strength[kept]

    def select(self, alpha: Tensor, active: Tensor | None = None) -> Tensor:
        """Returns the weights `[*, R, E]` with zeros for edges that are pruned, or left out for the token."""
        return super().select(alpha, active) * self.kept

    def topology(self) -> Data:
        """Returns the graph that is left, edges from sender to receiver."""
        return Data(edge_index=self.edge_index[:, self.kept], num_nodes=self.num_heads)

    def _weights(self, context: Tensor | None, active: Tensor | None) -> Tensor:
        weights = super()._weights(context, active)
        if self.training:
            seen = weights.detach().abs().flatten(0, -2).mean(dim=0)  # [E]
            self.strength.lerp_(seen.to(self.strength.dtype), 1 - MEMORY)
        return weights
