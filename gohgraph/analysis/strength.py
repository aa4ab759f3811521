"""How strong edges are, and whether that says what they are worth."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from gohgraph.analysis.record import head_graphs
from gohgraph.analysis.recording import Recording
from gohgraph.graphs.edge_graph import EdgeGraph


def edge_strength(source: nn.Module | Mapping[str, Recording]) -> dict[str, Tensor]:
    r"""Returns the strength of every edge, `[E]` by head graph.

    Of a recording the root mean square of alpha over tokens and rounds. Of a model, without running it,

    .. math:: \Big(\mathrm{mean}_r\, s_e^2 + \|W_e\|^2\Big)^{1/2},

    what that is before the tanh under contexts of independent parts with mean 0 and variance 1.

    Example:
        >>> import gohgraph as goh
        >>> conv = goh.HeadGraphConv(goh.head_graph(3, "ring"), head_dim=2, context_dim=4, edges="static")
        >>> _ = torch.nn.init.constant_(conv.edges.bias, -0.5)
        >>> edge_strength(conv)[""].tolist()
        [0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    """
    if not isinstance(source, nn.Module):
        return {name: recording.strength for name, recording in source.items()}
    return {name: _weight_strength(conv) for name, conv in head_graphs(source).items()}


def rank_agreement(scores: Mapping[str, Tensor], effects: Mapping[str, Tensor]) -> float:
    """Returns how well scores of edges order them by what their loss costs: Spearman's rank correlation.

    Args:
        scores: `[E]` by head graph, e.g. `edge_strength` or `edge_attribution`.
        effects: `[E]` by head graph, as `edge_ablation` measures them; edges of NaN do not count.

    Returns:
        In [-1, 1]; NaN where either is the same for all edges.

    Example:
        >>> rank_agreement({"graph": torch.tensor([0.1, 0.5, 0.2])}, {"graph": torch.tensor([0.0, 3.0, 1.0])})
        1.0
    """
    if {n: s.shape for n, s in scores.items()} != {n: e.shape for n, e in effects.items()}:
        raise ValueError(f"Expected scores of {list(effects)} (got {list(scores)}). Do score the edges of one model.")
    first = torch.cat([scores[name].cpu().double() for name in effects])  # [edges]
    second = torch.cat([effects[name].cpu().double() for name in effects])  # [edges]
    known = ~second.isnan()
    ranks = torch.stack([_ranks(first[known]), _ranks(second[known])])  # [2, edges]
    return torch.corrcoef(ranks)[0, 1].clamp(-1, 1).item()


def _weight_strength(conv: EdgeGraph) -> Tensor:
    edges = conv.edges
    squares = edges.bias.detach().cpu().double().square()  # [R, E]
    if edges.weight is not None:
        weight = edges.weight.detach().cpu().double()  # [R, E, M] or [R, E, r]
        weight = weight if edges.down is None else weight @ edges.down.detach().cpu().double()  # [R, E, M]
        squares = squares + weight.square().sum(dim=-1)
    # What edges are multiplied by; not every device has float64.
    factor = edges.rescaled(torch.ones_like(edges.bias[0]), edges.learned_scale).detach().cpu()  # [E]
    strength = squares.mean(dim=0).sqrt() * factor.abs()  # [E]
    return strength * cast(Tensor, conv.kept).cpu() if conv.traits.learned else strength


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0, equal values sharing the mean of theirs."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts + 1) / 2)[place]
