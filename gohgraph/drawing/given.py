"""What figures are given: recordings or networks, or a model, whose weights at rest are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from gohgraph.analysis.record import recordable

if TYPE_CHECKING:
    from gohgraph.analysis.network import HeadNetwork


def recordings_of(source: Any) -> Mapping[str, Any]:
    """Returns a recording as it is, and of a model the weights its edges have at a context of zero.

    Raises:
        ValueError: a model without head graphs.
        TypeError: a network, or nothing that can be drawn.

    Example:
        >>> recordings_of(nn.Linear(2, 2))
        Traceback (most recent call last):
        ValueError: Expected a model with head graphs (got a Linear without). Do draw what its heads read of each ...
    """
    if isinstance(source, Mapping):
        return source
    from gohgraph.analysis.network import HeadNetwork, at_rest

    if isinstance(source, HeadNetwork):
        raise TypeError("Expected a recording (got a HeadNetwork). Do pass it to draw_network.")
    _check_model(source)
    return at_rest(source)


def network_given(source: Any) -> HeadNetwork:
    """Returns a network as it is, and that of a recording or a model; raises as `recordings_of`."""
    from gohgraph.analysis.network import HeadNetwork, head_graph_of

    if isinstance(source, HeadNetwork):
        return source
    if not isinstance(source, Mapping):
        _check_model(source)
    return head_graph_of(source)


def _check_model(source: Any) -> None:
    if not isinstance(source, nn.Module):
        raise TypeError(
            f"Expected a recording, a network or a model (got {type(source).__name__}). Do pass what goh.record yields."
        )
    if not recordable(source)[0]:
        raise ValueError(
            f"Expected a model with head graphs (got a {type(source).__name__} without). Do draw what its heads read "
            "of each other: draw_network(composition_graph(model))."
        )
