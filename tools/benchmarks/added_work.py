"""What head graphs cannot do without beyond the plain model they stand in: products, and weights to read."""

from __future__ import annotations

from torch import nn

from benchmarks.limits import Work
from gohgraph.graphs.conv import HeadGraphConv


def trained(model: nn.Module, tokens: int, numbers: float) -> Work:
    """Returns the products of a training step: weights and messages of all edges, forward and twice that backward.

    Args:
        model: the graphs in it count, of full rank.
        tokens: of the step.
        numbers: that an edge carries for a token: a head's outputs, or the scores of as many keys.

    Example:
        >>> import gohgraph as goh
        >>> graph = goh.HeadGraphConv(goh.head_graph(2), head_dim=3, context_dim=6)
        >>> trained(graph, tokens=5, numbers=3)
        Work(flops=1080.0, bytes=0.0)
    """
    flops = sum(2.0 * tokens * edges * (width + numbers) for edges, width in _graphs(model))
    return Work(3 * flops, 0.0)


def decoded(model: nn.Module) -> Work:
    """Returns what the step of one token reads: the weights of all graphs, once.

    Example:
        >>> import gohgraph as goh
        >>> decoded(goh.HeadGraphConv(goh.head_graph(2), head_dim=3, context_dim=6)).bytes
        112.0
    """
    return Work(0.0, sum(4.0 * edges * (width + 1) for edges, width in _graphs(model)))


def _graphs(model: nn.Module) -> list[tuple[int, int]]:
    """Of every graph its edges, and how many numbers of its context their weights are made of."""
    convs = [module.edges for module in model.modules() if isinstance(module, HeadGraphConv)]
    return [(edges.num_edges, 0 if edges.weight is None else edges.context_dim) for edges in convs]
