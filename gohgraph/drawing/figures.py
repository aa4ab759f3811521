"""Figures without pyplot: no global figure list, no backend change."""

from __future__ import annotations

from pathlib import Path

from gohgraph.common.files import write_whole

INK = "#333333"
# Inches of a full-width picture: 900 pixels of a page at 100 per inch.
WIDTH = 9.0


def new_figure(width: float, height: float):
    """Return an empty `matplotlib.figure.Figure` of so many inches, with an Agg canvas of its own."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=200, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure, path: Path | None) -> None:
    """Write the picture beside its place and move it there whole; the same figure gives the same bytes.

    Raises:
        OSError: the file cannot be written; an older one is kept.
    """
    if path is None:
        return
    import matplotlib

    kind = path.suffix.lower()[1:]
    stamp = {"svg": "Date", "pdf": "CreationDate"}.get(kind)
    metadata = {stamp: None} if stamp else None
    with matplotlib.rc_context({"svg.hashsalt": "gohgraph"}):
        write_whole(
            path,
            lambda pending: figure.savefig(
                pending, format=kind, metadata=metadata, bbox_inches="tight", pad_inches=0.06
            ),
        )
