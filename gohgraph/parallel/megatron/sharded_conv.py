"""A head graph whose heads are sharded over tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.func import functional_call

from gohgraph.graphs.conv import HeadGraphConv
from gohgraph.parallel.exchange import plan_exchange
from gohgraph.parallel.megatron.collectives import copy_to_ranks, gather_heads

# The axis along which a rank holds its part; every other tensor is whole on all ranks.
SHARDED_AXIS = {"edges.bias": 1, "edges.weight": 1, "graph_edges": 1, "gain": 0}


class ShardedHeadGraphConv(HeadGraphConv):
    r"""The part of a `HeadGraphConv` that one tensor-parallel rank works out: the messages its own heads receive.

    .. math:: z'_i(t) = z_i(t) + \sum_{j \to i,\; j \text{ here}} \alpha_{ji}(t)\, z_j(t)
        + \sum_{j \to i,\; j \text{ elsewhere}} \alpha_{ji}(t)\, z_j(t)

    Rank r of n holds heads r*H/n to (r+1)*H/n - 1 and the weights of the edges into them. Heads that some other rank
    receives from travel by one all-gather a round, the others stay; a graph without edges between ranks communicates
    nothing. All ranks together equal the whole graph in value and gradient. Where `top_edges` has to choose between
    edges of exactly equal weight, another number of ranks may choose another of them.

    Args:
        graph: over all H heads.
        head_dim, context_dim, **options: of `HeadGraphConv`, without `cross_layer`, dense.
        group: process group of the n ranks; n divides H.

    Attributes:
        graph_edges: the edges `[2, E']` into this rank's heads, by their heads in the whole graph.

    Raises:
        ValueError: n does not divide H, or an option that `HeadGraphConv` refuses.

    Shape:
        z `[*, H/n, D]`, context `[*, M]` and active `[*, H]`, both equal on all ranks -> `[*, H/n, D]`.
    """

    def __init__(self, graph: Any, head_dim: int, context_dim: int, *, group: Any, **options: Any) -> None:
        super().__init__(graph, head_dim, context_dim, **options)
        if self.num_heads % group.size():
            raise ValueError(
                f"Expected ranks that divide {self.num_heads} heads (got {group.size()}). Do change either."
            )
        self.group, heads = group, self.num_heads // group.size()
        self.first_head, self.whole_heads, self.whole_edges = group.rank() * heads, self.num_heads, self.edges.num_edges
        whole = self.edge_index
        kept = (whole[1] >= self.first_head) & (whole[1] < self.first_head + heads)  # [E]
        # Edges are in the order of their receivers: those kept follow one another.
        self.first_edge = int((whole[1] < self.first_head).sum())
        self.edges.keep_edges(kept)
        self.register_buffer("graph_edges", whole[:, kept])
        self.num_heads = heads
        boundary, needed = self._crossing(whole.t().tolist())
        self.register_buffer("boundary", boundary, persistent=False)
        self.register_buffer("needed", needed, persistent=False)
        self.num_senders = heads + len(needed)
        self.slots, self.places = self._slots_and_places()
        # Edges are in the order of senders in the whole graph; here those of other ranks stand behind this rank's.
        self.in_order = self.places.tolist() == list(range(heads * self.num_senders))
        if self.gain is not None:
            self.gain = nn.Parameter(self.gain.detach()[self.first_head : self.first_head + heads].clone())
        for name, parameter in self.named_parameters():
            if name in SHARDED_AXIS:
                set_tensor_model_parallel_attributes(parameter, True, SHARDED_AXIS[name], 1)

    @property
    def is_complete(self) -> bool:
        """True when edges in order are the rows of the adjacency."""
        return self.in_order

    def with_remote_heads(self, nodes: Tensor) -> Tensor:
        """Returns this rank's nodes `[*, H/n, D]` and behind them those of other ranks that it receives from."""
        if not len(self.boundary):
            return nodes
        gathered = gather_heads(nodes.index_select(-2, self.boundary), self.group)  # [*, n*K, D]
        return torch.cat((nodes, gathered.index_select(-2, self.needed)), dim=-2)  # [*, S, D]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Sequence[tuple[int, int, int]] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Returns the tensors with their places in the whole graph, for Megatron-Core's distributed checkpoints."""
        data_ranks = metadata["dp_cp_group"]
        tensors = self.state_dict(keep_vars=True)
        # A copy: loading writes into what it is given, and what was saved is compared with what is here.
        tensors["graph_edges"] = tensors["graph_edges"].clone()
        places = {name: (self.first_edge, self.whole_edges) for name in SHARDED_AXIS}
        places["gain"] = (self.first_head, self.whole_heads)
        whole = {name: tensor for name, tensor in tensors.items() if name not in SHARDED_AXIS}
        made = make_sharded_tensors_for_checkpoint(
            whole, prefix, {}, sharded_offsets, tp_group=self.group, dp_cp_group=data_ranks
        )
        for name in SHARDED_AXIS:
            tensor = tensors.get(name)
            if tensor is not None:
                place = (SHARDED_AXIS[name], *places[name])
                made[prefix + name] = _part(prefix + name, tensor, place, sharded_offsets, data_ranks.rank())
        return made

    def _crossing(self, edges: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Which of its heads this rank sends, `[K]`, and where in what all send are those it needs."""
        heads, own = self.num_heads, self.group.rank()
        exchange = plan_exchange(self.whole_heads, self.group.size(), edges, may_scatter=False)
        remote = sorted({j for j, i in edges if i // heads == own and j // heads != own})
        boundary = [j - self.first_head for j in exchange.heads[own]] if exchange.width else []
        needed = [exchange.order.index(j) for j in remote]
        numbers = {j: heads + place for place, j in enumerate(remote)}
        senders = [numbers.get(j, j - self.first_head) for j in self.graph_edges[0].tolist()]
        local = torch.stack((torch.tensor(senders, dtype=torch.long), self.graph_edges[1] - self.first_head))  # [2, E']
        self.register_buffer("edge_index", local, persistent=False)
        return torch.tensor(boundary, dtype=torch.long), torch.tensor(needed, dtype=torch.long)

    def _weights(self, context: Tensor | None, active: Tensor | None) -> Tensor:
        # Every rank works out its own edges of a context and a W_1 that all share.
        down = self.edges.down
        shared = {} if down is None else {"down": copy_to_ranks(down, self.group)}
        context = context if context is None else copy_to_ranks(context, self.group)
        return self.select(functional_call(self.edges, shared, (context,)), active)  # [*, R, E'] or [R, E']

    def _linked(self, active: Tensor) -> Tensor:
        senders, receivers = self.graph_edges
        return active.index_select(-1, senders) & active.index_select(-1, receivers)  # [*, E']

    def _senders(self, nodes: Tensor, earlier: Sequence[Tensor]) -> Tensor:
        return self.with_remote_heads(super()._senders(nodes, earlier))

    def _fuse(self, z: Tensor, messages: list[Tensor]) -> Tensor:
        fusion = copy_to_ranks(self.fusion, self.group)
        for factor, message in zip(fusion, messages, strict=True):
            z = z + (1 + factor).to(message.dtype) * message
        return z

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        saved = state_dict.get(prefix + "graph_edges")
        if saved is not None and not torch.equal(saved.cpu(), self.graph_edges.cpu()):
            errors.append(
                f"Expected weights of this head graph at {prefix!r} (got another graph). Do build the model with the "
                "topology it was saved with."
            )
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)


def _part(
    key: str,
    tensor: Tensor,
    place: tuple[int, int, int],
    sharded_offsets: Sequence[tuple[int, int, int]],
    data_rank: int,
) -> ShardedTensorFactory:
    """The part of a whole tensor that begins at (axis, offset, of) there; ranks hold parts of unequal lengths."""
    layers = len(sharded_offsets)
    shape, offset = [1] * layers + list(tensor.shape), [0] * (layers + tensor.dim())
    for axis, index, of in sharded_offsets:
        shape[axis], offset[axis] = of, index
    axis, first, of = place
    shape[layers + axis], offset[layers + axis] = of, first

    # Parts of unequal lengths need the axes of layers, which other tensors prepend, in the tensor itself.
    def build(key: str, tensor: Tensor, replica_id: Any, flattened_range: None) -> ShardedTensor:
        data = tensor.detach().view((1,) * layers + tensor.shape)  # [1, ...]
        sizes = (tuple(data.shape), tuple(shape), tuple(offset))
        return ShardedTensor(key, data, data.dtype, *sizes, axis_fragmentations=None, replica_id=replica_id)

    return ShardedTensorFactory(
        key, tensor, build, lambda loaded: loaded.view(tensor.shape), replica_id=(0, 0, data_rank)
    )
