"""Figure of the load of attention heads under Mixture-of-Head routing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gohgraph.attention.head_load import load_cv
from gohgraph.common.checks import check_int
from gohgraph.common.files import checked_path
from gohgraph.drawing.figures import INK, WIDTH, finish, frame_axis, new_figure

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of Okabe and Ito's palette: told apart with any colour vision, and in grey.
ROUTED, SHARED, BALANCED = "#0072B2", "#E69F00", "#000000"


def draw_load(
    loads: Tensor | Sequence[Sequence[float]],
    path: str | os.PathLike[str] | None = None,
    *,
    num_shared: int,
    title: str | None = None,
) -> Figure:
    """Draw which heads the tokens use: one small bar chart for each layer, one bar for each head.

    A bar is the share of tokens the head is active for. The dashed line is the load all routed heads would have in
    perfect balance, k / h_r; the title tells how far they are from it (`gohgraph.attention.head_load.load_cv`).

    Args:
        loads: `[L, H]` in [0, 1], such as the `load` of every `Routing` of a model's output, or `head_loads`.
        num_shared: h_s, the first heads, which are always active.
        path, title, and what is returned: as in `draw`.

    Example:
        >>> figure = draw_load([[1.0, 0.75, 0.25], [1.0, 0.5, 0.5]], num_shared=1)
        >>> [axis.get_title() for axis in figure.axes]
        ['layer 0: CV 0.50', 'layer 1: CV 0.00']
    """
    loads = _checked(loads, num_shared)
    path = checked_path(path)
    rows, columns, width, height = _grid(*loads.shape)
    figure = new_figure(max(width * columns, 5.0), height * rows + 0.75)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for number, (load, axis) in enumerate(zip(loads, axes.flat, strict=False)):
        _draw_layer(axis, load, num_shared)
        if number + columns >= len(loads):
            axis.set_xlabel("head", fontsize=9, color=INK)
        cv = load_cv(load, num_shared).item()
        axis.set_title(f"layer {number}" + (f": CV {cv:.2f}" if num_shared < len(load) else ""), fontsize=9, color=INK)
    for axis in axes.flat[len(loads) :]:
        figure.delaxes(axis)
    figure.supylabel("share of tokens", fontsize=10, color=INK)
    _legend(figure, num_shared, loads.shape[1])
    return finish(figure, title, path)


def _checked(loads: Tensor | Sequence[Sequence[float]], num_shared: int) -> Tensor:
    loads = torch.as_tensor(loads).detach().cpu().double()
    if loads.dim() != 2 or loads.numel() == 0 or not ((loads >= 0) & (loads <= 1 + 1e-6)).all():
        raise ValueError(
            f"Expected loads [L, H] in [0, 1] (got shape {list(loads.shape)}, values {loads.flatten()[:5].tolist()}). "
            "Do stack the load of every Routing."
        )
    check_int("num_shared", num_shared, low=0, high=loads.shape[1])
    return loads


def _grid(layers: int, heads: int) -> tuple[int, int, float, float]:
    """Rows, charts in a row, and the width and height of a chart in inches."""
    widest = min(layers, 4 if heads <= 16 or layers > 8 else 2)
    # The fewest free places, then the widest rows.
    columns = min(range((widest + 2) // 2, widest + 1), key=lambda count: (-layers % count, -count))
    return -(-layers // columns), columns, min(WIDTH / columns, 1 + 0.3 * heads), 1.5 if layers > 4 else 2.2


def _draw_layer(axis: Axes, load: Tensor, num_shared: int) -> None:
    heads = len(load)
    colours = [SHARED] * num_shared + [ROUTED] * (heads - num_shared)
    axis.bar(range(heads), load.tolist(), width=0.8, color=colours)
    if num_shared < heads:
        balanced = load[num_shared:].mean().item()
        axis.plot([num_shared - 0.5, heads - 0.5], [balanced] * 2, "--", color=BALANCED, linewidth=1)
    # A few heads are not drawn as wide as walls.
    room = max(0.1, (4 - heads) / 2)
    axis.set(xlim=(-0.5 - room, heads - 0.5 + room), ylim=(0, 1.04), yticks=[0, 0.5, 1])
    step = next(step for step in (1, 2, 4, 8, 16, heads) if heads / step <= 8 or step == heads)
    axis.set_xticks(range(0, heads, step))
    frame_axis(axis)


def _legend(figure: Figure, num_shared: int, heads: int) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    shown: list[Artist] = [Patch(color=SHARED, label="shared head")] if num_shared else []
    if num_shared < heads:
        shown += [Patch(color=ROUTED, label="routed head")]
        shown += [Line2D([], [], linestyle="--", color=BALANCED, linewidth=1, label="balanced")]
    figure.legend(
        handles=shown, loc="outside lower center", ncols=len(shown), frameon=False, fontsize=9, labelcolor=INK
    )
