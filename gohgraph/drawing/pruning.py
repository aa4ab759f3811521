"""Figure of the loss of a model that loses edges."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gohgraph.common.files import checked_path
from gohgraph.drawing.figures import INK, finish, frame_axis, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, without its yellow; markers and dashes tell lines apart in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "x")
RANDOM = "#777777"
Curve = Sequence[tuple[float, float]]


def draw_pruning(
    curves: Mapping[str, Sequence[Curve]],
    path: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
) -> Figure:
    """Draw the loss of pruned models against the share of edges kept, one line for each order of removal.

    Args:
        curves: name of each order and its curves, one for each seed, as `pruning_curve` returns them: (share kept,
            loss in nats). Of several seeds the line is the mean and the band the standard deviation. An order whose
            name begins with "random" is grey and dashed.
        path, title, and what is returned: as in `draw`.

    Raises:
        ValueError: no curves, or seeds of one order over different shares.

    Example:
        >>> curves = {"by strength": [[(1.0, 1.5), (0.5, 1.6)]], "random": [[(1.0, 1.5), (0.5, 2.0)]]}
        >>> figure = draw_pruning(curves)
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['by strength', 'random']
    """
    path = checked_path(path)
    empty = [name for name, seeds in curves.items() if not min(map(len, seeds), default=0)]
    if empty or not curves:
        raise ValueError(
            f"Expected curves to draw (got none in {empty or 'an empty mapping'}). Do measure them with pruning_curve."
        )
    figure = new_figure(6.0, 3.9)
    axis = figure.subplots()
    learned = 0
    for name, seeds in curves.items():
        shares = sorted({tuple(share for share, _ in sorted(curve)) for curve in seeds})
        if len(shares) > 1:
            raise ValueError(f"Expected curves over the same shares (got {shares} in {name!r}). Do measure them alike.")
        points = np.array([sorted(curve) for curve in seeds], dtype=float)  # [seeds, points, 2]
        is_random = name.startswith("random")
        style: dict[str, Any] = {"color": RANDOM, "linestyle": "--", "marker": "."}
        if not is_random:
            place = learned % len(COLOURS)
            style = {"color": COLOURS[place], "marker": MARKERS[place], "markersize": 4.5}
            learned += 1
        share, mean, spread = 100 * points[0, :, 0], points[:, :, 1].mean(axis=0), points[:, :, 1].std(axis=0, ddof=0)
        axis.plot(share, mean, label=name, linewidth=1.4, **style)
        if len(points) > 1:
            axis.fill_between(share, mean - spread, mean + spread, color=style["color"], alpha=0.18, linewidth=0)
    axis.set_xlabel("edges kept [%]", fontsize=9, color=INK)
    axis.set_ylabel("loss [nats]", fontsize=9, color=INK)
    axis.set_xlim(102, -2)
    frame_axis(axis, grid="both")
    axis.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="upper left")
    return finish(figure, title, path, fontsize=11)
