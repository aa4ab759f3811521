"""Head graphs in Megatron-Core: a layer spec with heads sharded over tensor-parallel ranks."""

try:
    import megatron.core as _megatron_core  # noqa: F401
except ImportError as error:
    raise ImportError("Expected megatron-core (got none). Do pip install 'gohgraph[megatron]'.") from error

from gohgraph.parallel.megatron.losses import set_router_loss_scale
from gohgraph.parallel.megatron.spec import head_graph_layer_spec

__all__ = ["head_graph_layer_spec", "set_router_loss_scale"]
