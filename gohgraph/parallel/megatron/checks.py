"""What head graphs under Megatron-Core cannot do, refused when a model is built."""

from typing import Any

from gohgraph.graphs.config import SITES, HeadGraphConfig


def check_head_graph(head_graph: HeadGraphConfig) -> None:
    """Raises `TypeError` or `ValueError` for a configuration that does not shard over heads here."""
    if not isinstance(head_graph, HeadGraphConfig):
        raise TypeError(f"Expected a HeadGraphConfig (got {head_graph!r}). Do pass HeadGraphConfig().")
    for name in SITES:
        site = getattr(head_graph, name)
        if site is None:
            continue
        if name not in ("outputs", "scores"):
            raise ValueError(
                f"Expected graphs at outputs or scores under Megatron-Core (got {site!r} at {name}). Do leave that "
                "site empty, or use gohgraph's own models."
            )
    if head_graph.routing is not None and head_graph.routing.bias_rate:
        raise ValueError(
            f"Expected routing with bias_rate 0 under Megatron-Core (got {head_graph.routing.bias_rate}). Do balance "
            "heads by balance_loss."
        )


def check_sizes(head_graph: HeadGraphConfig, config: Any) -> None:
    """Raises `ValueError` for budgets of another number of layers than the transformer has."""
    budgets = () if head_graph.routing is None else head_graph.routing.top_k
    if isinstance(budgets, tuple) and budgets and len(budgets) != config.num_layers:
        raise ValueError(
            f"Expected top_k for {config.num_layers} layers (got {len(budgets)}). Do give one for each layer, or one "
            "number for all."
        )


def check_transformer(config: Any) -> None:
    """Raises `ValueError` for a `TransformerConfig` of Megatron-Core under which head graphs would not run."""
    offloaded = getattr(config, "fine_grained_activation_offloading", False) and "core_attn" in config.offload_modules
    unsupported = {
        "context_parallel_size above 1": config.context_parallel_size > 1,
        "CUDA graphs": getattr(config, "cuda_graph_impl", "none") != "none",
        "flash_decode": config.flash_decode,
        "fp8 or fp4": bool(config.fp8 or getattr(config, "fp4", None)),
        "core_attn among offload_modules": offloaded,
        "multi_latent_attention": config.multi_latent_attention,
    }
    for name, wanted in unsupported.items():
        if wanted:
            raise ValueError(f"Expected a config for head graphs without {name} (got it). Do switch it off.")
