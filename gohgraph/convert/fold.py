"""Folding static output graphs into the output projections: what is left has no graphs, a converted model is stock."""

from __future__ import annotations

import dataclasses
from copy import deepcopy
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from gohgraph.attention.block import MultiHeadAttention
from gohgraph.attention.slots import HeadSlots
from gohgraph.common.modules import check_writable
from gohgraph.convert import unconvert
from gohgraph.convert.blocks import converted, slots_at
from gohgraph.convert.dropin import GraphMultiheadAttention
from gohgraph.graphs.config import SITES
from gohgraph.graphs.protocol import SiteGraph
from gohgraph.models.config import ClassifierConfig, TransformerConfig

Module = TypeVar("Module", bound=nn.Module)


@torch.no_grad()
def fold(module: Module) -> Module:
    r"""Merges static output graphs into the output projections, exactly; the graphs are gone afterwards.

    .. math:: y = \sum_i W_O^i \sum_j M_{ij} z_j = \sum_j \Big(\sum_i M_{ij} W_O^i\Big) z_j

    M is the graph's mixing matrix over all rounds. The product is taken in float64. A block's output y stays what it
    was; the head outputs it returns beside y are now those before messages.

    Args:
        module: a `MultiHeadAttention` or `GraphMultiheadAttention`, a model whose blocks all have such a graph, or one
            that `convert` gave them; changed in place, its `config` too, so that it can be saved and loaded. Where one
            block does not fold, nothing is changed.

    Returns:
        The same module, every `output_graph` now `None`; of a converted model the stock model, its projections changed.

    Raises:
        TypeError: no attention with slots for head graphs and none inside.
        ValueError: no output graph, or one that does not fold: token edges and routed heads differ from token to
            token, normalised or shifted messages are not linear in the heads, earlier layers' heads have no part in
            this projection; or a projection whose weight is not its own to write into (`check_writable`).

    Example:
        >>> import gohgraph as goh
        >>> graph = goh.HeadGraphConv(goh.head_graph(4, "ring"), head_dim=2, context_dim=8, edges="static")
        >>> fold(MultiHeadAttention(8, 4, output_graph=graph)).output_graph is None
        True
    """
    inside = list(module.modules()) if isinstance(module, nn.Module) else []
    sites = [part for part in inside if isinstance(part, HeadSlots)]
    blocks = sites or [part for part in inside if isinstance(part, MultiHeadAttention)]
    if not blocks:
        raise TypeError(f"Expected a MultiHeadAttention or a model of them (got {type(module).__name__}). Do pass one.")
    for block in blocks:
        _check(block.output_graph)
        if block.router is not None:
            raise ValueError(
                "Expected attention whose heads are the same for every token (got a router). Do keep the graph."
            )
    projections = _projections(module, sites) if sites else [block.output for block in blocks]
    for projection in projections:
        _check_linear(projection)
    if len({id(projection) for projection in projections}) < len(projections):
        raise ValueError("Expected a projection for every graph (got one for several). Do keep the graphs.")
    check_writable(module, projections)
    for block, projection in zip(blocks, projections, strict=True):
        _fold_into(projection, block)
        block.output_graph = None
    if any(not isinstance(part, GraphMultiheadAttention) or part is not module for part in sites):
        return unconvert(module)
    if isinstance(getattr(module, "config", None), (TransformerConfig, ClassifierConfig)):
        module.config = _without_output_graphs(module.config)
    return module


def _fold_into(projection: nn.Module, block: nn.Module) -> None:
    mixing = deepcopy(block.output_graph).double().matrix()  # [H, H]
    # transformers' Conv1D keeps its matrix the other way round.
    matrix = projection.weight if isinstance(projection, nn.Linear) else projection.weight.t()  # [M, H*D]
    weight = matrix.double().unflatten(1, (block.num_heads, -1))  # [M, H, D]
    matrix.copy_(torch.einsum("mid,ij->mjd", weight, mixing).flatten(1))  # [M, H*D]


def _projections(module: nn.Module, sites: list[HeadSlots]) -> list[nn.Module]:
    """The output projections of converted blocks, in their order."""
    if isinstance(module, GraphMultiheadAttention):
        return [module.out_proj]
    model, conversion = converted(module)
    names = {id(slots_at(model, name)): place for name, place in conversion.projections.items()}
    projections = [model.get_submodule(names[id(part)]) if id(part) in names else None for part in sites]
    for part in sites:
        if part.score_graph is not None:
            raise ValueError(
                f"Expected a converted model without score graphs (got one before {names.get(id(part))!r}). Do keep "
                "the graphs."
            )
    return projections


def _check_linear(projection: nn.Module | None) -> None:
    kind = type(projection)
    # Of PEFT, too, a class is called Linear.
    is_conv = (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")
    if kind not in (nn.Linear, NonDynamicallyQuantizableLinear) and not is_conv:
        got = "none that was found" if projection is None else f"{kind.__module__}.{kind.__name__}"
        raise ValueError(
            f"Expected a linear output projection to fold into (got {got}). Do merge adapters and parametrizations "
            "first (merge_and_unload, remove_parametrizations), or keep the graphs."
        )


def _check(graph: SiteGraph | None) -> None:
    if graph is None:
        raise ValueError("Expected an output graph to fold (got no graph at outputs). Do leave the model as it is.")
    reasons = {
        "senders from other layers": graph.traits.reach > 0,
        "messages that are not linear in the heads": not graph.traits.linear,
        "edges that depend on the token": not graph.traits.static,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"Expected a static linear output graph (got {reason}). Do keep this graph unfolded.")


def _without_output_graphs(config: TransformerConfig | ClassifierConfig) -> TransformerConfig | ClassifierConfig:
    if isinstance(config, ClassifierConfig):
        return dataclasses.replace(config, transformer=_without_output_graphs(config.transformer))
    graphs = dataclasses.replace(config.head_graph, outputs=None)
    is_left = any(getattr(graphs, site) is not None for site in SITES)
    return dataclasses.replace(config, head_graph=graphs if is_left else None)
