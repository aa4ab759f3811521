"""The signed colours of edge weights, on one scale for all panels of a figure.

Negative weights are blue and positive ones orange: told apart with any colour vision, and equally dark at equal
strength (after ColorBrewer's Blues and Oranges).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from gohgraph.drawing.figures import INK

if TYPE_CHECKING:
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

DIVERGING = ("#084a91", "#2f7ebc", "#94c4df", "#ececec", "#fdae6b", "#e8590c", "#9c3203")
FAINT = "#d4d4d4"
STEPS = (1, 1.2, 1.6, 2, 2.4, 3, 4, 5, 6, 8, 10)


def round_limit(strongest: float) -> float:
    """Returns the end of the scale: the next round number above the strongest weight.

    Example:
        >>> round_limit(0.7), round_limit(0.0)
        (0.8, 1.0)
    """
    # All weights zero, as in a new model: any range will do.
    strongest = strongest or 1.0
    unit = 10.0 ** math.floor(math.log10(strongest))
    return unit * next((step for step in STEPS if step * unit >= strongest * (1 - 1e-6)), 10)


def colour_scale(strongest: float, limit: float | None = None) -> ScalarMappable:
    """Returns the `ScalarMappable` from -limit to limit; `limit` fixes it for several figures."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    if limit is not None and not limit > 0:
        raise ValueError(f"Expected a limit above 0 (got {limit}). Do pass the end of the colour scale, e.g. 1.")
    limit = round_limit(strongest) if limit is None else limit
    return ScalarMappable(Normalize(-limit, limit), LinearSegmentedColormap.from_list("blue-orange", DIVERGING))


def colour_bar(figure: Figure, axes: np.ndarray, colours: ScalarMappable, label: str) -> None:
    """Adds the bar of a scale below the axes `[rows, columns]`."""
    shrink = 0.6 if figure.get_figwidth() > 6 else 0.95
    place: dict[str, Any] = {"ax": axes, "location": "bottom", "fraction": 0.05, "pad": 0.02, "aspect": 45}
    bar = figure.colorbar(colours, shrink=shrink, **place)
    limit = end_of(colours)
    bar.set_ticks(np.linspace(-limit, limit, 5).tolist())
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=2, color=INK, labelcolor=INK)
    bar.set_label(label, fontsize=9, color=INK)


def end_of(colours: ScalarMappable) -> float:
    """Returns the end of a scale of `colour_scale`."""
    return cast(float, colours.norm.vmax)


def is_dark(colour: Sequence[float] | np.ndarray) -> bool:
    """Whether white letters are read better on a colour than dark ones."""
    return float(np.dot(colour[:3], (0.299, 0.587, 0.114))) < 0.5
