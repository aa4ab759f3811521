"""Folding static graphs into the projections beside them: what is left has no graphs, a converted model is stock."""

from __future__ import annotations

import dataclasses
from copy import deepcopy
from typing import TypeVar

import torch
from torch import nn

from gohgraph.attention.block import MultiHeadAttention
from gohgraph.attention.slots import HeadSlots
from gohgraph.convert import unconvert
from gohgraph.convert.blocks import converted, slots_at
from gohgraph.convert.dropin import GraphMultiheadAttention
from gohgraph.graphs.config import SITES
from gohgraph.graphs.protocol import SiteGraph
from gohgraph.models.config import ClassifierConfig, TransformerConfig

PROJECTIONS = ("Linear", "NonDynamicallyQuantizableLinear", "Conv1D")
# The sites whose nodes a projection makes, and its name in `MultiHeadAttention`.
INTO = {"queries": "query", "keys": "key", "values": "value"}
Module = TypeVar("Module", bound=nn.Module)


@torch.no_grad()
def fold(module: Module) -> Module:
    r"""Merges static graphs into projections, exactly; the graphs are gone afterwards.

    .. math::
        y = \sum_i W_O^i \sum_j M_{ij} z_j = \sum_j \Big(\sum_i M_{ij} W_O^i\Big) z_j, \qquad
        v'_i = \sum_j M_{ij} (W_V^j x + b_j) = \Big(\sum_j M_{ij} W_V^j\Big) x + \sum_j M_{ij} b_j

    M is the graph's mixing matrix over all rounds; those at queries and keys fold as those at values do. The product is
    taken in float64. A block's output y stays what it was; the head outputs it returns beside y are now those before
    messages. A graph at queries, keys or values that does not fold stays where others do.

    Args:
        module: a `MultiHeadAttention` or `GraphMultiheadAttention`, a model whose blocks all have such a graph, or one
            that `convert` gave them; changed in place, its `config` too, so that it can be saved and loaded. What does
            not fold in one block folds in none.

    Returns:
        The same module without these graphs; of a converted model the stock model, its projections changed.

    Raises:
        TypeError: no attention with slots for head graphs and none inside.
        ValueError: an output graph that does not fold, or none and nothing else that does: token edges and routed heads
            differ from token to token, normalised or shifted messages are not linear in the heads, and earlier layers'
            heads are made of another input, which these projections do not see.

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
    chosen = _sites_that_fold(blocks)
    for block in blocks:
        if block.router is not None:
            raise ValueError(
                "Expected attention whose heads are the same for every token (got a router). Do keep the graph."
            )
    projections = _projections(module, sites) if sites else [block.output for block in blocks]
    for block in [] if sites else blocks:
        for name in ("output", *INTO.values()):
            _check_linear(getattr(block, name))
    for block, projection in zip(blocks, projections, strict=True):
        for site in chosen:
            _fold_into(projection if site == "outputs" else getattr(block, INTO[site]), _graphs(block)[site], site)
            _take_out(block, site)
    if any(not isinstance(part, GraphMultiheadAttention) or part is not module for part in sites):
        return unconvert(module)
    if isinstance(getattr(module, "config", None), (TransformerConfig, ClassifierConfig)):
        module.config = _without_graphs(module.config, chosen)
    return module


def _graphs(block: nn.Module) -> dict[str, SiteGraph]:
    """What stands between the projections of a block, by site."""
    if isinstance(block, MultiHeadAttention):
        return {site: graph for site, graph in block.graphs.items() if site == "outputs" or site in INTO}
    return {} if block.output_graph is None else {"outputs": block.output_graph}


def _take_out(block: nn.Module, site: str) -> None:
    if site == "outputs":
        block.output_graph = None
    else:
        del block.inner_graphs[INTO[site]]


def _fold_into(projection: nn.Module, graph: SiteGraph, site: str) -> None:
    mixing, heads = deepcopy(graph).double().matrix(), graph.traits.num_heads  # [H, H]
    # transformers' Conv1D keeps its matrix the other way round.
    matrix = projection.weight if isinstance(projection, nn.Linear) else projection.weight.t()
    if site == "outputs":
        weight = matrix.double().unflatten(1, (heads, -1))  # [M, H, D]
        matrix.copy_(torch.einsum("mid,ij->mjd", weight, mixing).flatten(1))  # [M, H*D]
        return
    for value in (matrix, projection.bias):
        if value is not None:
            parts = value.double().unflatten(0, (heads, -1))  # [H, D, M] or [H, D]
            value.copy_(torch.einsum("ij,j...->i...", mixing, parts).flatten(0, 1))  # [H*D, M] or [H*D]


def _projections(module: nn.Module, sites: list[HeadSlots]) -> list[nn.Module]:
    """The output projections of converted blocks, in their order."""
    if isinstance(module, GraphMultiheadAttention):
        return [module.out_proj]
    model, conversion = converted(module)
    names = {id(slots_at(model, name)): place for name, place in conversion.projections.items()}
    projections = [model.get_submodule(names[id(part)]) if id(part) in names else None for part in sites]
    for part, projection in zip(sites, projections, strict=True):
        _check_linear(projection)
        if part.score_graph is not None:
            raise ValueError(
                f"Expected a converted model without score graphs (got one before {names[id(part)]!r}). Do keep the "
                "graphs."
            )
    return projections


def _check_linear(projection: nn.Module | None) -> None:
    if type(projection).__name__ not in PROJECTIONS:
        raise ValueError(
            f"Expected a linear projection to fold into (got {type(projection).__name__}). Do merge adapters "
            "first, or keep the graphs."
        )


def _sites_that_fold(blocks: list[nn.Module]) -> list[str]:
    """The sites whose graphs fold in every block; `ValueError` for an output graph that does not, and where none do."""
    found = [_graphs(block) for block in blocks]
    reasons = {site: _why_not(site, [graphs[site] for graphs in found if site in graphs], len(blocks))
               for site in ("outputs", *INTO) if any(site in graphs for graphs in found)}  # fmt: skip
    if reason := reasons.get("outputs"):
        raise ValueError(f"Expected a static linear output graph (got {reason}). Do keep this graph unfolded.")
    if not (chosen := [site for site, reason in reasons.items() if not reason]):
        others = "".join(f"; at {site} {reason}" for site, reason in reasons.items())
        raise ValueError(
            f"Expected a graph at outputs, queries, keys or values that folds (got no graph at outputs{others}). Do "
            "leave the model as it is."
        )
    return chosen


def _why_not(site: str, graphs: list[SiteGraph], blocks: int) -> str:
    """Why the graphs of a site do not fold; empty if they do."""
    reasons = {
        "senders from other layers, made of another input": any(graph.traits.reach for graph in graphs),
        "messages that are not linear in the heads": not all(graph.traits.linear for graph in graphs),
        "edges that depend on the token": not all(graph.traits.static for graph in graphs),
        f"no graph at {site} of some blocks": len(graphs) < blocks,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _without_graphs(
    config: TransformerConfig | ClassifierConfig, sites: list[str]
) -> TransformerConfig | ClassifierConfig:
    if isinstance(config, ClassifierConfig):
        return dataclasses.replace(config, transformer=_without_graphs(config.transformer, sites))
    graphs = dataclasses.replace(config.head_graph, **dict.fromkeys(sites))
    is_left = any(getattr(graphs, site) is not None for site in SITES)
    return dataclasses.replace(config, head_graph=graphs if is_left else None)
