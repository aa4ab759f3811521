"""Figures without pyplot (no global figure list, no backend change), and picture files written whole."""

from __future__ import annotations

import os
from pathlib import Path

SUFFIXES = (".png", ".svg", ".pdf")
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


def checked_path(path: str | os.PathLike[str] | None) -> Path | None:
    """Return where to save, once its suffix is known and its folder is there; `None` stays `None`.

    Raises:
        ValueError: the suffix is none of .png, .svg and .pdf.
        FileNotFoundError: the folder is missing.
    """
    if path is None:
        return None
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"Expected a file name that ends in .png, .svg or .pdf (got {path}). Do change its suffix.")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"Expected a folder for the picture (got {path.parent}, which is not there). Do make it."
        )
    return path


def save_figure(figure, path: Path | None) -> None:
    """Write the picture beside its place and move it there whole; the same figure gives the same bytes.

    Raises:
        OSError: the file cannot be written; an older one is kept.
    """
    if path is None:
        return
    import matplotlib

    pending = path.with_name(f".{path.name}.new")
    kind = path.suffix.lower()[1:]
    stamp = {"svg": "Date", "pdf": "CreationDate"}.get(kind)
    try:
        with matplotlib.rc_context({"svg.hashsalt": "gohgraph"}):
            figure.savefig(
                pending,
                format=kind,
                metadata={stamp: None} if stamp else None,
                bbox_inches="tight",
                pad_inches=0.06,
            )
        os.replace(pending, path)
    except OSError as error:
        raise OSError(
            f"Expected a place where the picture can be written (got {path}: {error.strerror}). Do choose another path."
        ) from error
    finally:
        pending.unlink(missing_ok=True)
