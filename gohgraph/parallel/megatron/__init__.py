"""Head graphs in Megatron-Core: a layer spec with heads sharded over tensor-parallel ranks."""

from gohgraph.common.packages import needs

with needs("megatron-core", "megatron"):
    import megatron.core as _megatron_core  # noqa: F401

from gohgraph.parallel.megatron.losses import set_router_loss_scale
from gohgraph.parallel.megatron.spec import head_graph_layer_spec

__all__ = ["head_graph_layer_spec", "set_router_loss_scale"]
