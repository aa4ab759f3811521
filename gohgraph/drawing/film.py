"""A film of head graphs that learn, from recordings of the checkpoints of a run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from gohgraph.common.files import checked_path, write_whole
from gohgraph.drawing.circles import draw
from gohgraph.drawing.colours import round_limit
from gohgraph.drawing.panels import panels_of, strongest_weight

if TYPE_CHECKING:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL.Image import Image

FILM_SUFFIXES = (".gif", ".mp4")
DPI = 72


def save_film(
    frames: Sequence[tuple[str, Mapping[str, Any]]],
    path: str | os.PathLike[str],
    *,
    title: str = "mean edge weights",
    fps: float = 3.0,
    limit: float | None = None,
    threshold: float = 0.05,
) -> None:
    """Save a film of recordings, such as those of the checkpoints of a run: the circles of `draw`, on one scale.

    Args:
        frames: (label, recording) in order, e.g. `("step 100", heads)`, all of models of one shape.
        path: ends in .gif, or in .mp4, which needs the program ffmpeg.
        title: what stands above every frame, before its label.
        fps: frames in a second; a GIF stays on its last one for two seconds.
        limit, threshold: as in `draw`, over all frames.

    Raises:
        ValueError: no frames, or an unknown suffix.
        OSError: ffmpeg is missing, or the file cannot be written; an older one is kept.

    Example:
        >>> import tempfile, torch
        >>> from types import SimpleNamespace
        >>> ring = torch.tensor([[0, 1, 2], [1, 2, 0]])
        >>> heads = {"graph": SimpleNamespace(edge_index=ring, num_heads=3, mean=torch.full((1, 3), 0.5))}
        >>> save_film([("step 0", heads), ("step 100", heads)], tempfile.mkdtemp() + "/film.gif")
    """
    path = checked_path(path, FILM_SUFFIXES)
    if not frames:
        raise ValueError(f"Expected frames for the film (got {frames!r}). Do record at least one checkpoint.")
    if limit is None:
        limit = round_limit(max(strongest_weight(panels_of(heads)) for _, heads in frames))
    if path.suffix.lower() == ".mp4" and shutil.which("ffmpeg") is None:
        raise FileNotFoundError(f"Expected the program ffmpeg for {path.name} (got no such program). Do install it.")
    images = [_image(heads, f"{title}, {label}", limit, threshold) for label, heads in frames]
    if path.suffix.lower() == ".gif":
        write_whole(path, lambda pending: _write_gif(images, pending, fps))
    else:
        write_whole(path, lambda pending: _write_mp4(images, pending, fps))


def _image(heads: Mapping[str, Any], title: str, limit: float, threshold: float) -> Image:
    """One frame as a `PIL.Image`."""
    from PIL.Image import frombuffer

    figure = draw(heads, title=title, limit=limit, threshold=threshold)
    figure.set_dpi(DPI)
    canvas = cast("FigureCanvasAgg", figure.canvas)
    canvas.draw()
    return frombuffer("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")


def _write_gif(images: list[Image], path: Path, fps: float) -> None:
    from PIL.Image import Dither, Quantize

    durations = [int(1000 / fps)] * (len(images) - 1) + [2000]
    # One palette for all frames, or their greys flicker.
    palette = images[-1].quantize(96, method=Quantize.MAXCOVERAGE)
    frames = [image.quantize(palette=palette, dither=Dither.NONE) for image in images]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True)


def _write_mp4(images: list[Image], path: Path, fps: float) -> None:
    from matplotlib.animation import FFMpegWriter
    from matplotlib.figure import Figure

    width, height = images[0].size
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    shown = axis.imshow(np.asarray(images[0]))
    writer = FFMpegWriter(fps=cast(int, fps))
    with writer.saving(figure, str(path), DPI):
        for image in images:
            shown.set_data(np.asarray(image))
            writer.grab_frame()
