"""The part of a head graph that one tensor-parallel rank computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from gohgraph.graphs.conv import HeadGraphConv
from gohgraph.graphs.edges import EdgeWeights
from gohgraph.parallel.exchange import (
    GATHER,
    SCATTER,
    gather_heads,
    indices,
    local,
    plan_exchange,
    scatter_heads,
    sum_gradient,
)


class ShardedEdgeWeights(EdgeWeights):
    """The weights of the edges that this rank computes.

    Where the edges of the ranks are equal runs, the parameters are sharded. Otherwise every rank holds them all and
    the gradients are added over ranks.

    Args:
        edges: all weights; its parameters are taken over.
        own: of every rank, the indices of its edges.
        mesh: the tensor-parallel ranks, one dimension.
    """

    def __init__(self, edges: EdgeWeights, own: Sequence[Sequence[int]], mesh: DeviceMesh) -> None:
        nn.Module.__init__(self)
        for name in ("context_dim", "kind", "rank", "activation", "rounds", "scale"):
            setattr(self, name, getattr(edges, name))
        mine = own[mesh.get_local_rank()]
        self.num_edges, self.mesh = len(mine), mesh
        self.is_split = are_equal_runs(own) and edges.kind != "frozen"
        self.register_buffer("own", indices(mine, edges.bias.device), persistent=False)
        if edges.kind == "frozen":
            self.register_buffer("bias", edges.bias)
        else:
            self.bias = self._shared(edges.bias)
        self.weight = None if edges.weight is None else self._shared(edges.weight)
        self.down = edges.down

    def _shared(self, parameter: nn.Parameter) -> nn.Parameter:
        if not self.is_split:
            return parameter
        return nn.Parameter(distribute_tensor(parameter.data, self.mesh, [Shard(1)]), parameter.requires_grad)

    def forward(self, context: Tensor | None = None) -> Tensor:
        """Returns the weights of this rank's edges, `[*, R, E of the rank]`."""
        down = None if self.down is None else sum_gradient(self.down, self.mesh)
        return self._activated(local(context), self._mine(self.bias), self._mine(self.weight), down)

    def _mine(self, weights: Tensor | None) -> Tensor | None:
        if weights is None or self.is_split:
            return local(weights)
        whole = sum_gradient(weights, self.mesh) if isinstance(weights, nn.Parameter) else weights
        return whole.index_select(1, self.own)


class ShardedHeadGraphConv(HeadGraphConv):
    r"""The messages to the heads of one rank, or, where a reduce-scatter is cheaper, those from its heads.

    .. math:: z'_i = z_i + \sum_{j \text{ here}} \alpha_{ji} z_j + \sum_{j \text{ elsewhere}} \alpha_{ji} z_j

    The second sum comes by one collective a round: an all-gather of the z_j that others need, or a reduce-scatter of
    the sums for heads elsewhere. Equal to `HeadGraphConv` on all heads; `state_dict` has the same names.

    Args:
        conv: the whole graph; its parameters are taken over.
        mesh: the tensor-parallel ranks, one dimension; H is a multiple of their number.
        maps: the nodes are attention scores. They do not travel: `fetch` brings the queries and keys they are made of.

    Shape:
        z `[*, H/n, D]`, context `[*, M]` of all ranks, active bool `[*, H]` -> `[*, H/n, D]`. With `maps`, z holds the
        scores of this rank's heads and of those that `fetch` appended.

    Raises:
        ValueError: H is not a multiple of the ranks; several rounds of messages between scores across ranks.
    """

    def __init__(self, conv: HeadGraphConv, mesh: DeviceMesh, *, maps: bool = False) -> None:
        # What the parent's constructor makes is taken over from `conv`.
        super(HeadGraphConv, self).__init__(aggr="add", node_dim=-2)
        self.mesh, self.maps = mesh, maps
        self.head_dim, self.backend, self.cross_layer, self.top_edges = (
            conv.head_dim, conv.backend, conv.cross_layer, conv.top_edges
        )  # fmt: skip
        ends = conv.edge_index.t().tolist()
        competes = maps or conv.top_edges is not None
        flat = [(j % conv.num_heads, i) for j, i in ends]
        self.exchange = plan_exchange(conv.num_heads, mesh.size(), flat, may_scatter=not competes)
        if maps and conv.rounds > 1 and self.exchange.width:
            raise ValueError(
                f"Expected one round of messages between scores across ranks (got {conv.rounds}). Do set rounds=1, or "
                "keep the edges of a score graph within ranks."
            )
        own = self.exchange.edges_of_ranks(flat)
        self.edges = ShardedEdgeWeights(conv.edges, own, mesh)
        self.fusion, self.gain = conv.fusion, conv.gain
        self.register_buffer("edge_index", conv.edge_index)
        self._place(conv, own[mesh.get_local_rank()])

    def _place(self, conv: HeadGraphConv, own: list[int]) -> None:
        """Makes the tables that say where the heads of an edge lie here."""
        exchange, device = self.exchange, conv.edge_index.device
        heads, layers = exchange.of(self.mesh.get_local_rank()), 1 + self.cross_layer
        rows, here = len(heads), len(heads) * layers
        behind = {head: place for place, head in enumerate(exchange.order)}
        sent = [layer * rows + head - heads.start for layer in range(layers) for head in self._travelling(heads)]
        links = []
        for edge in own:
            sender, receiver = conv.edge_index[:, edge].tolist()
            layer, head = divmod(sender, conv.num_heads)
            if head in heads:
                place = layer * rows + head - heads.start
            else:
                rank, offset = divmod(behind[head], exchange.width)
                place = here + (rank * layers + layer) * exchange.width + offset
            links.append((place, receiver - heads.start if receiver in heads else rows + behind[receiver]))
        gathered = exchange.ranks * exchange.width
        self.num_heads = rows + (gathered if exchange.kind == SCATTER else 0)
        self.num_senders = here + (gathered * layers if exchange.kind == GATHER else 0)
        own_senders = [layer * conv.num_heads + head for layer in range(layers) for head in heads]
        tables = {
            "ends": conv.edge_index[:, own],
            "own_links": torch.tensor(links, device=device, dtype=torch.long).reshape(-1, 2).t(),
            "own_senders": indices(own_senders, device),
            "sent": indices(sent, device),
            "arriving": indices([head - heads.start for head in self._travelling(heads)], device),
        }
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)
        slots, places = self._slots_and_places()
        self.register_buffer("slots", slots, persistent=False)
        self.register_buffer("places", places, persistent=False)

    def _travelling(self, heads: range) -> tuple[int, ...]:
        return self.exchange.heads[self.mesh.get_local_rank()] if self.exchange.width else ()

    @property
    def links(self) -> Tensor:
        """Edges of this rank `[2, E]`: the place of the sender among the nodes here, and of the receiver."""
        return self.own_links

    def forward(
        self,
        z: Tensor,
        context: Tensor | None = None,
        earlier: Sequence[Tensor] = (),
        active: Tensor | None = None,
    ) -> Tensor:
        """Passes messages to the nodes of this rank."""
        if not (self.maps and self.exchange.width):
            return super().forward(z, context, earlier, active)
        alpha = self.edge_weight(context, 0, active).to(z.dtype)
        return super()._add_messages(z[..., : self.exchange.per_rank, :], z, alpha)

    def fetch(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Appends the queries and keys of senders on other ranks, in one all-gather where both have equal shapes.

        Args:
            q: `[B, T, H/n, D]`.
            k: `[B, S, G/n, D]`; query heads of one group get a copy each.

        Returns:
            `[B, T, H', D]` and `[B, S, H', D]`.
        """
        k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)  # [B, S, H/n, D]
        parts = [x.index_select(2, self.sent) for x in (q, k)]  # [B, T or S, b, D] each
        if parts[0].shape == parts[1].shape:
            parts = gather_heads(torch.cat(parts, dim=-1), self.mesh).chunk(2, dim=-1)  # [B, T, n*b, D] each
        else:
            parts = [gather_heads(part, self.mesh) for part in parts]
        return torch.cat((q, parts[0]), dim=2), torch.cat((k, parts[1]), dim=2)

    def _senders(self, nodes: Tensor, earlier: Sequence[Tensor]) -> Tensor:
        own = torch.cat((nodes, *earlier[: self.cross_layer]), dim=-2) if self.cross_layer else nodes  # [*, S, D]
        if self.gain is not None:
            gain = sum_gradient(self.gain, self.mesh).index_select(0, self.own_senders)  # [S, D]
            own = F.rms_norm(own, (own.shape[-1],)) * gain.to(own.dtype)
        if self.exchange.kind != GATHER:
            return own
        return torch.cat((own, gather_heads(own.index_select(-2, self.sent), self.mesh)), dim=-2)

    def _add_messages(self, z: Tensor | None, senders: Tensor, alpha: Tensor) -> Tensor:
        if self.exchange.kind != SCATTER:
            return super()._add_messages(z, senders, alpha)
        rows = self.exchange.per_rank
        sums = super()._add_messages(None, senders, alpha)  # [*, h + n*c, D]
        arrived = scatter_heads(sums[..., rows:, :], self.mesh)  # [*, c, D]
        received = sums[..., :rows, :].index_add(-2, self.arriving, arrived)  # [*, h, D]
        return received if z is None else z + received

    def _fusion(self) -> Tensor | None:
        return None if self.fusion is None else sum_gradient(self.fusion, self.mesh)

    def _linked(self, active: Tensor) -> Tensor:
        active = local(active)
        # Heads of earlier layers that were off there send zeros: only the receiver counts.
        sending = F.pad(active, (0, self.cross_layer * active.shape[-1]), value=True)  # [*, (1+w)*H]
        return sending.index_select(-1, self.ends[0]) & active.index_select(-1, self.ends[1])  # [*, E]

    def _check_nodes(self, z: Tensor, earlier: Sequence[Tensor]) -> None:
        if z.dim() < 2 or z.shape[-2] != self.exchange.per_rank:
            raise ValueError(
                f"Expected nodes of shape [*, {self.exchange.per_rank}, D], this rank's heads (got {list(z.shape)}). "
                "Do shard the projections too, with tensor_parallel."
            )
        if len(earlier) < self.cross_layer:
            raise ValueError(
                f"Expected the head outputs of {self.cross_layer} layers before (got {len(earlier)}). "
                "Do pass them as `earlier`, nearest first."
            )


def are_equal_runs(own: Sequence[Sequence[int]]) -> bool:
    """Whether the ranks' indices are equal runs of consecutive ones, rank after rank: what a sharded tensor holds.

    Example:
        >>> are_equal_runs([[0, 1], [2, 3]]), are_equal_runs([[0, 2], [1, 3]]), are_equal_runs([[0], [1, 2]])
        (True, False, False)
    """
    flat = [index for some in own for index in some]
    return len({len(some) for some in own}) == 1 and flat == list(range(len(flat)))


