"""Measures of head graphs, from what was recorded of them."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from gohgraph.analysis.recording import Recording


class Measures(NamedTuple):
    """What one head graph is like. Weights are root mean squares over tokens and rounds, without self-loops.

    Args:
        static_share: sum of mean(alpha)^2 over sum of mean(alpha^2), all edges: 1 where weights never change, so that a
            linear graph folds into the output projection; 0 where all is token-conditioned. NaN without any weight.
        degree: effective in-degree of every head, `[H]`: (sum of weights)^2 over sum of squares, the number of senders
            it would have if they were equally strong.
        received, sent: sum of weights into and out of every head, `[H]`.
        reciprocity: weight that is answered, in [0, 1]: sum of min(w_ji, w_ij) over sum of w_ji (Squartini et al. 2013,
            arXiv 1208.4208). NaN without edges between heads.
        hubs: heads that send at least one standard deviation more than the mean head, most first.
        communities: groups of heads that exchange more among themselves (Louvain method, Blondel et al. 2008,
            arXiv 0803.0476, seed 0), largest first.
    """

    static_share: float
    degree: Tensor
    received: Tensor
    sent: Tensor
    reciprocity: float
    hubs: list[int]
    communities: list[list[int]]


def measures(heads: Mapping[str, Recording]) -> dict[str, Measures]:
    """Measures every graph of a recording; senders of earlier layers count in `degree` and `received` alone.

    Example:
        >>> import gohgraph as goh
        >>> conv = goh.HeadGraphConv(goh.head_graph(4, "ring"), head_dim=2, context_dim=3, edges="static")
        >>> _ = torch.nn.init.constant_(conv.edges.bias, 0.5)
        >>> with goh.record(conv) as heads:
        ...     _ = conv(torch.randn(5, 4, 2))
        >>> of_graph = measures(heads)[""]
        >>> of_graph.static_share, of_graph.reciprocity, of_graph.degree.tolist()
        (1.0, 0.0, [1.0, 1.0, 1.0, 1.0])
    """
    return {name: _measure(recording) for name, recording in heads.items()}


def _measure(recording: Recording) -> Measures:
    heads = recording.num_heads
    squares = (recording.mean.square() + recording.std.square()).sum().item()
    static_share = recording.mean.square().sum().item() / squares if squares else float("nan")
    weights = strength_matrix(recording)  # [H, S]
    weights[:, :heads].fill_diagonal_(0)
    received = weights.sum(dim=1)  # [H]
    degree = received.square() / weights.square().sum(dim=1).clamp(min=torch.finfo(weights.dtype).tiny)  # [H]
    in_layer = weights[:, :heads]  # [H, H]
    sent, total = in_layer.sum(dim=0), in_layer.sum().item()  # [H]
    reciprocity = torch.minimum(in_layer, in_layer.T).sum().item() / total if total else float("nan")
    high = sent.mean() + sent.std(correction=0)
    hubs = [head for head in sent.argsort(descending=True, stable=True).tolist() if sent[head] >= high > 0]
    return Measures(static_share, degree, received, sent, reciprocity, hubs, _communities(in_layer))


def strength_matrix(recording: Recording) -> Tensor:
    """Returns the strength of a recording's edges as a matrix `[H, S]`: rows receive, absent edges are zero."""
    senders, receivers = recording.edge_index
    width = recording.num_heads * (1 + int(senders.max()) // recording.num_heads) if senders.numel() else 0
    matrix = torch.zeros(recording.num_heads, max(width, recording.num_heads), dtype=torch.float64)
    matrix[receivers, senders] = recording.strength
    return matrix


def _communities(weights: Tensor) -> list[list[int]]:
    import networkx

    graph = networkx.from_numpy_array((weights + weights.T).numpy())
    groups = map(sorted, networkx.community.louvain_communities(graph, seed=0))
    return sorted(groups, key=lambda group: (-len(group), group))
