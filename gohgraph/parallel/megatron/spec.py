"""Megatron-Core layers with head graphs."""

import copy
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec, get_module

from gohgraph.graphs.config import HeadGraphConfig
from gohgraph.parallel.megatron.attention import HeadGraphCoreAttention, HeadGraphSelfAttention
from gohgraph.parallel.megatron.checks import check_head_graph
from gohgraph.parallel.megatron.torch_attention import TorchCoreAttention


def head_graph_layer_spec(
    head_graph: HeadGraphConfig | None = None, layer_spec: ModuleSpec | None = None
) -> ModuleSpec:
    """Returns a layer of Megatron-Core whose heads form graphs, for `GPTModel(transformer_layer_spec=...)`.

    A new model is the one of the layer given, bit for bit where only head outputs pass messages. Heads and edges are
    sharded over tensor-parallel ranks; sequence and data parallelism and distributed checkpoints are Megatron-Core's
    own (so are pipelines, which are not tested). Of the head graph, `outputs` and `scores` with one `SiteConfig` each,
    and routing.

    Args:
        head_graph: sites and routing; `None` for `HeadGraphConfig()`.
        layer_spec: a layer of Megatron-Core, left unchanged; `None` for `get_gpt_layer_local_spec()` with torch's
            attention (`TorchCoreAttention`), which runs on any device.

    Raises:
        TypeError: `head_graph` is no `HeadGraphConfig`.
        ValueError: a head graph that does not shard over heads, a layer without `SelfAttention` or with its
            normalisation fused into the projection, so that x is not to be had; score messages around another core
            attention than torch's or Megatron-Core's own.

    Example:
        >>> from gohgraph import HeadGraphConfig, SiteConfig
        >>> spec = head_graph_layer_spec(HeadGraphConfig(outputs=SiteConfig.ring(4)))
        >>> spec.submodules.self_attention.module.__name__
        'HeadGraphSelfAttention'
    """
    head_graph = HeadGraphConfig() if head_graph is None else head_graph
    check_head_graph(head_graph)
    if layer_spec is None:
        layer_spec = get_gpt_layer_local_spec()
        layer_spec.submodules.self_attention.submodules.core_attention = TorchCoreAttention
    spec = copy.copy(layer_spec)
    spec.submodules = copy.copy(spec.submodules)
    _check_layer(spec)
    attention = spec.submodules.self_attention = copy.copy(spec.submodules.self_attention)
    attention.module, attention.submodules = HeadGraphSelfAttention, copy.copy(attention.submodules)
    core = attention.submodules.core_attention
    if head_graph.scores is not None and get_module(core) not in (TorchCoreAttention, DotProductAttention):
        raise ValueError(
            f"Expected TorchCoreAttention or DotProductAttention for score messages (got {get_module(core).__name__}). "
            "Do pass no layer_spec, or head graphs at outputs alone."
        )
    attention.submodules.core_attention = ModuleSpec(
        HeadGraphCoreAttention, params={"head_graph": head_graph, "attention": core}
    )
    return spec


def _check_layer(spec: ModuleSpec) -> None:
    attention: Any = getattr(spec.submodules, "self_attention", None)
    if not isinstance(attention, ModuleSpec) or get_module(attention) is not SelfAttention:
        got = attention if attention is None else get_module(attention).__name__
        raise ValueError(
            f"Expected a layer_spec with SelfAttention (got {got}). Do start from get_gpt_layer_local_spec()."
        )
    if spec.submodules.input_layernorm is IdentityOp:
        raise ValueError(
            "Expected a layer that normalises its input before self_attention (got a fused normalisation, as in "
            "Transformer Engine's layers). Do start from get_gpt_layer_local_spec()."
        )
