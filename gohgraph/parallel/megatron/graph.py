"""A sharded head graph as Megatron-Core optimises and saves it."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.distributed import ProcessGroup

from gohgraph.graphs.conv import HeadGraphConv
from gohgraph.parallel.sharded_graph import ShardedHeadGraphConv

# The axis along which a rank holds its part; every other tensor is whole on all ranks.
SHARDED_AXIS = {"edges.bias": 1, "edges.weight": 1, "graph_edges": 1, "gain": 0}


class MegatronHeadGraphConv(ShardedHeadGraphConv):
    """A `ShardedHeadGraphConv` in a plain process group, with the parts' places in Megatron-Core's checkpoints.

    Rank r of n holds heads r*H/n to (r+1)*H/n - 1 and the weights of the edges into them.

    Args:
        conv: the whole graph, of one layer and dense; its parameters are taken over.
        group: process group of the n ranks; n divides H.
        over_maps: as in `ShardedHeadGraphConv`.
    """

    # This rank's edges, by the name that checkpoints have for them.
    graph_edges: Tensor

    def __init__(self, conv: HeadGraphConv, group: ProcessGroup, *, over_maps: bool = False) -> None:
        super().__init__(conv, group, over_maps=over_maps)
        # Checkpoints hold every rank's edges, by a name of their own, instead of the whole graph.
        self.register_buffer("edge_index", self.edge_index, persistent=False)
        self.register_buffer("graph_edges", self.global_edges)
        for name, parameter in self.named_parameters():
            if name in SHARDED_AXIS:
                set_tensor_model_parallel_attributes(parameter, True, SHARDED_AXIS[name], 1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Sequence[tuple[int, int, int]] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Returns the tensors with their places in the whole graph, for Megatron-Core's distributed checkpoints."""
        data_ranks = metadata["dp_cp_group"]
        tensors = self.state_dict(keep_vars=True)
        # A copy: loading writes into what it is given, and what was saved is compared with what is here.
        tensors["graph_edges"] = tensors["graph_edges"].clone()
        first_head = self.exchange.heads_of(self.group.rank()).start
        # Edges are in the order of their receivers: those of a rank follow one another.
        first_edge = int((self.edge_index[1] < first_head).sum())
        places = dict.fromkeys(SHARDED_AXIS, (first_edge, self.edge_index.shape[1]))
        places["gain"] = (first_head, self.exchange.num_heads)
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

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        saved = state_dict.get(prefix + "graph_edges")
        if saved is not None and not torch.equal(saved.cpu(), self.graph_edges.cpu()):
            errors.append(
                f"Expected weights of this head graph at {prefix!r} (got another graph, {saved.shape[1]} edges on "
                "this rank). Do build the model with the topology it was saved with."
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
