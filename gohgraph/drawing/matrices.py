"""Figure of head graphs as matrices: the adjacency of every layer and round."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from gohgraph.common.files import checked_path
from gohgraph.drawing.circles import check_threshold
from gohgraph.drawing.colours import colour_bar, colour_scale, end_of, is_dark
from gohgraph.drawing.figures import INK, finish, new_figure
from gohgraph.drawing.given import recordings_of
from gohgraph.drawing.panels import Panel, draw_panels, grid_of, panels_of, strongest_weight

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

# Cells of so many heads have room for a minus.
MOST_SIGNED = 16
LABEL = "mean edge weight   (row: receiver,  column: sender,  white: no edge)"


def draw_matrices(
    heads: Mapping[str, Any],
    path: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
    threshold: float = 0.0,
    limit: float | None = None,
    label: str = LABEL,
) -> Figure:
    """Draw the adjacency matrices of a recording, one heat map for each layer, site and round.

    Row i, column j is the mean of alpha_ji over the recorded tokens: what head i takes from head j. Where there is no
    edge the matrix is white; a cell below a tenth of the scale has a minus, up to 16 heads. Senders of earlier layers
    (`cross_layer`) are further columns to the right.

    Args:
        threshold: edges weaker than this share (0 to 1) of the strongest one have the colour of 0.
        heads, path, title, limit, label, and what is returned and raised: as in `draw`.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> ring = torch.tensor([[0, 1, 2], [1, 2, 0]])
        >>> recording = SimpleNamespace(edge_index=ring, num_heads=3, mean=torch.tensor([[0.5, -0.5, 0.1]]))
        >>> figure = draw_matrices({"decoder.layers.0.attention.output_graph": recording})
        >>> figure.axes[0].images[0].get_array().round(1).tolist()
        [[None, None, 0.1], [0.5, None, None], [None, -0.5, None]]
    """
    path = checked_path(path)
    check_threshold(threshold)
    heads = recordings_of(heads)
    panels = panels_of(heads)
    rounds = max(len(recording.mean) for recording in heads.values())
    rows, columns, size = grid_of(panels, widest=max(rounds, 4 // rounds * rounds))
    rings = max(panel.rings for panel in panels)
    height = min(size, 2.6) / (1 + rings)
    figure = new_figure(min(size, 2.6) * columns + 0.3, (0.9 * height + 0.4) * len(rows) + 0.7)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    strongest = strongest_weight(panels)
    colours = colour_scale(strongest, limit)
    draw_panels(axes, rows, lambda axis, panel: _draw_matrix(axis, panel, colours, threshold * strongest))
    notes = ["to the right of a line: heads of the layers before"] if rings else []
    notes += [f"below {threshold:.0%} of the strongest: as 0"] if threshold else []
    colour_bar(figure, axes, colours, "\n".join([label, *notes]))
    return finish(figure, title, path)


def adjacency(panel: Panel) -> np.ndarray:
    """Returns the weights of a panel as a matrix `[H, S]`, rows receive, NaN where there is no edge."""
    matrix = np.full((panel.num_heads, panel.num_heads * (1 + panel.rings)), np.nan)
    matrix[panel.receivers, panel.senders] = panel.weights
    return matrix


def _draw_matrix(axis: Axes, panel: Panel, colours: ScalarMappable, hidden_below: float) -> None:
    matrix = np.ma.masked_invalid(adjacency(panel))
    matrix[np.abs(matrix) < hidden_below] = 0.0
    norm = cast("Normalize", colours.norm)
    axis.imshow(matrix, cmap=colours.cmap, norm=norm, interpolation="nearest", aspect="equal")
    axis.set_title(panel.title, fontsize=9, color=INK, pad=3)
    heads = panel.num_heads
    if heads * (1 + panel.rings) <= MOST_SIGNED:
        _mark_negatives(axis, matrix, colours)
    step = next(step for step in (1, 2, 4, 8, 16, heads) if heads * (1 + panel.rings) / step <= 10 or step >= heads)
    ticks = np.arange(0, heads, step)
    axis.set_yticks(ticks)
    places = np.concatenate([ticks + ring * heads for ring in range(panel.rings + 1)])
    axis.set_xticks(places, [str(place % heads) for place in places])
    axis.tick_params(labelsize=7, length=2, color="#999999", labelcolor=INK)
    axis.spines[:].set(color="#bbbbbb", linewidth=0.6)
    for ring in range(1, panel.rings + 1):
        axis.axvline(ring * heads - 0.5, color=INK, linewidth=0.8)


def _mark_negatives(axis: Axes, matrix: np.ma.MaskedArray, colours: ScalarMappable) -> None:
    """Puts a minus into cells below a tenth of the scale, whose sign is then seen without colours."""
    rows, columns = np.nonzero(np.ma.filled(matrix, 0.0) < -0.1 * end_of(colours))
    inks = ["white" if is_dark(fill) else INK for fill in colours.to_rgba(np.ma.filled(matrix, 0.0)[rows, columns])]
    axis.hlines(rows, columns - 0.18, columns + 0.18, colors=inks, linewidth=0.9)
