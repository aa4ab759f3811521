"""The part of a head graph that one tensor-parallel rank computes, under gohgraph's own engine and Megatron-Core's."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from gohgraph.common.checks import there
from gohgraph.graphs.conv import HeadGraphConv
from gohgraph.graphs.edge_tables import EdgeTables
from gohgraph.graphs.edges import EdgeWeights
from gohgraph.graphs.protocol import Losses, Traits
from gohgraph.parallel.collectives import gather_heads, local, scatter_heads, sum_gradients
from gohgraph.parallel.exchange import GATHER, SCATTER, plan_exchange


class ShardedEdgeWeights(EdgeWeights):
    """The weights of the edges that this rank computes.

    On a mesh the parameters are sharded where the edges of the ranks are equal runs; otherwise every rank holds them
    all and the gradients are added over ranks. In a plain process group every rank holds its own edges' part.

    Args:
        edges: all weights; its parameters are taken over.
        edges_of_ranks: of every rank, the indices of its edges.
        ranks: the tensor-parallel ranks, a mesh of one dimension or a process group.
    """

    # This rank's edges of what all ranks hold; `None` where it holds but its part.
    chosen: Tensor | None

    def __init__(
        self, edges: EdgeWeights, edges_of_ranks: Sequence[Sequence[int]], ranks: DeviceMesh | ProcessGroup
    ) -> None:
        nn.Module.__init__(self)
        for name in ("context_dim", "kind", "rank", "activation", "rounds", "scale", "scale_start"):
            setattr(self, name, getattr(edges, name))
        self.group = group_of(ranks)
        chosen = torch.tensor(edges_of_ranks[self.group.rank()], dtype=torch.long, device=edges.bias.device)  # [E']
        self.num_edges = len(chosen)
        is_whole = isinstance(ranks, DeviceMesh) and (edges.kind == "frozen" or not are_equal_runs(edges_of_ranks))
        for name in ("bias", "weight"):
            value = getattr(edges, name)
            part = value if is_whole or value is None else _cut(value, 1, chosen, ranks)
            if edges.kind == "frozen":
                self.register_buffer(name, part)
            else:
                self.register_parameter(name, cast(nn.Parameter, part))
        self.down, self.learned_scale = edges.down, edges.learned_scale
        self.register_buffer("scaled", None if edges.scaled is None else edges.scaled[chosen], persistent=False)
        self.register_buffer("chosen", chosen if is_whole else None, persistent=False)

    def forward(self, context: Tensor | None = None) -> Tensor:
        """Returns the weights of this rank's edges, `[*, R, E of the rank]`."""
        down = None if self.down is None else sum_gradients(self.down, self.group)
        bias = rows_here(self.bias, 1, self.chosen, self.group)
        weight = None if self.weight is None else rows_here(self.weight, 1, self.chosen, self.group)
        if context is not None:
            # Who made a DTensor of what all ranks hold adds the gradients; of a plain tensor it is done here.
            context = local(context) if isinstance(context, DTensor) else sum_gradients(context, self.group)
        factor = None if self.learned_scale is None else sum_gradients(self.learned_scale, self.group)
        return self.rescaled(self._activated(context, bias, weight, down), factor)


class ShardedHeadGraphConv(HeadGraphConv):
    r"""The messages to the heads of one rank, or, where a reduce-scatter is cheaper, those from its heads.

    .. math:: z'_i = z_i + \sum_{j \text{ here}} \alpha_{ji} z_j + \sum_{j \text{ elsewhere}} \alpha_{ji} z_j

    The second sum comes by one collective a round: an all-gather of the z_j that others need, or a reduce-scatter of
    the sums for heads elsewhere. A graph without edges between ranks communicates nothing. All ranks together equal
    `HeadGraphConv` on all heads in value and gradient. Where `top_edges` has to choose between edges of exactly equal
    weight, another number of ranks may choose another of them.

    Args:
        conv: the whole graph; its parameters are taken over.
        ranks: the tensor-parallel ranks; H is a multiple of their number. On a `DeviceMesh` of one dimension parameters
            have the shape they have in the whole graph, and `state_dict` has the same names. In a plain process group
            every rank holds, of its edges and heads, a part: a run of the whole, which a reduce-scatter would not have.
        over_maps: the nodes are attention scores. They do not travel: `gather_senders` brings the queries and keys
            they are made of.

    Attributes:
        group: the process group of the ranks.
        exchange: the plan, see `Exchange`.
        global_edges: the edges `[2, E']` that this rank computes, by their heads in the whole graph.

    Shape:
        z `[*, H/n, D]`, context `[*, M]` of all ranks, active bool `[*, H]` -> `[*, H/n, D]`. With `over_maps`, z holds
        the scores of this rank's heads and of those that `gather_senders` appended.
    """

    by_layer = False
    # Buffers, see `_place`.
    global_edges: Tensor
    edges_by_place: Tensor
    held_senders: Tensor | None
    sent: Tensor
    arrived: Tensor
    summed: Tensor

    def __init__(self, conv: HeadGraphConv, ranks: DeviceMesh | ProcessGroup, *, over_maps: bool = False) -> None:
        # What the parent's constructor makes is taken over from `conv`.
        super(HeadGraphConv, self).__init__(aggr="add", node_dim=-2)
        self.group, self.over_maps = group_of(ranks), over_maps
        for name in ("head_dim", "backend", "cross_layer", "reach", "top_edges"):
            setattr(self, name, getattr(conv, name))
        is_mesh, competes = isinstance(ranks, DeviceMesh), over_maps or conv.top_edges is not None
        edges = [(j, i) for j, i in conv.edge_index.t().tolist()]
        of_heads = [(j % conv.num_heads, i) for j, i in edges]
        self.exchange = plan_exchange(
            conv.num_heads, self.group.size(), of_heads, may_scatter=is_mesh and not competes
        )
        if over_maps and conv.rounds > 1 and self.exchange.width:
            raise ValueError(
                f"Expected one round of messages between scores across ranks (got {conv.rounds}). Do set rounds=1, or "
                "keep the edges of a score graph within ranks."
            )
        edges_of_ranks = self.exchange.edges_of_ranks(edges)
        self.edges = ShardedEdgeWeights(conv.edges, edges_of_ranks, ranks)
        self.register_buffer("edge_index", conv.edge_index)
        self.fusion, self.gain, self.traits = conv.fusion, conv.gain, conv.traits
        self._place([edges[index] for index in edges_of_ranks[self.group.rank()]])
        if self.gain is not None and not is_mesh:
            self.gain = _cut(self.gain, 0, there(self.held_senders), ranks)
            self.held_senders = None

    def _place(self, edges: list[tuple[int, int]]) -> None:
        """Makes the tables that say where the heads of this rank's edges lie here."""
        places = self.exchange.places(self.group.rank(), edges, 1 + self.cross_layer)
        self.num_heads, self.num_senders = places.num_receivers, places.num_senders
        tables = {
            "global_edges": _pairs(edges),
            "edges_by_place": _pairs(places.edges),
            "held_senders": torch.tensor(places.senders, dtype=torch.long),
            "sent": torch.tensor(places.sent, dtype=torch.long),
            "arrived": torch.tensor(places.arrived, dtype=torch.long),
            "summed": torch.tensor(places.summed, dtype=torch.long),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.to(self.edge_index.device), persistent=False)
        self.edges_changed()

    def edges_changed(self) -> None:
        """Makes anew what follows from the edges of this rank."""
        super().edges_changed()
        # Edges are in the order of the whole graph; here senders of other ranks stand behind this rank's.
        self.in_order = self.cell_of_edge.tolist() == list(range(self.num_heads * self.num_senders))

    def _traits(self, tables: EdgeTables) -> Traits:
        return super()._traits(tables)._replace(num_heads=self.exchange.per_rank)

    @property
    def local_edges(self) -> Tensor:
        """Edges of this rank `[2, E']`: the place of the sender among the nodes here, and of the receiver."""
        return self.edges_by_place

    @property
    def is_complete(self) -> bool:
        """True when edges in order are the rows of the adjacency."""
        return self.in_order

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
        """Passes messages to the nodes of this rank."""
        if not (self.over_maps and self.exchange.width):
            return super().forward(z, context, earlier, active)
        alpha = self.edge_weight(context, 0, active).to(z.dtype)
        return super()._add_messages(z[..., : self.exchange.per_rank, :], z, alpha)

    def gather_senders(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Returns queries and keys with those of the senders of other ranks appended."""
        q, k = self._gathered(q, k)
        return q, k

    def _gathered(self, *nodes: Tensor) -> tuple[Tensor, ...]:
        """Appends the senders of other ranks that this one receives from, in one all-gather of all with equal shapes.

        Args:
            *nodes: such as queries and keys, `[*, H/n, D]` each; of earlier layers, `[*, H/n * (1+w), D]`. Those with
                fewer heads, such as the keys of groups, get a copy for each of the group.

        Returns:
            `[*, S, D]` each; the nodes themselves where nothing is gathered.
        """
        if self.exchange.kind != GATHER:
            return nodes
        held = self.exchange.per_rank * (1 + self.cross_layer)
        nodes = tuple(each.repeat_interleave(held // each.shape[-2], dim=-2) for each in nodes)  # [*, S', D] each
        sent = [each.index_select(-2, self.sent) for each in nodes]  # [*, b, D] each
        if len(nodes) > 1 and len({each.shape for each in sent}) == 1:
            joined = gather_heads(torch.cat(sent, dim=-1), self.group)  # [*, n*b, len(sent)*D]
            arrived: Sequence[Tensor] = joined.chunk(len(sent), dim=-1)  # [*, n*b, D] each
        else:
            arrived = [gather_heads(each, self.group) for each in sent]
        needed = [each.index_select(-2, self.arrived) for each in arrived]  # [*, S-H/n, D] each
        return tuple(torch.cat(both, dim=-2) for both in zip(nodes, needed, strict=True))

    def _senders(self, nodes: Tensor, earlier: Sequence[Tensor]) -> Tensor:
        return self._gathered(super()._senders(nodes, earlier))[0]  # [*, S, D]

    def _gain(self) -> Tensor | None:
        return None if self.gain is None else rows_here(self.gain, 0, self.held_senders, self.group)  # [S', D]

    def _add_messages(self, z: Tensor | None, senders: Tensor, alpha: Tensor) -> Tensor:
        if self.exchange.kind != SCATTER:
            return super()._add_messages(z, senders, alpha)
        rows = self.exchange.per_rank
        sums = super()._add_messages(None, senders, alpha)  # [*, h + n*c, D]
        arrived = scatter_heads(sums[..., rows:, :], self.group)  # [*, c, D]
        received = sums[..., :rows, :].index_add(-2, self.summed, arrived)  # [*, h, D]
        return received if z is None else z + received

    def _fusion(self) -> Tensor | None:
        return None if self.fusion is None else sum_gradients(self.fusion, self.group)

    def _crosses_layers(self) -> Tensor:
        return self.global_edges[0] >= self.exchange.num_heads  # [E']

    def _linked(self, active: Tensor) -> Tensor:
        active = local(active)
        # Heads of earlier layers that were off there send zeros: only the receiver counts.
        sending = F.pad(active, (0, self.cross_layer * active.shape[-1]), value=True)  # [*, (1+w)*H]
        senders, receivers = self.global_edges
        return sending.index_select(-1, senders) & active.index_select(-1, receivers)  # [*, E']

    def _check_nodes(self, z: Tensor, earlier: Sequence[Tensor]) -> None:
        if z.dim() < 2 or z.shape[-2] != self.exchange.per_rank:
            raise ValueError(
                f"Expected nodes of shape [*, {self.exchange.per_rank}, D], this rank's heads (got {list(z.shape)}). "
                "Do shard the projections too, with tensor_parallel."
            )
        super()._check_nodes(z, earlier)


def group_of(ranks: DeviceMesh | ProcessGroup) -> ProcessGroup:
    """The process group of a mesh of one dimension, or the group that `ranks` is."""
    return ranks.get_group() if isinstance(ranks, DeviceMesh) else ranks


def rows_here(value: Tensor, dim: int, chosen: Tensor | None, group: ProcessGroup) -> Tensor:
    """This rank's rows along `dim`: those `chosen` of what all ranks hold; all (`None`) of a shard or part."""
    if chosen is None:
        return local(value)
    return sum_gradients(value, group).index_select(dim, chosen)


def are_equal_runs(edges_of_ranks: Sequence[Sequence[int]]) -> bool:
    """Whether the ranks' indices are equal runs of consecutive ones, rank after rank: what a sharded tensor holds.

    Example:
        >>> are_equal_runs([[0, 1], [2, 3]]), are_equal_runs([[0, 2], [1, 3]]), are_equal_runs([[0], [1, 2]])
        (True, False, False)
    """
    flat = [index for of_rank in edges_of_ranks for index in of_rank]
    return len({len(of_rank) for of_rank in edges_of_ranks}) == 1 and flat == list(range(len(flat)))


def _cut(value: Tensor, dim: int, chosen: Tensor, ranks: DeviceMesh | ProcessGroup) -> Tensor:
    """This rank's rows of a parameter or buffer: a shard on a mesh, of which they are an equal run, or a plain part."""
    part: Tensor
    if isinstance(ranks, DeviceMesh):
        part = distribute_tensor(value.data, ranks, [Shard(dim)])
    else:
        part = value.detach().index_select(dim, chosen)
    return nn.Parameter(part, value.requires_grad) if isinstance(value, nn.Parameter) else part


def _pairs(edges: list[tuple[int, int]]) -> Tensor:
    return torch.tensor(edges, dtype=torch.long).reshape(-1, 2).t().contiguous()  # [2, E]
