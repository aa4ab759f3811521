"""Figures without pyplot: no global figure list, no backend change."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gohgraph.common.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#333333"
# Inches of a full-width picture: 900 pixels of a page at 100 per inch.
WIDTH = 9.0
# How wide a letter of a title is, to its height.
LETTER = 0.55


def new_figure(width: float, height: float) -> Figure:
    """Returns an empty `matplotlib.figure.Figure` of so many inches, with an Agg canvas."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=200, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def finish(figure: Figure, title: str | None, path: Path | None, *, fontsize: float = 12) -> Figure:
    """Sets the title, saves the picture where there is a path, and returns the figure; see `save_figure`."""
    if title:
        title = wrapped(title, figure.get_figwidth(), fontsize)
        figure.suptitle(title, fontsize=fontsize, color=INK, parse_math=False)
    save_figure(figure, path)
    return figure


def wrapped(text: str, width: float, fontsize: float) -> str:
    """Returns a text whose lines fit into a width in inches.

    Example:
        >>> wrapped("every line is as long as fits", width=2.0, fontsize=12)
        'every line is as long\\nas fits'
    """
    room = int(width * 72 / (LETTER * fontsize))
    return "\n".join(textwrap.fill(line, max(room, 20)) for line in text.splitlines())


def save_figure(figure: Figure, path: Path | None) -> None:
    """Writes a picture whole or not at all; the same figure gives the same bytes, an older file is kept on errors."""
    if path is None:
        return
    import matplotlib

    kind = path.suffix.lower()[1:]
    stamp = {"svg": "Date", "pdf": "CreationDate"}.get(kind)
    metadata = {stamp: None} if stamp else None
    style: dict[str, Any] = {"format": kind, "metadata": metadata, "bbox_inches": "tight", "pad_inches": 0.06}
    with matplotlib.rc_context({"svg.hashsalt": "gohgraph"}):
        write_whole(path, lambda pending: figure.savefig(pending, **style))


def frame_axis(axis: Axes, *, labelsize: float = 8, grid: Literal["both", "x", "y"] = "y") -> None:
    """Gives an axis grey lines to the left and below, small ticks, and a faint grid behind the data."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#999999")
    axis.tick_params(labelsize=labelsize, color="#999999", labelcolor=INK)
    axis.grid(axis=grid, color="#eeeeee", linewidth=0.8)
    axis.set_axisbelow(True)
