"""Training beyond one device: heads sharded over ranks, sharded and replicated data parallelism, checkpoints."""

from gohgraph.parallel.exchange import Exchange, plan_exchange
from gohgraph.parallel.gradients import clip_gradients
from gohgraph.parallel.layout import Layout, ParallelConfig
from gohgraph.parallel.placement import cut_weight, place_heads, reorder_heads
from gohgraph.parallel.ranks import process_group
from gohgraph.parallel.sharding import parallelize, recompute, shard_data
from gohgraph.parallel.states import load_state, save_state, whole_weights
from gohgraph.parallel.tensor import tensor_parallel

__all__ = [
    "Exchange",
    "Layout",
    "ParallelConfig",
    "clip_gradients",
    "cut_weight",
    "load_state",
    "parallelize",
    "place_heads",
    "plan_exchange",
    "process_group",
    "recompute",
    "reorder_heads",
    "save_state",
    "shard_data",
    "tensor_parallel",
    "whole_weights",
]
