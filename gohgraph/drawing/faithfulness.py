"""Figure of how much of a behaviour a circuit carries, against the edges it keeps."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from gohgraph.analysis.faithfulness import RANDOM, Faithfulness
from gohgraph.common.files import checked_path
from gohgraph.drawing.figures import INK, finish, frame_axis, new_figure
from gohgraph.drawing.pruning import COLOURS, MARKERS
from gohgraph.drawing.pruning import RANDOM as GREY

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {"network": "this network", RANDOM: "random edges"}


def draw_faithfulness(
    measured: Faithfulness, path: str | os.PathLike[str] | None = None, *, title: str | None = None
) -> Figure:
    """Draw f against the share of edges kept, on a logarithmic axis, one line for each order of edges.

    Bands are the 95 % intervals over examples; at 0 is the model with all edges patched, at 1 the model as it is.

    Args:
        measured: by `faithfulness`.
        path, title, and what is returned and raised: as in `draw`.

    Example:
        >>> import torch
        >>> values = {"network": torch.tensor([[0.5, 0.6], [1.0, 1.0]]).double()}
        >>> whole, none = torch.ones(2).double(), torch.zeros(2).double()
        >>> figure = draw_faithfulness(Faithfulness((0.1, 1.0), values, whole, none))
        >>> figure.axes[0].get_xscale(), [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ('log', ['this network'])
    """
    path = checked_path(path)
    figure = new_figure(6.0, 3.9)
    axis = figure.subplots()
    axis.axhline(1.0, color=INK, linewidth=0.7)
    axis.axhline(0.0, color=INK, linewidth=0.7)
    for place, name in enumerate(measured.values):
        points = np.array(measured.curve(name))  # [S, 3]
        share = 100 * np.array(measured.shares)
        style: dict[str, Any] = {"color": GREY, "linestyle": "--", "marker": "."}
        if name != RANDOM:
            marker = MARKERS[place % len(MARKERS)]
            style = {"color": COLOURS[place % len(COLOURS)], "marker": marker, "markersize": 4.5}
        axis.plot(share, points[:, 0], label=NAMES.get(name, name), linewidth=1.4, **style)
        axis.fill_between(share, points[:, 1], points[:, 2], color=style["color"], alpha=0.18, linewidth=0)
    axis.set_xscale("log")
    axis.set_xlabel("edges kept [%]", fontsize=9, color=INK)
    axis.set_ylabel("f, share of the behaviour left", fontsize=9, color=INK)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    frame_axis(axis, grid="both")
    axis.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="best")
    return finish(figure, title, path, fontsize=11)
