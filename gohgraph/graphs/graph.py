"""The explicit graph over attention heads: nodes are heads, edges say who may send to whom."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gohgraph.common.checks import check_int
from gohgraph.graphs.topologies import TOPOLOGIES

if TYPE_CHECKING:
    from torch_geometric.data import Data


def head_graph(num_heads: int, topology: Any = "complete", *, self_loops: bool = True, **options: Any) -> Data:
    """Builds the graph over `num_heads` attention heads: a PyG `Data` with `edge_index` int64 `[2, E]`.

    An edge points from sender j to receiver i: `edge_index[0] = j`, `edge_index[1] = i`. Edges are sorted by
    receiver, then sender, so equal graphs have equal tensors.

    Args:
        num_heads: H >= 1.
        topology: a name, or the edges themselves.

            - `"complete"`: every head sends to every other head.
            - `"ring"`: head i receives from i-1, ..., i-hops modulo H (`hops=1`); directed, so the in-degree is
              `hops`, and `hops + 1` with self-loops.
            - `"star"`: the hub sends to all and receives from all (`center=0`).
            - `"bipartite"`: the first `num_shared` heads and the others exchange messages, both ways.
            - `"groups"`: complete within each of `num_groups=2` runs of consecutive heads; `ranks=n` makes n groups
              (or `num_groups`, a multiple), none across the runs that n ranks hold in tensor parallelism.
            - `"small-world"`: Watts-Strogatz graph (`neighbors=4`, `rewire=0.1`, `seed=0`), both ways.
            - `"random"`: each head receives from `in_degree=2` other heads, drawn with `seed=0`.
            - `"empty"`: no edges between heads.
            - a networkx graph with nodes 0..H-1 (undirected edges carry both ways), a PyG `Data`, an `edge_index`
              tensor `[2, E]`, or an iterable of `(sender, receiver)` pairs.
        self_loops: adds the edge i -> i to every head that lacks it (a token-wise gate on the head). `False` adds
            none; loops that a given graph already has are kept.
        **options: the options of a named topology, as listed above.

    Raises:
        ValueError: unknown topology or option, a head index out of range, a duplicate edge.

    Example:
        >>> head_graph(4, "ring").edge_index.tolist()
        [[0, 3, 0, 1, 1, 2, 2, 3], [0, 0, 1, 1, 2, 2, 3, 3]]
    """
    from torch_geometric.data import Data

    check_int("num_heads", num_heads, low=1)
    edges = _named(num_heads, topology, options) if isinstance(topology, str) else _given(num_heads, topology, options)
    _check(num_heads, edges)
    if self_loops:
        present = set(edges)
        edges = edges + [(i, i) for i in range(num_heads) if (i, i) not in present]
    edges = sorted(edges, key=lambda edge: (edge[1], edge[0]))
    # On the CPU whatever the default device is: whoever builds on meta builds from these edges.
    edge_index = torch.tensor(edges, dtype=torch.long, device="cpu").reshape(-1, 2).t().contiguous()  # [2, E]
    return Data(edge_index=edge_index, num_nodes=num_heads)


def _named(num_heads: int, name: str, options: dict[str, Any]) -> list[tuple[int, int]]:
    build: Callable[..., Iterable[tuple[int, int]]] | None = TOPOLOGIES.get(name)
    if build is None:
        raise ValueError(f"Expected a topology of {sorted(TOPOLOGIES)} (got {name!r}). Do choose one of them.")
    known = build.__kwdefaults__ or {}
    for option in options:
        if option not in known:
            raise ValueError(
                f"Expected options of topology {name!r} among {sorted(known)} (got {option!r}). Do drop or rename it."
            )
    return list(build(num_heads, **options))


def _given(num_heads: int, topology: Any, options: dict[str, Any]) -> list[tuple[int, int]]:
    if options:
        raise ValueError(
            f"Expected no topology options beside explicit edges (got {sorted(options)}). Do drop them, "
            "or name a topology."
        )
    from torch_geometric.data import Data

    if isinstance(topology, Data):
        _check_nodes(num_heads, topology.num_nodes)
        topology = topology.edge_index
    if isinstance(topology, Tensor):
        return _tensor_edges(topology)
    if hasattr(topology, "is_directed") and hasattr(topology, "edges"):
        return _networkx_edges(num_heads, topology)
    try:
        return [_pair(edge) for edge in topology]
    except TypeError as error:
        raise TypeError(
            f"Expected a topology name, networkx graph, Data, edge_index or pairs (got {type(topology).__name__}: "
            f"{error}). Do pass one of these."
        ) from None


def _pair(edge: Any) -> tuple[int, int]:
    pair = tuple(edge)
    if len(pair) != 2 or not all(isinstance(node, Integral) and not isinstance(node, bool) for node in pair):
        raise TypeError(f"an edge must be a (sender, receiver) pair of ints, not {edge!r}")
    return int(pair[0]), int(pair[1])


def _tensor_edges(edge_index: Tensor) -> list[tuple[int, int]]:
    if edge_index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"Expected edge_index of dtype int64 (got {edge_index.dtype}). Do convert it with .long().")
    if edge_index.dim() != 2 or edge_index.shape[0] != 2:
        raise ValueError(
            f"Expected edge_index of shape [2, E] (got {list(edge_index.shape)}). Do put senders in row 0 and "
            "receivers in row 1."
        )
    return [(j, i) for j, i in edge_index.t().tolist()]


def _networkx_edges(num_heads: int, graph: Any) -> list[tuple[int, int]]:
    _check_nodes(num_heads, graph.number_of_nodes())
    if set(graph.nodes) != set(range(num_heads)):
        raise ValueError(
            f"Expected networkx nodes 0..{num_heads - 1} (got {sorted(map(str, graph.nodes))[:4]}...). "
            "Do relabel with networkx.convert_node_labels_to_integers."
        )
    edges = [(j, i) for j, i in graph.edges()]
    if graph.is_directed():
        return edges
    return edges + [(i, j) for j, i in edges if i != j]


def _check_nodes(num_heads: int, num_nodes: int | None) -> None:
    if num_nodes != num_heads:
        raise ValueError(f"Expected a graph over {num_heads} heads (got {num_nodes} nodes). Do give one node per head.")


def _check(num_heads: int, edges: list[tuple[int, int]]) -> None:
    seen: set[tuple[int, int]] = set()
    for edge in edges:
        if not all(0 <= node < num_heads for node in edge):
            raise ValueError(
                f"Expected head indices in 0..{num_heads - 1} (got edge {edge[0]} -> {edge[1]}). "
                "Do drop the edge or raise num_heads."
            )
        if edge in seen:
            raise ValueError(
                f"Expected each edge once (got {edge[0]} -> {edge[1]} twice). Do remove the duplicate."
            )
        seen.add(edge)
