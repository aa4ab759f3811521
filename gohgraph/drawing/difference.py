"""Figure of what changed between two recordings of one graph."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gohgraph.drawing.circles import draw
from gohgraph.drawing.matrices import draw_matrices
from gohgraph.graphs.cross_layer import FIRST, Reach

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Difference:
    """The change of a graph's mean weights, in the shape of a `Recording`."""

    edge_index: Tensor
    num_heads: int
    mean: Tensor
    load: Tensor | None = None
    num_shared: int | None = None
    reach: Reach = 0


def difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Difference]:
    """Returns second minus first, graph by graph; an edge that one of them lacks is zero there.

    Args:
        first, second: recordings of two texts, two checkpoints, before and after training, whole and pruned.

    Example:
        >>> from types import SimpleNamespace
        >>> one = SimpleNamespace(edge_index=torch.tensor([[0], [1]]), num_heads=2, mean=torch.tensor([[0.25]]))
        >>> two = SimpleNamespace(edge_index=torch.tensor([[0, 1], [1, 0]]), num_heads=2, mean=torch.tensor([[1, 2.0]]))
        >>> difference({"graph": one}, {"graph": two})["graph"].mean.tolist()
        [[0.75, 2.0]]
    """
    if not first or {n: _shape(r) for n, r in first.items()} != {n: _shape(r) for n, r in second.items()}:
        raise ValueError(
            f"Expected two recordings of the same head graphs (got {list(first)} and {list(second)}). "
            "Do compare models of one shape."
        )
    return {name: _difference(first[name], second[name]) for name in first}


def draw_difference(
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    path: str | os.PathLike[str] | None = None,
    *,
    view: str = "circle",
    title: str | None = None,
    threshold: float = 0.05,
    limit: float | None = None,
) -> Figure:
    """Draw how the mean weights of edges differ between two recordings: orange rose, blue fell.

    Args:
        first, second: as in `difference`; what is drawn is second minus first.
        view: `"circle"`, or `"matrix"` where every number matters.
        path, title, threshold, limit, and what is returned: as in `draw`.

    Raises:
        ValueError: another view, recordings of different graphs, and as `draw`.

    Example:
        >>> from types import SimpleNamespace
        >>> ring = torch.tensor([[0, 1, 2], [1, 2, 0]])
        >>> first, second = (
        ...     {"graph": SimpleNamespace(edge_index=ring, num_heads=3, mean=torch.full((1, 3), value))}
        ...     for value in (0.1, 0.3))
        >>> draw_difference(first, second).axes[0].get_title()
        'graph'
    """
    if view not in ("circle", "matrix"):
        raise ValueError(f"Expected a view 'circle' or 'matrix' (got {view!r}). Do choose one of them.")
    changes = difference(first, second)
    if view == "matrix":
        label = "change of the mean edge weight   (row: receiver,  column: sender,  white: no edge)"
        return draw_matrices(changes, path, title=title, limit=limit, label=label)
    label = "change of the mean edge weight   (arrow: from sender to receiver,  fill: a head's self-loop)"
    return draw(changes, path, title=title, threshold=threshold, limit=limit, label=label)


def _shape(recording: Any) -> tuple[int, int, bool]:
    # Of "first" and of 1 the senders have the same numbers.
    return recording.num_heads, len(recording.mean), getattr(recording, "reach", 0) == FIRST


def _difference(first: Any, second: Any) -> Difference:
    if torch.equal(first.edge_index, second.edge_index):
        edges, before, after = first.edge_index, first.mean, second.mean
    else:
        edges = torch.cat([first.edge_index, second.edge_index], dim=1).unique(dim=1)  # [2, E]
        before, after = (_on(edges, recording) for recording in (first, second))
    known = {name: getattr(second, name) for name in ("load", "num_shared", "reach") if hasattr(second, name)}
    return Difference(edges, first.num_heads, after - before, **known)


def _on(edges: Tensor, recording: Any) -> Tensor:
    """The mean weights of a recording over other edges, `[R, E']`."""
    numbers = {tuple(edge): number for number, edge in enumerate(recording.edge_index.t().tolist())}
    padded = torch.cat([recording.mean, recording.mean.new_zeros(len(recording.mean), 1)], dim=1)  # [R, E + 1]
    return padded[:, [numbers.get(tuple(edge), len(numbers)) for edge in edges.t().tolist()]]
