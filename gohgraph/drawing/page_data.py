"""The columns an interactive page is drawn from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gohgraph.analysis.record import Recording, Recordings
from gohgraph.drawing.figures import INK
from gohgraph.drawing.layered import Layout, arcs, head_names, head_sizes

if TYPE_CHECKING:
    from gohgraph.analysis.network import HeadNetwork

# A weight of a token is one byte: MOST_BYTE steps from 0 to the largest.
MOST_BYTE = 127


def strongest_edges(network: HeadNetwork, most: int) -> np.ndarray:
    """Returns the numbers of the strongest edges between different heads, weakest first, so that they lie on top."""
    between = np.flatnonzero((network.edge_index[0] != network.edge_index[1]).numpy())
    strength = (network.mean.square() + network.std.square()).numpy()[between]
    return between[np.argsort(strength, kind="stable")][max(0, len(between) - most) :]


def self_loops(network: HeadNetwork) -> np.ndarray:
    """Returns the number of every head's self-loop, `[N]`, of its first site; -1 where it has none."""
    senders, receivers = network.edge_index.numpy()
    loops = np.full(network.num_nodes, -1)
    with_loop = np.flatnonzero(senders == receivers)[::-1]
    loops[receivers[with_loop]] = with_loop
    return loops


def edge_columns(network: HeadNetwork, layout: Layout, edges: np.ndarray) -> dict[str, Any]:
    """Returns a column for all that an edge shows or tells."""
    radii = layout.radius * head_sizes(network)
    paths, tips = arcs(network, layout, edges, radii, np.full(len(edges), 0.7 * layout.radius))
    middle = tips.mean(axis=1)  # [E, 2]
    ahead = tips[:, 0] - middle
    mean = network.mean.numpy()[edges]
    columns = {
        # Every second point: twelve pieces of a curve are smooth on a screen.
        "xs": [np.round(path[::2, 0], 3).tolist() for path in paths],
        "ys": [np.round(path[::2, 1], 3).tolist() for path in paths],
        "tip_x": middle[:, 0],
        "tip_y": middle[:, 1],
        "angle": np.arctan2(ahead[:, 1], ahead[:, 0]) - np.pi / 2,
        "weight": mean,
        "width": np.ones(len(edges)),
        "tip": np.full(len(edges), 5.0),
        "sender": [network.label[j] for j in network.edge_index[0, edges].tolist()],
        "receiver": [network.label[i] for i in network.edge_index[1, edges].tolist()],
        "block": [network.block[i] for i in network.edge_index[1, edges].tolist()],
        "site": [network.site[e] for e in edges],
    }
    for name in ("round", "mean", "std", "share", "edge_importance"):
        if name in network:
            columns[name] = network[name].numpy()[edges]
    return columns


def head_columns(network: HeadNetwork, layout: Layout, loops: np.ndarray) -> dict[str, Any]:
    """Returns a column for all that a head shows or tells."""
    weight = np.where(loops < 0, 0.0, network.mean.numpy()[np.maximum(loops, 0)] if len(network.mean) else 0.0)
    columns = {
        "x": layout.places[:, 0],
        "y": layout.places[:, 1],
        "radius": layout.radius * head_sizes(network),
        "side": 1.77 * layout.radius * head_sizes(network),
        "loop": weight,
        "weight": weight,
        "ink": [INK] * network.num_nodes,
        "number": head_names(network),
        "load": network.load.numpy(),
        **{name: list(network[name]) for name in ("label", "block", "kind")},
    }
    return columns | ({"importance": network.importance.numpy()} if "importance" in network else {})


def token_weights(heads: Recordings, tokens: int) -> np.ndarray:
    """Returns the weights of the first tokens over all edges of the network, `[N, E]`; heads that are off send none."""
    return np.concatenate([_weights_of(recording, tokens).numpy() for recording in heads.values()], axis=1)


def as_bytes(weights: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns weights as int8 of the same shape, and the weight that 1 stands for.

    Example:
        >>> as_bytes(np.array([[0.0, -1.0], [0.5, 0.25]]))[0].tolist()
        [[0, -127], [64, 32]]
    """
    scale = float(np.abs(weights).max(initial=0.0)) / MOST_BYTE or 1.0
    return np.round(weights / scale).astype(np.int8), scale


def _weights_of(recording: Recording, tokens: int) -> torch.Tensor:
    every = recording.every
    weights = every["weights"].float()  # [N, R, E]
    weights = weights.expand(tokens, -1, -1) if len(weights) == 1 else weights[:tokens]
    if "active" in every:
        active = every["active"][:tokens]  # [N, H]
        senders, receivers = recording.edge_index
        both = active[:, senders % recording.num_heads] & active[:, receivers]  # [N, E]
        weights = weights * both.unsqueeze(1)
    return weights.flatten(1)  # [N, R*E]
