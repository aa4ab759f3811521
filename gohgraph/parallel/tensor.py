"""Tensor parallelism: every rank holds some of the heads, and the head graphs' messages travel between ranks."""

from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from gohgraph.attention.block import MultiHeadAttention
from gohgraph.graphs.protocol import MAPS, check_site
from gohgraph.models.embeddings import QueryKeyNorm
from gohgraph.models.objects import FeedForward
from gohgraph.models.stacks import Stack, StackOutput
from gohgraph.models.sublayers import Residual
from gohgraph.parallel.collectives import gather_parts, local, own_part

if TYPE_CHECKING:
    from gohgraph.graphs.conv import HeadGraphConv
    from gohgraph.parallel.sharded_graph import ShardedHeadGraphConv

Module = TypeVar("Module", bound=nn.Module)
WHOLE, TOKENS = Replicate(), Shard(1)
# The dimension of heads in [B, T, H, D].
HEADS = 2


def tensor_parallel(model: Module, mesh: DeviceMesh, *, sequence_parallel: bool = False) -> Module:
    """Shards the heads of a model over ranks: H/n heads each, and the inner units of the feed-forwards.

    Projections are those of Megatron-LM (arXiv 1909.08053, section 3): queries, keys, values and the feed-forward's
    first matrices by columns, the last ones by rows. Messages between heads of different ranks travel by one
    all-gather or one reduce-scatter a round, whichever moves fewer heads (see `Exchange`); a graph without edges
    between ranks communicates nothing. Routers decide on all ranks alike. Outputs, losses and gradients are those of
    one process, without dropout: all ranks draw alike, so that with it the heads of all ranks drop the same weights.
    Embeddings and the last projection are whole on every rank.

    Args:
        model: of gohgraph's own, or any module around its `MultiHeadAttention`s and `FeedForward`s; changed in place.
            All ranks then hold the weights that the first one had.
        mesh: one dimension, n ranks; H, key heads and d_ff are multiples of n.
        sequence_parallel: between blocks every rank holds T/n tokens (arXiv 2205.05198, section 4.2.2).

    Example:
        >>> import gohgraph as goh
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> config = goh.TransformerConfig(256, d_model=32, num_heads=4, head_graph=goh.HeadGraphConfig())
        >>> mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))  # doctest: +SKIP
        >>> model = tensor_parallel(goh.LanguageModel(config), mesh)  # doctest: +SKIP
    """
    between = TOKENS if sequence_parallel else WHOLE
    blocks = [part for part in model.modules() if isinstance(part, (MultiHeadAttention, FeedForward))]
    stacks = [part for part in model.modules() if isinstance(part, Stack)]
    for stack in stacks:
        if stack.path.residual != "plain":
            raise ValueError(
                f"Expected residual='plain' under tensor parallelism (got {stack.path.residual!r}). Do change it, or "
                "train data parallel: ddp or fsdp."
            )
    for block in blocks:
        _check(block, mesh.size())
    for parameter in (*model.parameters(), *model.buffers()):
        torch.distributed.broadcast(parameter.data, group=mesh.get_group(), group_src=0)
    for block in blocks:
        if isinstance(block, MultiHeadAttention):
            _shard_attention(block, mesh, between)
        else:
            _shard_feed_forward(block, mesh, between)
    if sequence_parallel:
        for stack in stacks:
            _split_tokens(stack, mesh)
    return model


def _shard_attention(attention: MultiHeadAttention, mesh: DeviceMesh, between: Any) -> None:
    graphs = attention.inner_graphs
    for name in graphs:
        graphs[name] = _sharded(graphs[name], mesh, over_maps=name == "weight")
    if attention.output_graph is not None:
        attention.output_graph = _sharded(attention.output_graph, mesh)
    if attention.score_graph is not None:
        attention.score_graph = _sharded(attention.score_graph, mesh, over_maps=True)
    if attention.router is not None:
        attention.router.register_forward_pre_hook(_whole_input)
        attention.router.register_forward_hook(
            lambda router, args, routing: routing._replace(gates=own_part(routing.gates, mesh.get_group(), -1))
        )
    attention.num_heads //= mesh.size()
    attention.num_kv_heads //= mesh.size()
    columns: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in ("query", "key", "value")}
    if isinstance(attention.rotary, QueryKeyNorm):
        # Every rank normalises its own heads: the gain's gradient is the sum over ranks.
        columns["rotary.norm"] = SequenceParallel(sequence_dim=HEADS, use_local_output=True)
    parallelize_module(attention, mesh, {"": Block(between), **columns, "output": _rows(between)})


def _shard_feed_forward(block: FeedForward, mesh: DeviceMesh, between: Any) -> None:
    columns = {"inner": ColwiseParallel()} | ({"gate": ColwiseParallel()} if block.gate is not None else {})
    parallelize_module(block, mesh, {"": Block(between), **columns, "outer": _rows(between)})


def _rows(between: Any) -> RowwiseParallel:
    return RowwiseParallel(output_layouts=between)


def _sharded(graph: nn.Module, mesh: DeviceMesh, *, over_maps: bool = False) -> "ShardedHeadGraphConv":
    from gohgraph.parallel.sharded_graph import ShardedHeadGraphConv

    # `check_site` let nothing else stand here.
    return ShardedHeadGraphConv(cast("HeadGraphConv", graph), mesh, over_maps=over_maps)


class Block(ParallelStyle):
    """Gives a block its whole input, once for all its projections: its gradient is added over ranks once, too.

    Args:
        between: how tokens lie on the ranks outside the block, `Replicate()` or `Shard(1)`.
    """

    def __init__(self, between: Any) -> None:
        self.between = between

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x, *memory = args
            return (_whole(x, device_mesh, self.between), *(_whole(value, device_mesh, WHOLE) for value in memory))

        module.register_forward_pre_hook(enter)
        return module


def _whole(x: Tensor | None, mesh: DeviceMesh, place: Any) -> DTensor | None:
    if x is None or isinstance(x, DTensor):
        return x
    return DTensor.from_local(x, mesh, [place], run_check=False).redistribute(mesh, [WHOLE])


def _whole_input(router: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x, *more = args
    ranks, x = x.device_mesh.size() if isinstance(x, DTensor) else 1, local(x)
    if ranks > 1 and x.requires_grad:
        # All n ranks do this work alike: each takes the n-th part of the gradient.
        x.register_hook(lambda gradient: gradient / ranks)
    return (x, *more)


def _split_tokens(stack: Stack, mesh: DeviceMesh) -> None:
    """Lets a stack hold T/n tokens a rank between its blocks."""
    group = mesh.get_group()

    def enter(stack: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *memory = args
        if x.shape[1] % mesh.size():
            raise ValueError(
                f"Expected a multiple of {mesh.size()} tokens with sequence_parallel (got {x.shape[1]}). Do pad them, "
                "or turn it off."
            )
        return (own_part(x, group, 1), *memory)

    def leave(stack: nn.Module, args: Any, output: StackOutput) -> StackOutput:
        return output._replace(x=gather_parts(output.x, group, 1))

    for part in [part for part in stack.modules() if isinstance(part, (Residual, Stack))]:
        parallelize_module(part, mesh, {"norm": SequenceParallel(use_local_output=True)})
    stack.register_forward_pre_hook(enter)
    stack.register_forward_hook(leave)


def _check(block: MultiHeadAttention | FeedForward, ranks: int) -> None:
    sizes = {"d_ff": block.inner.out_features} if isinstance(block, FeedForward) else {
        "num_heads": block.num_heads, "num_kv_heads": block.num_kv_heads
    }  # fmt: skip
    for name, size in sizes.items():
        if size % ranks:
            raise ValueError(f"Expected {name} to be a multiple of {ranks} ranks (got {size}). Do change either.")
    if isinstance(block, FeedForward):
        return
    if "weight" in block.inner_graphs:
        name = type(block.inner_graphs["weight"]).__name__
        raise ValueError(f"Expected no graph at weights under tensor parallelism (got {name}). Do move it to scores.")
    nodes = {"keys": block.num_kv_heads, "values": block.num_kv_heads}
    for site, graph in block.graphs.items():
        check_site(site, graph, nodes.get(site, block.num_heads), () if site in MAPS else ("reach",))
