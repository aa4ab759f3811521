"""Score graphs whose edges weigh the key's token too."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch_geometric.data import Data

from gohgraph.common.checks import needed
from gohgraph.graphs.conv import HeadGraphConv
from gohgraph.graphs.edge_tables import EdgeTables
from gohgraph.graphs.edges import EdgeWeights
from gohgraph.graphs.protocol import Losses, Traits


class KeyedGraphConv(HeadGraphConv):
    r"""Score graph with a weight for the query's token and one for the key's on every edge.

    .. math::
        a'_i(t, s) = \sum_j w_{ji}(t)\, u_{ji}(s)\, a_j(t, s), \qquad
        w = \mathrm{identity} + \alpha(x(t)), \qquad u = 1 + \beta(x(s))

    alpha and beta are `EdgeWeights`, both zero at the start. Up to in-degree 4 attention runs it as wide heads, whose
    keys are weighted: `K'_i(s) = concat_j u_ji(s) k_j(s)`; this class's `forward` is the slow form for all others.

    Source: DCMHA (arXiv 2405.08553, equations 5 to 8) composes scores by the query's and by the key's token, in a sum;
    here it is a product, as wide heads need it, on the edges of a graph.

    Args:
        graph, head_dim, context_dim, **options: as in `HeadGraphConv`, of one round, without `cross_layer`, `norm`
            and `top_edges`.

    Shape:
        scores `[B, T, H, S]`, context `[B, T, M]`, keys `[B, S, E]` -> `[B, T, H, S]`.

    Raises:
        ValueError: an option that keyed edges do not have, and as `HeadGraphConv`.

    Example:
        >>> import torch
        >>> from gohgraph.graphs.graph import head_graph
        >>> conv = KeyedGraphConv(head_graph(5, "ring"), head_dim=4, context_dim=20)
        >>> scores, x = torch.randn(2, 3, 5, 7), torch.randn(2, 3, 20)
        >>> torch.equal(conv(scores, x, keys=conv.key_state(torch.randn(2, 7, 20))), scores)
        True
    """

    def __init__(self, graph: Data, head_dim: int, context_dim: int, **options: Any) -> None:
        super().__init__(graph, head_dim, context_dim, **options)
        refused = {"rounds": self.rounds != 1, "cross_layer": self.cross_layer, "norm": self.gain is not None}
        for option, is_set in {**refused, "top_edges": self.top_edges is not None}.items():
            if is_set:
                raise ValueError(
                    f"Expected keyed edges of one plain round (got {option} set). Do leave {option} at its default."
                )
        edges = self.edges
        self.key_edges = EdgeWeights(
            edges.num_edges, context_dim, kind=edges.kind, rank=edges.rank, activation=edges.activation,
            scale=edges.scale,
        )  # fmt: skip

    def key_state(self, source: Tensor) -> Tensor:
        """Returns beta of the keys' tokens, `[B, S, M] -> [B, S, E]`."""
        return self.key_edges(source)[..., 0, :].expand(*source.shape[:-1], -1)  # [B, S, E]

    def keep_edges(self, kept: Tensor) -> None:
        """Leaves the edges of a bool mask `[E]`, on the query's and the key's side."""
        super().keep_edges(kept)
        self.key_edges.keep_edges(kept.to(self.edge_index.device))

    def reset_parameters(self) -> None:
        """Returns to the neutral start."""
        super().reset_parameters()
        self.key_edges.reset_parameters()

    def _traits(self, tables: EdgeTables) -> Traits:
        # Its map of the nodes is another one for every key.
        in_degree, sites = super()._traits(tables).in_degree, frozenset({"scores"})
        return Traits(self.num_heads, sites, keyed=True, in_degree=in_degree, limited_by='kind="keyed"')

    def forward(
        self,
        z: Tensor,
        context: Tensor | None = None,
        earlier: Sequence[Tensor] = (),
        active: Tensor | None = None,
        *,
        keys: Tensor | None = None,
        losses: Losses | None = None,
        values: Tensor | None = None,
    ) -> Tensor:
        """Mixes scores `[B, T, H, S]` under the contexts of query and key; see `SiteGraph.forward`."""
        self._check_nodes(z, ())
        senders, receivers = self.edge_index
        alpha = self.edge_weight(context, 0, active).to(z.dtype).unsqueeze(-1)  # [B, T, E, 1] or [E, 1]
        beta = needed("state of the keys", keys).to(z.dtype).transpose(1, 2).unsqueeze(1)  # [B, 1, E, S]
        is_loop = (senders == receivers).to(z.dtype).unsqueeze(-1)  # [E, 1]
        # The identity's part of an edge i -> i is already in z.
        message = ((is_loop + alpha) * (1 + beta) - is_loop) * z.index_select(-2, senders)  # [B, T, E, S]
        return z.index_add(-2, receivers, message)
