"""A head network as columns of plain values, for files: what it holds, and what Gephi lays out and paints by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from gohgraph.analysis.network import HeadNetwork

# Edges that are in files alone: along the residual stream, where nothing else joins two layers.
RESIDUAL = "residual"
# Units between heads and between layers, and the diameter of a head of full load or importance.
ACROSS, UP, SIZE = 40.0, 60.0, 24.0
# As in the figures: blue below 0, orange above, and of what is 0.
NEGATIVE, POSITIVE, ZERO = (np.array(colour) for colour in ((8, 74, 145), (156, 50, 3), (236, 236, 236)))
KEY_VALUE = "key/value"


class Columns(NamedTuple):
    """Columns by name.

    Attributes:
        nodes: of every node.
        edges: of every edge.
        ends: its sender and its receiver.
    """

    nodes: dict[str, list[Any]]
    edges: dict[str, list[Any]]
    ends: tuple[list[int], list[int]]


def columns_of(network: HeadNetwork) -> Columns:
    """Returns all attributes of a network."""
    nodes, edges = network.attributes()
    senders, receivers = network.edge_index.tolist()
    return Columns(
        {name: _plain(network[name]) for name in nodes}, {name: _plain(network[name]) for name in edges},
        (senders, receivers),
    )  # fmt: skip


def for_layout(network: HeadNetwork) -> Columns:
    """Returns them with `weight`, |mean| of an edge, and with residual edges between layers that no edge joins.

    Layouts that let edges pull, as Gephi's do, would drive such layers apart. A residual edge leads from a head to the
    one of the same number in the next layer, and pulls as the mean edge does.
    """
    columns = columns_of(network)
    weight = network.mean.abs().nan_to_num(0.0, posinf=0.0)
    edges = {**columns.edges, "weight": weight.tolist()}
    pull = float(weight[weight > 0].mean()) if (weight > 0).any() else 1.0
    added = residual_edges(network)
    fill = {"graph": RESIDUAL, "site": RESIDUAL, "round": 1, "mean": 0.0, "std": 0.0, "share": 1.0, "weight": pull}
    for name, column in edges.items():
        column += [len(column) + number if name == "edge" else fill.get(name, np.nan) for number in range(len(added))]
    senders, receivers = columns.ends
    return Columns(columns.nodes, edges, (senders + [j for j, _ in added], receivers + [i for _, i in added]))


def residual_edges(network: HeadNetwork) -> list[tuple[int, int]]:
    """Returns (sender, receiver) from every head to that of the same number in the next block of its stack.

    Only between blocks that no edge joins.
    """
    blocks = {title: number for number, title in enumerate(network.blocks)}
    of_node = np.array([blocks[title] for title in network.block])
    senders, receivers = of_node[network.edge_index.numpy()]
    joined = set(zip(senders.tolist(), receivers.tolist(), strict=True))
    places: dict[tuple[int, bool, int], int] = {}
    for node, (block, kind, head) in enumerate(zip(of_node, network.kind, network.head.tolist(), strict=True)):
        places.setdefault((int(block), kind == KEY_VALUE, head), node)
    last: dict[str, int] = {}
    edges = []
    for title, block in blocks.items():
        stack = title.split("layer")[0]
        before, last[stack] = last.get(stack), block
        if before is None or (before, block) in joined or (block, before) in joined:
            continue
        pairs = [((before, *place[1:]), place) for place in places if place[0] == block]
        edges += [(places[sender], places[receiver]) for sender, receiver in pairs if sender in places]
    return edges


def node_places(network: HeadNetwork) -> np.ndarray:
    """Returns x and y of every node, `[N, 2]`: layers from below, heads from the left, key/value heads last."""
    blocks = {title: number for number, title in enumerate(network.blocks)}
    is_key = np.array([kind == KEY_VALUE for kind in network.kind], dtype=bool)
    x = network.head.numpy().astype(float)
    x[is_key] += x[~is_key].max(initial=0) + 2
    return np.stack([ACROSS * x, UP * np.array([blocks[title] for title in network.block], dtype=float)], axis=1)


def node_sizes(network: HeadNetwork) -> np.ndarray:
    """Returns the diameter of every node, `[N]`: by importance where that is known, else by load."""
    share = network.load.numpy()
    if "importance" in network and (importance := network.importance.nan_to_num()).max() > 0:
        share = (importance / importance.max()).numpy()
    return SIZE * (0.5 + 0.5 * np.sqrt(np.clip(share, 0, 1)))


def node_colours(network: HeadNetwork) -> np.ndarray:
    """Returns the colour of every node, `[N, 3]` of 0..255: that of its self-loop at the first site, white without."""
    colours = np.full((network.num_nodes, 3), 255)
    senders, receivers = network.edge_index.numpy()
    loops = np.flatnonzero(senders == receivers)[::-1]
    colours[receivers[loops]] = signed_colours(network.mean.numpy())[loops]
    return colours


def signed_colours(weights: np.ndarray) -> np.ndarray:
    """Returns the colour of every weight, `[E, 3]` of 0..255, on one scale up to the strongest.

    Example:
        >>> signed_colours(np.array([1.0, 0.0])).tolist()
        [[156, 50, 3], [236, 236, 236]]
    """
    weights = np.nan_to_num(weights, posinf=0.0, neginf=0.0)
    share = (np.abs(weights) / (np.abs(weights).max(initial=0.0) or 1.0))[:, None]
    end = np.where(weights[:, None] < 0, NEGATIVE, POSITIVE)
    return np.round(share * end + (1 - share) * ZERO).astype(int)


def _plain(values: Any) -> list[Any]:
    return list(values) if isinstance(values, list) else values.tolist()
