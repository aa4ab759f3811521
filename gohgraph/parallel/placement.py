"""Which heads share a rank: placed so that as little edge weight as possible joins two ranks."""

import dataclasses
from collections.abc import Iterable
from itertools import combinations
from typing import Any, cast

import torch
from torch import Tensor

from gohgraph.attention.block import MultiHeadAttention
from gohgraph.attention.routing import HeadRouter
from gohgraph.common.modules import check_writable
from gohgraph.convert.head_order import check_permutable, permute_heads
from gohgraph.graphs.edge_graph import EdgeGraph
from gohgraph.graphs.graph import head_graph
from gohgraph.graphs.site_config import Site, SiteConfig
from gohgraph.models.models import LanguageModel

STARTS = 8


def cut_weight(graph: Any, ranks: int, order: list[int] | None = None, weights: Tensor | None = None) -> float:
    """Returns the weight of the edges that join heads of different ranks.

    Args:
        graph: PyG `Data` over H heads.
        ranks: n, a divisor of H; each holds H/n heads that follow one another.
        order: the old index of each new head; `None` for the heads as they are.
        weights: of every edge `[E]`, such as their mean strength; `None` for 1 each.

    Example:
        >>> from gohgraph.graphs.graph import head_graph
        >>> cut_weight(head_graph(8, "ring"), ranks=2)
        2.0
    """
    heads = graph.num_nodes
    rank = torch.empty(heads, dtype=torch.long)
    rank[torch.tensor(list(range(heads)) if order is None else order)] = torch.arange(heads) // (heads // ranks)
    senders, receivers = graph.edge_index.cpu()
    crosses = rank[senders] != rank[receivers]  # [E]
    return float((crosses if weights is None else crosses * weights.cpu()).sum())


def place_heads(graph: Any, ranks: int, weights: Tensor | None = None, *, seed: int = 0) -> list[int]:
    """Finds an order of heads for which little edge weight joins the equal runs that n ranks hold.

    Pairs of ranks exchange heads by Kernighan and Lin's bisection (1970; `networkx`) for as long as that helps, from
    the order as it is and from a few random ones. The order as it is stays where nothing better is found.

    Args:
        graph, ranks, weights: as in `cut_weight`.
        seed: of the random starts.

    Returns:
        The old index of each new head, for `reorder_heads`; ranks that do not divide the heads are a `ValueError`.

    Example:
        >>> from gohgraph.graphs.graph import head_graph
        >>> graph = head_graph(8, [(0, 7), (7, 3), (3, 4), (4, 0), (1, 2), (2, 5), (5, 6), (6, 1)])
        >>> order = place_heads(graph, ranks=2)
        >>> cut_weight(graph, 2), cut_weight(graph, 2, order)
        (6.0, 0.0)
    """
    heads = graph.num_nodes
    if ranks < 1 or heads % ranks:
        raise ValueError(f"Expected ranks to divide {heads} heads (got {ranks}). Do change either.")
    generator = torch.Generator().manual_seed(seed)
    starts = [list(range(heads)), *(torch.randperm(heads, generator=generator).tolist() for _ in range(STARTS))]
    orders = [starts[0], *(_improved(graph, ranks, start, weights, seed) for start in starts)]
    return min(orders, key=lambda order: cut_weight(graph, ranks, order, weights))


def _improved(graph: Any, ranks: int, order: list[int], weights: Tensor | None, seed: int) -> list[int]:
    import networkx

    joined = _undirected(graph, weights)
    size = graph.num_nodes // ranks
    parts = [set(order[rank * size : (rank + 1) * size]) for rank in range(ranks)]
    improves = True
    while improves:
        improves = False
        for a, b in combinations(range(ranks), 2):
            both = joined.subgraph(parts[a] | parts[b])
            new = networkx.community.kernighan_lin_bisection(both, (parts[a], parts[b]), weight="weight", seed=seed)
            before, after = (networkx.cut_size(both, *pair, weight="weight") for pair in ((parts[a], parts[b]), new))
            if after < before - 1e-9:
                parts[a], parts[b] = map(set, new)
                improves = True
    return [head for part in parts for head in sorted(part)]


def _undirected(graph: Any, weights: Tensor | None) -> Any:
    """The networkx graph of pairs of heads, with the weight of the edges both ways."""
    import networkx

    joined = networkx.Graph()
    joined.add_nodes_from(range(graph.num_nodes))
    each = [1.0] * graph.num_edges if weights is None else weights.tolist()
    for (j, i), weight in zip(graph.edge_index.t().tolist(), each, strict=True):
        known = joined.get_edge_data(j, i, {"weight": 0.0})["weight"]
        joined.add_edge(j, i, weight=known + weight)
    return joined


@torch.no_grad()
def reorder_heads(model: LanguageModel, order: list[int]) -> LanguageModel:
    """Puts the heads of a language model into another order, with its graphs; what it computes does not change.

    Its configuration then holds the edges themselves, so that it is saved and loaded as ever.

    Args:
        model: with heads that have keys of their own; changed in place.
        order: the old index of each new head; with routers the shared heads must stay the first.

    Example:
        >>> import gohgraph as goh
        >>> shape = dict(d_model=8, num_heads=4, num_layers=1, d_ff=8)
        >>> ring = goh.HeadGraphConfig(goh.SiteConfig("ring"))
        >>> model = goh.LanguageModel(goh.TransformerConfig(9, **shape, head_graph=ring)).eval()
        >>> tokens = torch.arange(5).unsqueeze(0)
        >>> before = model(tokens).logits
        >>> torch.allclose(reorder_heads(model, [2, 0, 3, 1])(tokens).logits, before, atol=1e-6)
        True
    """
    config, graphs = model.config, model.config.head_graph
    layers: Iterable[Any] = model.decoder.layers
    blocks: list[MultiHeadAttention] = [layer.attention.object for layer in layers]
    for block in blocks:
        _check(block, order)
    check_permutable(model, blocks)
    inside = [graph for block in blocks for graph in _graphs(block)]
    check_writable(model, [graph.edges for graph in inside], ("bias", "weight"))
    for block in blocks:
        permute_heads(block, order)
        for graph in _graphs(block):
            _relabel(graph, order)
        if block.router is not None:
            _reorder_router(block.router, order)
    if graphs is not None:
        outputs, scores = (_site(site, order, config.num_heads) for site in (graphs.outputs, graphs.scores))
        moved = dataclasses.replace(graphs, outputs=outputs, scores=scores)
        model.config = dataclasses.replace(config, head_graph=moved)
    return model


def _graphs(block: MultiHeadAttention) -> list[EdgeGraph]:
    # `_check` let nothing else stand there.
    return [cast(EdgeGraph, graph) for graph in (block.output_graph, block.score_graph) if graph is not None]


def _relabel(graph: EdgeGraph, order: list[int]) -> None:
    heads = graph.num_heads
    places = torch.tensor(order).argsort()  # [H], the new index of each old head
    senders, receivers = graph.edge_index.cpu()
    senders = senders // heads * heads + places[senders % heads]
    moved = torch.stack((senders, places[receivers]))  # [2, E]
    sorting = torch.argsort(moved[1] * graph.num_senders + moved[0])  # [E]
    graph.edge_index.copy_(moved[:, sorting])
    for weights in (graph.edges.bias, graph.edges.weight):
        if weights is not None:
            weights.copy_(weights[:, sorting])
    if graph.gain is not None:
        graph.gain.copy_(graph.gain.unflatten(0, (-1, heads))[:, order].flatten(0, 1))
    graph.edges_changed()


def _reorder_router(router: HeadRouter, order: list[int]) -> None:
    shared, routed = order[: router.num_shared], [head - router.num_shared for head in order[router.num_shared :]]
    router.shared.copy_(router.shared[shared])
    router.routed.copy_(router.routed[routed])
    if router.balance_bias is not None:
        router.balance_bias.copy_(router.balance_bias[routed])


def _site(site: Site | None, order: list[int], heads: int) -> Site | None:
    if not isinstance(site, SiteConfig):
        return site
    edges = head_graph(heads, site.topology, self_loops=site.self_loops, **site.options).edge_index
    moved = torch.tensor(order).argsort()[edges].t().tolist()  # [E, 2]
    return dataclasses.replace(site, topology=tuple(map(tuple, moved)), options={}, self_loops=False)


def _check(block: MultiHeadAttention, order: list[int]) -> None:
    sites = (block.output_graph, block.score_graph)
    if len(block.inner_graphs) or not all(graph is None or graph.traits.sharded for graph in sites):
        kinds = sorted({type(graph).__name__ for graph in (*sites, *block.inner_graphs.values()) if graph is not None})
        raise ValueError(
            f"Expected HeadGraphConvs at outputs and scores only (got {kinds}). Do leave the order as it is."
        )
    shared = 0 if block.router is None else block.router.num_shared
    if set(order[:shared]) != set(range(shared)):
        raise ValueError(
            f"Expected the {shared} heads that the router shares to stay the first (got {order}). Do order the others "
            "among themselves."
        )
