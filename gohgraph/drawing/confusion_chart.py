"""Figure of a confusion matrix."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gohgraph.common.files import checked_path
from gohgraph.drawing.figures import INK, finish, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_confusion(
    matrix: Tensor | Sequence[Sequence[int]],
    classes: Sequence[str],
    path: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
) -> Figure:
    """Draw how often each class was taken for each other one: counts, shaded by their share of the row.

    Args:
        matrix: `[C, C]` counts, rows are the true classes.
        classes: the names of the C classes.
        path, title, and what is returned: as in `draw`.

    Raises:
        ValueError: no counts, or another number of classes.

    Example:
        >>> figure = draw_confusion([[5, 1], [0, 4]], ["cat", "dog"])
        >>> figure.axes[0].get_title()
        'accuracy 90.0%'
    """
    counts = torch.as_tensor(matrix).detach().cpu().long()
    if counts.shape != (len(classes), len(classes)) or not len(classes) or counts.min() < 0 or not counts.sum():
        raise ValueError(
            f"Expected counts [{len(classes)}, {len(classes)}] of some examples (got shape {list(counts.shape)}). "
            "Do pass confusion_matrix(targets, predicted, num_classes)."
        )
    path = checked_path(path)
    side = max(3.2, 0.5 * len(classes) + 1.2)
    figure = new_figure(side, side)
    axis = figure.subplots()
    share = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)  # [C, C]
    axis.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    for row in range(len(classes)):
        for column in range(len(classes)):
            if counts[row, column]:
                colour = "white" if share[row, column] > 0.5 else INK
                axis.text(column, row, str(counts[row, column].item()), ha="center", va="center", color=colour,
                          fontsize=7)  # fmt: skip
    names = [str(name) for name in classes]
    turned = 45 if max(map(len, names)) > 3 else 0
    axis.set_xticks(range(len(names)), names, rotation=turned, ha="right" if turned else "center")
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel("predicted", color=INK)
    axis.set_ylabel("true", color=INK)
    axis.set_title(f"accuracy {counts.diagonal().sum().item() / counts.sum().item():.1%}", fontsize=10, color=INK)
    axis.tick_params(labelsize=8, color="#999999", labelcolor=INK)
    axis.spines[:].set_visible(False)
    return finish(figure, title, path, fontsize=11)
