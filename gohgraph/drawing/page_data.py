"""The columns an interactive page is drawn from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gohgraph.analysis.recording import Recording, Recordings
from gohgraph.common.checks import there
from gohgraph.drawing.layered import Layout, arcs, head_names, ring_radii, self_loops

if TYPE_CHECKING:
    from gohgraph.analysis.network import HeadNetwork

# A weight of a token is one byte: MOST_BYTE steps from 0 to the largest.
MOST_BYTE = 127


def strongest_edges(network: HeadNetwork, most: int, weights: np.ndarray | None = None) -> np.ndarray:
    """Returns the numbers of the strongest edges between different heads, weakest first, so that they lie on top.

    Args:
        network: whose edges.
        most: so many by their mean; and as many again of those that are strongest at single tokens.
        weights: of every token, `[N, E]`; `None` where they are not known.
    """
    between = np.flatnonzero((network.edge_index[0] != network.edge_index[1]).numpy())
    strength = (network.mean.square() + network.std.square()).numpy()[between]
    order = np.argsort(strength, kind="stable")  # weakest first
    chosen = order[max(0, len(between) - most) :]
    if weights is not None and len(chosen) < len(between):
        at_tokens = np.abs(weights[:, between])
        # Every token's strongest, then every token's second, and so on, until as many again are there.
        ranked = np.argpartition(-at_tokens, min(most, at_tokens.shape[1] - 1), axis=1)[:, :most]
        ranked = np.take_along_axis(ranked, np.argsort(-np.take_along_axis(at_tokens, ranked, 1), axis=1), 1)  # [N, m]
        further = ranked.T.ravel()[~np.isin(ranked.T.ravel(), chosen)]
        _, first = np.unique(further, return_index=True)
        chosen = np.concatenate([chosen, further[np.sort(first)][:most]])
    return between[chosen[np.argsort(strength[chosen], kind="stable")]]


def edge_columns(network: HeadNetwork, layout: Layout, edges: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    """Returns a column for all that an edge shows or tells, and the points of the curves, `[E, 13, 2]`.

    As lists of lists the points would be half of the file, and of the time to read it: the page cuts them.
    """
    radii = ring_radii(network, layout, len(self_loops(network)))[-1]
    paths, tips = arcs(network, layout, edges, radii, np.full(len(edges), 0.7 * layout.radius))
    middle = tips.mean(axis=1)  # [E, 2]
    ahead = tips[:, 0] - middle
    mean = network.mean.numpy()[edges]
    senders, receivers = network.edge_index[:, edges].tolist()
    columns = {
        **{name: [[]] * len(edges) for name in ("xs", "ys")},
        "tip_x": middle[:, 0],
        "tip_y": middle[:, 1],
        "angle": np.arctan2(ahead[:, 1], ahead[:, 0]) - np.pi / 2,
        "weight": mean,
        "width": np.ones(len(edges)),
        "tip": np.full(len(edges), 5.0),
        "alpha": np.ones(len(edges)),
        "from": np.array(senders, dtype=np.int32),
        "to": np.array(receivers, dtype=np.int32),
        "sender": [network.label[j] for j in senders],
        "receiver": [network.label[i] for i in receivers],
        "block": [network.block[i] for i in receivers],
        "site": [network.site[e] for e in edges],
    }
    for name in ("round", "mean", "std", "share", "edge_importance"):
        if name in network:
            columns[name] = network[name].numpy()[edges]
    # Every second point: twelve pieces of a curve are smooth on a screen.
    return columns, paths[:, ::2].astype(np.float32)


def head_columns(network: HeadNetwork, layout: Layout) -> dict[str, Any]:
    """Returns a column for all that a head shows or tells: among it a pair for the self-loops of every site."""
    loops, mean = self_loops(network), network.mean.numpy()
    weights = [np.where(row < 0, 0.0, mean[np.maximum(row, 0)] if len(mean) else 0.0) for row in loops.values()]
    radii = ring_radii(network, layout, len(loops))
    columns = {
        "x": layout.places[:, 0],
        "y": layout.places[:, 1],
        "row": layout.rows.astype(np.int32),
        "number": head_names(network),
        "load": network.load.numpy(),
        **{name: list(network[name]) for name in ("label", "block", "kind")},
    }
    for number, (weight, radius) in enumerate(zip(weights, radii, strict=True)):
        columns |= {f"loop_{number}": weight, f"mean_{number}": weight}
        columns |= {f"radius_{number}": radius, f"side_{number}": 1.77 * radius}
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
    every = there(recording.every)
    weights = every["weights"].float()  # [N, R, E]
    weights = weights.expand(tokens, -1, -1) if len(weights) == 1 else weights[:tokens]
    if "active" in every:
        active = every["active"][:tokens]  # [N, H]
        senders, receivers = recording.edge_index
        both = active[:, senders % recording.num_heads] & active[:, receivers]  # [N, E]
        weights = weights * both.unsqueeze(1)
    return weights.flatten(1)  # [N, R*E]
