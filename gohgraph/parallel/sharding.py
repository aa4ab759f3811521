"""Data parallelism of sharded models: who holds which part of a parameter, and what is computed again."""

from typing import TypeVar

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from gohgraph.graphs.protocol import SiteGraph
from gohgraph.models.stacks import DecoderLayer, EncoderLayer, Stack
from gohgraph.parallel.layout import Layout
from gohgraph.parallel.tensor import tensor_parallel

Module = TypeVar("Module", bound=nn.Module)


def parallelize(model: Module, layout: Layout) -> Module:
    """Spreads a model over the ranks of a layout; without `"tp"` and `"fsdp"`, wrap it in DDP instead.

    Args:
        model: on the device of this rank; changed in place and returned.
        layout: of the job.
    """
    if layout.config.recompute:
        recompute(model)
    if layout.tensor is not None:
        tensor_parallel(model, layout.tensor, sequence_parallel=layout.config.sequence_parallel)
    return model if layout.data is None else shard_data(model, layout.data)


def recompute(model: Module) -> Module:
    """Lets backward compute the inside of every layer again (arXiv 1604.06174), which saves its memory.

    A learned topology, which counts what it sees, is a `ValueError`.
    """
    if any(isinstance(part, SiteGraph) and part.traits.learned for part in model.modules()):
        raise ValueError(
            "Expected no learned topology where layers are recomputed (got a LearnedTopologyConv). Do keep activations."
        )
    for stack in (part for part in model.modules() if isinstance(part, Stack)):
        stack.recompute = True
    return model


def shard_data(model: Module, mesh: DeviceMesh) -> Module:
    """Shards parameters, gradients and optimizer state over data-parallel ranks with FSDP2, layer by layer.

    Args:
        model: changed in place and returned; it may be tensor parallel over another dimension of the same mesh.
        mesh: one dimension; or (replicate, shard), of which the first holds copies: with a shard of one it is plain
            data parallelism.
    """
    size = mesh.size(mesh.ndim - 1)

    def place(parameter: nn.Parameter) -> Shard | None:
        return Shard(_dimension(parameter, size))

    for layer in [part for part in model.modules() if isinstance(part, (EncoderLayer, DecoderLayer))]:
        fully_shard(layer, mesh=mesh, shard_placement_fn=place)
    fully_shard(model, mesh=mesh, shard_placement_fn=place)
    return model


def _dimension(parameter: nn.Parameter, ranks: int) -> int:
    """The first dimension that splits evenly; edges come as `[R, E, M]`, and R is mostly 1."""
    taken = parameter.placements[0] if isinstance(parameter, DTensor) else None
    for dim, size in enumerate(parameter.shape):
        if size % ranks == 0 and not (isinstance(taken, Shard) and taken.dim == dim):
            return dim
    return 0
