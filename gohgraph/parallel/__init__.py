"""Training beyond one device: heads sharded over ranks, sharded and replicated data parallelism, checkpoints."""

from gohgraph.parallel.cost import Cluster, Cost, Workload, graph_cost, plain_cost
from gohgraph.parallel.counting import count_step
from gohgraph.parallel.exchange import Exchange, plan_exchange
from gohgraph.parallel.gradients import clip_gradients
from gohgraph.parallel.layout import Layout, ParallelConfig
from gohgraph.parallel.placement import cut_weight, place_heads, reorder_heads
from gohgraph.parallel.ranks import process_group
from gohgraph.parallel.sharding import parallelize, recompute, shard_data
from gohgraph.parallel.states import load_state, save_state, whole_weights
from gohgraph.parallel.tensor import tensor_parallel
from gohgraph.parallel.traffic import Traffic

__all__ = [
    "Cluster",
    "Cost",
    "Exchange",
    "Layout",
    "ParallelConfig",
    "Traffic",
    "Workload",
    "clip_gradients",
    "count_step",
    "cut_weight",
    "graph_cost",
    "load_state",
    "parallelize",
    "place_heads",
    "plain_cost",
    "plan_exchange",
    "process_group",
    "recompute",
    "reorder_heads",
    "save_state",
    "shard_data",
    "tensor_parallel",
    "whole_weights",
]
