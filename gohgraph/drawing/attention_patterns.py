"""Figures of what heads attend to: one head over its tokens, or all of them as thumbnails."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from gohgraph.analysis.attention_record import AttentionRecording
from gohgraph.analysis.module_names import of_layer
from gohgraph.analysis.recording import Recordings
from gohgraph.common.files import checked_path
from gohgraph.drawing.figures import INK, WIDTH, finish, new_figure
from gohgraph.drawing.tokens import readable, text_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# From paper to ink in one hue, of falling lightness: in grey print the order stays.
WEIGHTS = ("#ffffff", "#cfe0f1", "#7fb0d9", "#2f6fb0", "#123a73", "#081a3a")
# A weight of a tenth is to be seen beside one of 1: shades go by its square root.
GAMMA = 0.5
TICKS = (0, 0.05, 0.2, 0.5, 1)
MOST_LABELS, LONGEST_LABEL, DOTS = 64, 14, 28


def draw_attention(
    heads: Recordings,
    layer: int | str | None = None,
    head: int | None = None,
    path: str | os.PathLike[str] | None = None,
    *,
    example: int | None = None,
    title: str | None = None,
    key_strings: Sequence[str] | None = None,
) -> Figure:
    """Draw what heads attend to: the pattern of one head over the tokens, or thumbnails of many.

    Row t, column s is the weight that query t gives key s; the darker, the larger, by its square root. In thumbnails
    every dot is the largest weight around, so that thin diagonals are seen; layers run upwards, as in `draw_network`.

    Args:
        heads: recorded with `record(model, attention=...)`; their `token_strings` stand at the axes where they are as
            many as the tokens.
        layer: number of a layer, or the title of a block, e.g. `"decoder layer 0 cross"`; `None` for all.
        head: number of a head; `None` for all of the layer.
        path: as in `draw`.
        example: of maps recorded with `every_example`, which one; `None` for the mean.
        title: a line above; `None` names head and text.
        key_strings: the tokens of the keys where they are others than those of the queries (cross attention).

    Returns:
        The `matplotlib.figure.Figure`.

    Raises:
        ValueError: attention was not recorded, or not of that layer, head or example; strings of another number.

    Example:
        >>> import torch
        >>> import gohgraph as goh
        >>> model = goh.LanguageModel(goh.TransformerConfig(9, d_model=8, num_heads=2, num_layers=2, d_ff=8))
        >>> with goh.record(model, attention=True, token_strings=["a", "b", "c"]) as heads:
        ...     _ = model(torch.tensor([[1, 2, 3]]))
        >>> figure = draw_attention(heads, layer=1, head=0)
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['a', 'b', 'c']
        >>> len(draw_attention(heads).axes[0].get_yticks())
        2
    """
    path = checked_path(path)
    blocks = blocks_of(heads, layer)
    if head is None:
        return _draw_thumbnails(heads, blocks, example, title, path)
    if layer is None or len(blocks) > 1:
        titles = [recording.title for recording in blocks]
        raise ValueError(f"Expected one layer of the head (got {titles}). Do name it, e.g. layer={titles[-1]!r}.")
    pattern = pattern_of(blocks[0], head, example)
    strings = getattr(heads, "token_strings", None)
    queries, keys = _strings(strings, key_strings, *pattern.shape)
    figure = _draw_pattern(pattern, queries, keys)
    if title is None:
        title = f"{blocks[0].title}, head {head}{text_of(strings)}"
    return finish(figure, title, path, fontsize=11)


def blocks_of(heads: Recordings, layer: int | str | None = None) -> list[AttentionRecording]:
    """Returns the recorded blocks of a layer's number or a block's title, in model order; `ValueError` without any."""
    recorded = getattr(heads, "attention", None)
    if not recorded:
        raise ValueError(
            "Expected a recording of attention (got none). Do record with attention=True and run the model."
        )
    return [recorded[name] for name in of_layer({name: one.title for name, one in recorded.items()}, layer)]


def pattern_of(recording: AttentionRecording, head: int, example: int | None = None) -> Tensor:
    """Returns the map `[T, S]` of a head, of one example or the mean over all."""
    if head not in recording.heads:
        raise ValueError(
            f"Expected a head that was recorded, of {recording.heads} of {recording.title} (got {head}). Do choose one."
        )
    return patterns_of(recording, example)[recording.heads.index(head)]


def patterns_of(recording: AttentionRecording, example: int | None = None) -> Tensor:
    """Returns the maps `[h, T, S]` of one example or the mean over all."""
    maps = recording.maps
    if not recording.every_example:
        if example is not None:
            raise ValueError(
                f'Expected maps of every example (got their mean). Do record with attention={{"every_example": True}} '
                f"to draw example {example}."
            )
        return maps
    if example is None:
        return maps.mean(dim=0)
    if not 0 <= example < len(maps):
        raise ValueError(f"Expected an example from 0 to {len(maps) - 1} (got {example}). Do choose one of them.")
    return maps[example]


def _strings(
    strings: Sequence[str] | None, key_strings: Sequence[str] | None, queries: int, keys: int
) -> tuple[list[str] | None, list[str] | None]:
    """What stands at the axes."""
    if key_strings is not None and len(key_strings) != keys:
        raise ValueError(f"Expected a string for each of {keys} keys (got {len(key_strings)}). Do pass as many.")
    own = None if strings is None else [_label(string) for string in strings]
    of_keys = own if key_strings is None else [_label(string) for string in key_strings]
    fits = own is not None and len(own) == queries
    return own if fits else None, of_keys if of_keys is not None and len(of_keys) == keys else None


def _label(string: str) -> str:
    shown = readable(string)
    return shown if len(shown) <= LONGEST_LABEL else shown[: LONGEST_LABEL - 1] + "\u2026"


def _scale() -> tuple[Any, Any]:
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    return LinearSegmentedColormap.from_list("weights", WEIGHTS), PowerNorm(GAMMA, 0.0, 1.0)


def _draw_pattern(pattern: Tensor, queries: list[str] | None, keys: list[str] | None) -> Any:
    tokens = max(pattern.shape)
    side = min(max(2.2, 0.17 * tokens), 6.2)
    height, width = (max(1.6, side * size / tokens) for size in pattern.shape)
    figure = new_figure(width + 2.0, height + 1.7)
    axis = figure.subplots()
    colours, norm = _scale()
    image = axis.imshow(pattern.numpy(), cmap=colours, norm=norm, interpolation="nearest", aspect="auto")
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, tokens) if tokens / step <= MOST_LABELS)
    font = min(8.0, 72 * side * step / tokens * 0.72)
    for (size, strings), ticks, turn in (
        ((pattern.shape[0], queries), axis.set_yticks, 0),
        ((pattern.shape[1], keys), axis.set_xticks, 90),
    ):
        places = np.arange(0, size, step if size > 12 else 1)
        labels = [str(place) if strings is None else strings[place] for place in places]
        ticks(places, labels, rotation=turn if strings else 0, parse_math=False)
    axis.tick_params(labelsize=font, length=0, labelcolor=INK)
    for label in (*axis.get_xticklabels(), *axis.get_yticklabels()):
        label.set_fontfamily("monospace")
    axis.set_ylabel("query: who attends", fontsize=8, color=INK)
    axis.set_xlabel("key: what is attended to", fontsize=8, color=INK)
    axis.spines[:].set(color="#bbbbbb", linewidth=0.6)
    _bar(figure, axis, image)
    return figure


def _draw_thumbnails(
    heads: Recordings, blocks: list[AttentionRecording], example: int | None, title: str | None, path: Any
) -> Any:
    numbers = sorted({head for recording in blocks for head in recording.heads})
    dots = max(8, min(DOTS, *(max(patterns_of(block, example).shape[1:]) for block in blocks)))
    whole = np.full((len(blocks) * (dots + 1) + 1, len(numbers) * (dots + 1) + 1), np.nan)
    for row, recording in enumerate(reversed(blocks)):
        small = F.adaptive_max_pool2d(patterns_of(recording, example), dots)  # [h, dots, dots]
        for pattern, head in zip(small.numpy(), recording.heads, strict=True):
            top, left = (1 + place * (dots + 1) for place in (row, numbers.index(head)))
            whole[top : top + dots, left : left + dots] = pattern
    cell = min(1.3, (WIDTH - 1.3) / len(numbers), 40 / len(blocks))
    figure = new_figure(cell * len(numbers) + 1.6, cell * len(blocks) + 1.25)
    axis = figure.subplots()
    colours, norm = _scale()
    axis.set_facecolor("#d9d9d9")
    axis.imshow(np.ma.masked_invalid(whole), cmap=colours, norm=norm, interpolation="nearest", aspect="equal")
    middle = np.arange(max(len(blocks), len(numbers))) * (dots + 1) + dots / 2 + 0.5
    step = next(step for step in (1, 2, 4, 8, 16) if 72 * cell * step >= 13 or step == 16)
    axis.set_xticks(middle[: len(numbers) : step], [str(number) for number in numbers[::step]])
    tall = next(step for step in (1, 2, 4, 8, 16) if 72 * cell * step >= 9 or step == 16)
    titles = [recording.title for recording in reversed(blocks)]
    axis.set_yticks(middle[: len(blocks) : tall], titles[::tall])
    axis.tick_params(labelsize=8, length=0, labelcolor=INK)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("head", fontsize=8, color=INK)
    _bar(figure, axis, axis.images[0])
    if title is None:
        title = f"attention of {blocks[0].title if len(blocks) == 1 else 'all heads'}"
        title += text_of(getattr(heads, "token_strings", None))
    return finish(figure, title, path, fontsize=11)


def _bar(figure: Any, axis: Any, image: Any) -> None:
    bar = figure.colorbar(image, ax=axis, location="right", fraction=0.035, pad=0.02, aspect=30, ticks=TICKS)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7, length=2, color=INK, labelcolor=INK)
    bar.set_label("attention weight", fontsize=8, color=INK)
