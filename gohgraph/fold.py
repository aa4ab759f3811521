"""Folding a static output graph into the output projection."""

from __future__ import annotations

from copy import deepcopy

import torch

from gohgraph.conv import HeadGraphConv
from gohgraph.objects import MultiHeadAttention


@torch.no_grad()
def fold(attention: MultiHeadAttention) -> MultiHeadAttention:
    r"""Merges a static output graph into the output projection, exactly; the graph is gone afterwards.

    .. math:: y = \sum_i W_O^i \sum_j M_{ij} z_j = \sum_j \Big(\sum_i M_{ij} W_O^i\Big) z_j

    M is the graph's mixing matrix over all rounds. The product is taken in float64. The block's output y stays what it
    was; the head outputs it returns beside y are now those before messages, which matters where a later layer's graph
    with `cross_layer` reads them.

    Args:
        attention: changed in place.

    Returns:
        The same attention, its `output_graph` now `None`.

    Raises:
        TypeError: no `MultiHeadAttention`.
        ValueError: no output graph, or one that does not fold: token edges differ from token to token, RMS-normalised
            messages are not linear in the heads, earlier layers' heads have no part in this projection.

    Example:
        >>> from gohgraph.graph import head_graph
        >>> graph = HeadGraphConv(head_graph(4, "ring"), head_dim=2, context_dim=8, edges="static")
        >>> fold(MultiHeadAttention(8, 4, output_graph=graph)).output_graph is None
        True
    """
    if not isinstance(attention, MultiHeadAttention):
        raise TypeError(f"Expected a MultiHeadAttention (got {type(attention).__name__}). Do fold block by block.")
    graph = attention.output_graph
    if not isinstance(graph, HeadGraphConv):
        got = "none" if graph is None else type(graph).__name__
        raise ValueError(f"Expected a HeadGraphConv at the output site (got {got}). Do fold static head graphs only.")
    reasons = {
        "edges that depend on the token": graph.edges.weight is not None,
        "normalised messages, which are not linear": graph.gain is not None,
        "senders from other layers": graph.cross_layer > 0,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"Expected a static linear output graph (got {reason}). Do keep this graph unfolded.")
    mixing = deepcopy(graph).double().mixing()  # [H, H]
    weight = attention.output.weight.double().unflatten(1, (attention.num_heads, attention.head_dim))  # [M, H, D]
    folded = torch.einsum("mid,ij->mjd", weight, mixing).flatten(1)  # [M, H*D]
    attention.output.weight.copy_(folded)
    attention.output_graph = None
    return attention
