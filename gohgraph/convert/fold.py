"""Folding static graphs into the projections beside them: what is left has none, a converted model is stock."""

from __future__ import annotations

import dataclasses
from copy import deepcopy
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from gohgraph.attention.block import MultiHeadAttention
from gohgraph.attention.slots import HeadSlots
from gohgraph.common.checks import there
from gohgraph.common.modules import check_writable
from gohgraph.convert import unconvert
from gohgraph.convert.blocks import converted, slots_at
from gohgraph.convert.dropin import GraphMultiheadAttention
from gohgraph.graphs.config import SITES
from gohgraph.graphs.protocol import SiteGraph
from gohgraph.models.config import ClassifierConfig, TransformerConfig

# Where a graph lies beside a projection, and by which name the block holds both.
BEFORE_ATTENTION = {"queries": "query", "keys": "key", "values": "value"}
Module = TypeVar("Module", bound=nn.Module)


class Place(NamedTuple):
    """A graph of one block, and the projection it folds into."""

    site: str
    block: MultiHeadAttention | HeadSlots
    graph: SiteGraph
    projection: nn.Module


@torch.no_grad()
def fold(module: Module) -> Module:
    r"""Merges static graphs into the projections beside them, exactly; the graphs are gone afterwards.

    .. math::
        y = \sum_i W_O^i \sum_j M_{ij} z_j = \sum_j \Big(\sum_i M_{ij} W_O^i\Big) z_j, \qquad
        \sum_j M_{ij} (W_V^j x + b_V^j) = \Big(\sum_j M_{ij} W_V^j\Big) x + \sum_j M_{ij} b_V^j

    M is the graph's mixing matrix over all rounds; of a static graph that maps features too, its whole linear map takes
    its place. Output graphs fold into W_O, those at queries, keys and values into the projections before them. The
    product is taken in float64. A block's output y stays what it was; the head outputs it returns beside y are now
    those before messages. Graphs at sites where they depend on the token are left.

    Args:
        module: a `MultiHeadAttention` or `GraphMultiheadAttention`, a model of them, or one that `convert` gave output
            graphs; changed in place, its `config` too, so that it can be saved and loaded. A site is folded in all its
            blocks or in none.

    Returns:
        The same module without the graphs that were folded; of a converted model the stock model, its projections
        changed.

    Raises:
        TypeError: no attention with slots for head graphs and none inside.
        ValueError: no graph beside a projection, or none that folds: token edges and routed heads differ from token to
            token, normalised or shifted messages are not linear in the heads, earlier layers' heads have no part in
            this projection; or a projection whose weight is not its own to write into (`check_writable`).

    Example:
        >>> import copy
        >>> import gohgraph as goh
        >>> graph = goh.HeadGraphConv(goh.head_graph(4, "ring"), head_dim=2, context_dim=8, edges="static")
        >>> fold(MultiHeadAttention(8, 4, output_graph=graph)).output_graph is None
        True

        What a reparametrisation is worth when it is gone, beside the loss with it:

        >>> graphs = goh.HeadGraphConfig(None, values=goh.SiteConfig(edges="static"))
        >>> model = goh.LanguageModel(goh.TransformerConfig(9, d_model=8, num_heads=2, d_ff=8, head_graph=graphs))
        >>> tokens = torch.randint(9, (1, 6))
        >>> losses = [each(tokens[:, :-1], targets=tokens[:, 1:]).loss for each in (model, fold(copy.deepcopy(model)))]
        >>> torch.allclose(*losses)
        True
    """
    inside = list(module.modules()) if isinstance(module, nn.Module) else []
    slots = [part for part in inside if isinstance(part, HeadSlots)]
    blocks = [] if slots else [part for part in inside if isinstance(part, MultiHeadAttention)]
    if not slots and not blocks:
        raise TypeError(f"Expected a MultiHeadAttention or a model of them (got {type(module).__name__}). Do pass one.")
    folding = _folding(_converted_places(module, slots) if slots else _own_places(blocks))
    if any(block.router is not None for block in (*slots, *blocks)):
        raise ValueError(
            "Expected attention whose heads are the same for every token (got a router). Do keep the graph."
        )
    for place in folding:
        check_writable(module, [place.projection], ("weight",) if place.site == "outputs" else ("weight", "bias"))
    if len({id(place.projection) for place in folding}) < len(folding):
        raise ValueError("Expected a projection for every graph (got one for several). Do keep the graphs.")
    for place in folding:
        _fold(place)
    if any(not isinstance(part, GraphMultiheadAttention) or part is not module for part in slots):
        return unconvert(module)
    config = getattr(module, "config", None)
    if isinstance(config, (TransformerConfig, ClassifierConfig)):
        cast(Any, module).config = _without(config, {place.site for place in folding})
    return module


def _folding(places: list[Place]) -> list[Place]:
    """Those at sites where all fold."""
    reasons = [(place.site, reason) for place in places if (reason := _why_not(place.graph))]
    kept = {site for site, _ in reasons}
    if folding := [place for place in places if place.site not in kept]:
        return folding
    site, reason = reasons[0] if reasons else ("outputs", "no graph at outputs, queries, keys or values")
    raise ValueError(f"Expected a static linear graph at {site} (got {reason}). Do keep this graph unfolded.")


def _why_not(graph: SiteGraph) -> str:
    if graph.traits.reach:
        return "senders from other layers"
    if graph.traits.static:
        return ""
    return "edges that depend on the token" if graph.traits.linear else "messages that are not linear in the heads"


def _own_places(blocks: list[MultiHeadAttention]) -> list[Place]:
    places = []
    for block in blocks:
        for site, name in {"outputs": "output", **BEFORE_ATTENTION}.items():
            if site in block.graphs:
                _check_linear(getattr(block, name))
                places.append(Place(site, block, block.graphs[site], getattr(block, name)))
    return places


def _converted_places(module: nn.Module, slots: list[HeadSlots]) -> list[Place]:
    """The output graphs of converted blocks, in their order."""
    if isinstance(module, GraphMultiheadAttention):
        return [] if module.output_graph is None else [Place("outputs", module, module.output_graph, module.out_proj)]
    model, conversion = converted(module)
    names = {id(slots_at(model, name)): place for name, place in conversion.projections.items()}
    places = []
    for part in slots:
        projection = model.get_submodule(names[id(part)]) if id(part) in names else None
        _check_linear(projection)
        if part.score_graph is not None:
            raise ValueError(
                f"Expected a converted model without score graphs (got one before {names.get(id(part))!r}). Do keep "
                "the graphs."
            )
        if part.output_graph is not None:
            places.append(Place("outputs", part, part.output_graph, there(projection)))
    return places


def _check_linear(projection: nn.Module | None) -> None:
    kind = type(projection)
    # Of PEFT, too, a class is called Linear.
    is_conv = (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")
    if kind not in (nn.Linear, NonDynamicallyQuantizableLinear) and not is_conv:
        got = "none that was found" if projection is None else f"{kind.__module__}.{kind.__name__}"
        raise ValueError(
            f"Expected a linear projection to fold into (got {got}). Do merge adapters and parametrizations first "
            "(merge_and_unload, remove_parametrizations), or keep the graphs."
        )


def _fold(place: Place) -> None:
    site, block, graph, projection = place
    # In float64, which not every device has.
    graph = deepcopy(graph).cpu().double()
    # transformers' Conv1D keeps its matrix the other way round.
    weight, bias = cast(Tensor, projection.weight), cast("Tensor | None", projection.bias)
    matrix = weight if isinstance(projection, nn.Linear) else weight.t()  # [M, H*D]
    if site == "outputs":
        matrix.copy_(_read_through(graph, matrix.cpu().double(), block.num_heads))
        block.output_graph = None
        return
    for rows in (matrix.t(), bias):
        if rows is not None:
            nodes = rows.cpu().double().unflatten(-1, (graph.traits.num_heads, -1))  # [M, H, D] or [H, D]
            rows.copy_(graph(nodes).flatten(-2))
    del cast(MultiHeadAttention, block).inner_graphs[BEFORE_ATTENTION[site]]


def _read_through(graph: SiteGraph, matrix: Tensor, heads: int) -> Tensor:
    """The projection `[M, H*D]` that reads heads before messages as `matrix` reads them after."""
    if graph.traits.linear:
        return torch.einsum("mid,ij->mjd", matrix.unflatten(1, (heads, -1)), graph.matrix()).flatten(1)  # [M, H*D]
    basis = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)  # [H*D, H*D]
    return matrix @ graph(basis.unflatten(1, (heads, -1))).flatten(1).t()  # [M, H*D]


def _without(config: TransformerConfig | ClassifierConfig, sites: set[str]) -> TransformerConfig | ClassifierConfig:
    if isinstance(config, ClassifierConfig):
        return dataclasses.replace(config, transformer=_transformer_without(config.transformer, sites))
    return _transformer_without(config, sites)


def _transformer_without(config: TransformerConfig, sites: set[str]) -> TransformerConfig:
    absent: dict[str, Any] = dict.fromkeys(sites)
    graphs = dataclasses.replace(there(config.head_graph), **absent)
    is_left = any(getattr(graphs, site) is not None for site in SITES)
    return dataclasses.replace(config, head_graph=graphs if is_left else None)
