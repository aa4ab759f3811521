"""Figures without pyplot (no global figure list, no backend change), and files written whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
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


def checked_path(path: str | os.PathLike[str] | None, suffixes: Sequence[str] = SUFFIXES) -> Path | None:
    """Return where to save, once its suffix is known and its folder is there; `None` stays `None`.

    Raises:
        ValueError: the suffix is none of `suffixes`.
        FileNotFoundError: the folder is missing.
    """
    if path is None:
        return None
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        known = f"{', '.join(suffixes[:-1])} or {suffixes[-1]}" if len(suffixes) > 1 else suffixes[0]
        raise ValueError(f"Expected a file name that ends in {known} (got {path}). Do change its suffix.")
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


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file beside its place and move it there whole.

    Raises:
        OSError: the file cannot be written; an older one is kept.
    """
    # The suffix stays the last: writers choose the format by it.
    pending = path.with_name(f".{path.stem}.new{path.suffix}")
    try:
        write(pending)
        os.replace(pending, path)
    except OSError as error:
        raise OSError(
            f"Expected a place where the picture can be written (got {path}: {error.strerror}). Do choose another path."
        ) from error
    finally:
        pending.unlink(missing_ok=True)
