"""Graph-convolution experts: rounds of messages between two kinds of heads."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.data import Data

from gohgraph.common.checks import check_int
from gohgraph.graphs.conv import HeadGraphConv
from gohgraph.graphs.edge_tables import EdgeTables
from gohgraph.graphs.protocol import ALIGNMENT, FEATURES, Losses, Traits


class GraphExperts(HeadGraphConv):
    r"""Graph-convolution experts: heads of two kinds exchange one-hop messages for R rounds, and all rounds are fused.

    .. math::
        m_i^{(r)} &= \sum_{j \to i} \alpha_{ji}^{(r)}\, (z_j^{(r-1)} + e_{\mathrm{kind}(j)} + u_j), \qquad
        z_i^{(r)} = z_i^{(r-1)} + m_i^{(r)} \\
        z_i' &= z_i^{(0)} + \sum_r (1 + f_r)\, m_i^{(r)}, \qquad
        L_\text{align} = \mathrm{mean}_{t, i}\big(1 - \cos(z_i^{(0)}(t), z_i^{(R)}(t))\big)

    e and u are embeddings of the sender's kind and of the sender; alpha, R and f are those of `HeadGraphConv`. On a
    bipartite graph (`head_graph(H, "bipartite", num_shared=h_s)`), round r brings news from r hops away. New experts
    send nothing, whatever their embeddings.

    Source: the analogue over heads of GaCLLM (Du et al. 2024, arXiv 2402.08859), where a language model aggregates the
    neighbours in a bipartite user-item graph, L rounds, with a prompt for each kind of node, and the descriptions of
    all rounds are aligned and fused. Differs: aggregation is a signed sum; the alignment is between first and last
    round of a head by their cosine, not between texts and graph embeddings.

    Args:
        graph, head_dim, context_dim, rounds, **options: as in `HeadGraphConv`.
        num_shared: h_s in 0..H; the first h_s heads are of one kind, the others of another.

    Shape:
        as `HeadGraphConv`; asked for the loss `"alignment"`, it gives 1 - cos of every node, `[*, H]`.

    Example:
        >>> from gohgraph.graphs.graph import head_graph
        >>> graph = head_graph(5, "bipartite", num_shared=2)
        >>> experts = GraphExperts(graph, head_dim=4, context_dim=20, num_shared=2, rounds=3)
        >>> z, x = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 20)
        >>> torch.equal(experts(z, context=x), z)
        True
    """

    by_layer = False
    options: ClassVar[dict[str, str]] = {**HeadGraphConv.options, "num_shared": "num_shared"}

    def __init__(
        self,
        graph: Data,
        head_dim: int,
        context_dim: int,
        num_shared: int,
        *,
        rounds: int = 2,
        **options: Any,
    ) -> None:
        super().__init__(graph, head_dim, context_dim, rounds=rounds, **options)
        check_int("num_shared", num_shared, low=0, high=self.num_heads)
        self.num_shared = num_shared
        self.kind_embedding = nn.Parameter(torch.empty(2, head_dim))
        self.head_embedding = nn.Parameter(torch.empty(self.num_heads, head_dim))
        self._reset_embeddings()

    def _traits(self, tables: EdgeTables) -> Traits:
        # Messages are shifted by the embeddings: no linear map, and features of a size.
        limit = 'kind="experts"'
        return Traits(self.num_heads, FEATURES, reach=self.reach, losses=(ALIGNMENT,), limited_by=limit)

    def reset_parameters(self) -> None:
        """Returns to the neutral start."""
        super().reset_parameters()
        self._reset_embeddings()

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
        """Passes messages between the nodes `z [*, H, D]`; see `SiteGraph.forward`."""
        if losses is None or ALIGNMENT not in losses:
            return super().forward(z, context, earlier, active)
        messages = self.messages(z, context, earlier, active)
        losses[ALIGNMENT].append(misalignment(z, z + sum(messages)))
        return self._fuse(z, messages)

    def _senders(self, nodes: Tensor, earlier: Sequence[Tensor]) -> Tensor:
        shared, routed = self.kind_embedding  # [D] each
        split = self.num_shared
        embeddings = torch.cat((self.head_embedding[:split] + shared, self.head_embedding[split:] + routed))  # [H, D]
        embeddings = embeddings.repeat(1 + self.cross_layer, 1).to(nodes.dtype)  # [S, D]
        senders = super()._senders(nodes, earlier)  # [*, S, D]
        if self.cross_layer:
            # A head that was off in its layer is all zero here, and sends no embedding either.
            embeddings = torch.where(senders.ne(0).any(dim=-1, keepdim=True), embeddings, 0.0)  # [*, S, D]
        return senders + embeddings

    def _reset_embeddings(self) -> None:
        nn.init.normal_(self.kind_embedding, std=0.02)
        nn.init.normal_(self.head_embedding, std=0.02)


def misalignment(first: Tensor, last: Tensor) -> Tensor:
    """Returns 1 - cos between the first and the last state of every head, `[*, H, D]` twice -> `[*, H]`, in [0, 2].

    Example:
        >>> z = torch.randn(2, 5, 4)
        >>> misalignment(z, 3 * z).max().item() < 1e-5, round(misalignment(z, -z).min().item(), 4)
        (True, 2.0)
    """
    # Close to 1 a cosine in bfloat16 moves in steps of 1/256.
    wide = torch.promote_types(first.dtype, torch.float32)
    return 1 - F.cosine_similarity(first.to(wide), last.to(wide), dim=-1)
