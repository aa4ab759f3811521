"""Figures of the learned head graphs of a model.

Negative weights are blue and positive ones orange: told apart with any colour vision, and equally dark at
equal strength (after ColorBrewer's Blues and Oranges).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gohgraph.curves import draw_curves
from gohgraph.figures import INK, WIDTH, checked_path, new_figure, save_figure
from gohgraph.places import SITES, graph_titles, site_of

__all__ = ["draw", "draw_curves", "graph_titles"]

DIVERGING = ("#084a91", "#2f7ebc", "#94c4df", "#ececec", "#fdae6b", "#e8590c", "#9c3203")
FAINT = "#d4d4d4"
RING_GAP = 0.46

@dataclass(frozen=True)
class _Panel:
    """One head graph and round: what one circle shows."""

    title: str
    site: str
    num_heads: int
    senders: np.ndarray
    receivers: np.ndarray
    weights: np.ndarray

    @property
    def rings(self) -> int:
        """How many layers before this one send to it."""
        return int(self.senders.max(initial=0)) // self.num_heads


def draw(
    heads: Mapping[str, Any],
    path: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
    threshold: float = 0.05,
):
    """Draw every head graph of a recording, one circle of heads for each layer, site and round.

    An arrow leads from the sender j to the receiver i. Its colour is the mean of alpha_ji over the recorded
    tokens, on a symmetric range shared by all circles; its width is the magnitude. The fill of a head is its
    self-loop alpha_ii, white where it has none. Senders of earlier layers (`cross_layer`) stand on outer
    rings.

    Args:
        heads: the result of `record`: {module name: Recording}, each with
            `edge_index [2, E]`, `num_heads` and `mean [R, E]`.
        path: where to save; a name that ends in .png, .svg or .pdf. `None` saves nothing.
        title: a line above the circles.
        threshold: edges weaker than this share (0 to 1) of the strongest one are faint grey hairlines.

    Returns:
        The `matplotlib.figure.Figure`.

    Raises:
        ValueError: nothing was recorded, a weight is not finite, `threshold` is out of range, or the suffix
            is unknown.
        OSError: the folder of `path` is missing or cannot be written. An older file at `path` is kept then.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> ring = torch.tensor([[0, 1, 2], [1, 2, 0]])
        >>> recording = SimpleNamespace(edge_index=ring, num_heads=3, mean=torch.tensor([[0.5, -0.5, 0.1]]))
        >>> figure = draw({"decoder.layers.0.attention.output_graph": recording})
        >>> figure.axes[0].get_title()
        'layer 0 outputs'
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"Expected a threshold from 0 to 1 (got {threshold}). Do pass a share of the strongest edge.")
    path = checked_path(path)
    panels = _panels(heads)
    strongest = max(float(np.abs(panel.weights).max(initial=0.0)) for panel in panels)
    rows, columns, size = _grid(panels)
    figure = new_figure(size * columns, (size + 0.22) * len(rows) + 0.8)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    colours = _colours(strongest)
    for row, row_axes in zip(rows, axes, strict=True):
        for axis in row_axes[len(row) :]:
            axis.set_axis_off()
        for panel, axis in zip(row, row_axes, strict=False):
            _draw_panel(axis, panel, colours, threshold * strongest, size)
    _colour_bar(figure, axes, colours, any(panel.rings for panel in panels))
    if title:
        figure.suptitle(title, fontsize=12, color=INK)
    save_figure(figure, path)
    return figure


def _panels(heads: Mapping[str, Any]) -> list[_Panel]:
    if not len(heads):
        raise ValueError(
            "Expected a recording with at least one head graph (got none). "
            "Do record a forward pass of a model that has head_graph set."
        )
    panels = []
    for title, (name, recording) in zip(graph_titles(list(heads)), heads.items(), strict=True):
        senders, receivers = recording.edge_index.cpu().numpy()
        means = recording.mean.detach().float().cpu().numpy()
        if not np.isfinite(means).all():
            raise ValueError(
                f"Expected finite edge weights (got NaN or infinity in {name}). Do check the training run."
            )
        for number, weights in enumerate(means):
            label = title if len(means) == 1 else f"{title}, round {number + 1}"
            panels.append(_Panel(label, site_of(name), recording.num_heads, senders, receivers, weights))
    return panels


def _grid(panels: list[_Panel]) -> tuple[list[list[_Panel]], int, float]:
    """Rows of panels, each site on rows of its own, how many are in a row, and their size in inches."""
    groups = [[panel for panel in panels if panel.site == site] for site in SITES.values()]
    groups = [group for group in groups if group]
    most = max(map(len, groups))
    heads = max(panel.num_heads * (1 + 0.4 * panel.rings) for panel in panels)
    widest = min(most, 4 if heads <= 16 else 3 if heads <= 32 else 2)
    columns = min(range((widest + 2) // 2, widest + 1), key=lambda count: (-most % count, -count))
    rows = [group[at : at + columns] for group in groups for at in range(0, len(group), columns)]
    return rows, columns, min(WIDTH / columns, 3.4 if heads <= 16 else 4.5)


def _colours(strongest: float):
    """The colour scale from -limit to limit, the next round number above the strongest weight."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    # All weights zero, as in a new model: any range will do.
    strongest = strongest or 1.0
    unit = 10.0 ** math.floor(math.log10(strongest))
    steps = (1, 1.2, 1.6, 2, 2.4, 3, 4, 5, 6, 8, 10)
    limit = unit * next((step for step in steps if step * unit >= strongest * (1 - 1e-6)), 10)
    return ScalarMappable(Normalize(-limit, limit), LinearSegmentedColormap.from_list("blue-orange", DIVERGING))


def _on_ring(panel: _Panel, ring: int, heads: np.ndarray) -> np.ndarray:
    """Where heads stand: a layer's own on the unit circle from the top clockwise, earlier layers outside.

    Outer rings are turned a little, so that no head hides another, and have one free place for their label.
    """
    places = panel.num_heads + (ring > 0)
    angle = np.pi / 2 - 2 * np.pi * (heads + ring / (panel.rings + 1)) / places
    # A single head stands in the middle of its circle.
    radius = (1.0 if panel.num_heads > 1 else 0.0) + RING_GAP * ring
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)  # [H, 2]


def _draw_panel(axis, panel: _Panel, colours, faint_below: float, size: float) -> None:
    heads = np.arange(panel.num_heads)
    places = np.concatenate([_on_ring(panel, ring, heads) for ring in range(panel.rings + 1)])  # [S, 2]
    radius = min(0.16, 0.58 * math.sin(math.pi / max(panel.num_heads, 2)))
    outer = (1.0 if panel.num_heads > 1 else 0.3) + RING_GAP * panel.rings + radius
    # The radius of a head in points of the printed page: below 4.4, its number does not fit in.
    points = radius * 72 * size / (2 * outer)
    outside = points < 4.4
    reach = outer + (0.16 if outside else 0.06)
    axis.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    axis.set_axis_off()
    axis.set_title(panel.title, fontsize=10, color=INK, pad=3)
    _draw_edges(axis, panel, places, radius, colours, faint_below)
    font = 6.5 if outside else min(9.0, 1.3 * points)
    _draw_heads(axis, panel, places, radius, colours, font, outside)
    for ring in range(1, panel.rings + 1):
        axis.add_patch(_ring_line(1.0 + RING_GAP * ring))
        axis.text(
            *_on_ring(panel, ring, np.array(panel.num_heads)),
            f"\u2212{ring}",
            fontsize=8,
            color="#777777",
            ha="center",
            va="center_baseline",
            zorder=4,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )


def _draw_edges(axis, panel: _Panel, places: np.ndarray, radius: float, colours, faint_below: float) -> None:
    from matplotlib.collections import LineCollection, PolyCollection

    # Strong edges last, on top; a self-loop is the fill of its head.
    order = [e for e in np.argsort(np.abs(panel.weights)) if panel.senders[e] != panel.receivers[e]]
    weights = panel.weights[order]
    share = np.abs(weights) / colours.norm.vmax
    faint = np.abs(weights) <= faint_below
    scale = min(1.0, (80 / max(len(order), 1)) ** 0.3)
    colour = np.where(faint[:, None], _rgba(FAINT), colours.to_rgba(weights))
    heads = radius * (0.28 + 0.42 * np.sqrt(share))
    paths, tips = _curves(places[panel.senders[order]], places[panel.receivers[order]], radius, heads)
    widths = np.where(faint, 0.4, 0.5 + 2.9 * share) * scale
    axis.add_collection(LineCollection(paths, colors=colour, linewidths=widths, capstyle="butt"))
    axis.add_collection(PolyCollection(tips, facecolors=colour, edgecolors="none", zorder=2.1))


def _curves(start: np.ndarray, end: np.ndarray, radius: float, heads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quadratic Bezier curves between heads and their arrow tips.

    They bow to the left of their direction, so that both directions are seen; all but those between
    neighbours are drawn towards the centre, so that they pass inside the heads between.
    """
    along = end - start  # [E, 2]
    left = np.stack([-along[:, 1], along[:, 0]], axis=1)  # [E, 2]
    nearest = np.linalg.norm(along, axis=1).min(initial=np.inf)
    inward = np.where(np.linalg.norm(along, axis=1) > 1.3 * nearest, 0.7, 1.0)[:, None]
    control = inward * (start + end) / 2 + 0.14 * left  # [E, 2]
    away = _unit(control - start)
    into = _unit(end - control)
    start, tip = start + radius * away, end - 1.06 * radius * into
    base = tip - heads[:, None] * into
    t = np.linspace(0, 1, 25)[None, :, None]
    paths = (1 - t) ** 2 * start[:, None] + 2 * t * (1 - t) * control[:, None] + t**2 * base[:, None]  # [E, 25, 2]
    side = 0.45 * heads[:, None] * np.stack([-into[:, 1], into[:, 0]], axis=1)  # [E, 2]
    return paths, np.stack([tip, base + side, base - side], axis=1)  # [E, 3, 2]


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _rgba(colour: str) -> np.ndarray:
    from matplotlib.colors import to_rgba

    return np.array(to_rgba(colour))


def _draw_heads(axis, panel: _Panel, places: np.ndarray, radius: float, colours, font: float, outside: bool) -> None:
    from matplotlib.patches import Circle

    gates = {int(j): w for j, i, w in zip(panel.senders, panel.receivers, panel.weights, strict=True) if j == i}
    for index, place in enumerate(places):
        ring, head = divmod(index, panel.num_heads)
        fill = colours.to_rgba(gates[index]) if index in gates else (1.0, 1.0, 1.0, 1.0)
        style = {"edgecolor": INK, "linewidth": 0.8} if ring == 0 else {"edgecolor": "#999999", "linewidth": 0.7}
        axis.add_patch(Circle(place, radius if ring == 0 else 0.8 * radius, facecolor=fill, zorder=3, **style))
        dark = not outside and np.dot(fill[:3], (0.299, 0.587, 0.114)) < 0.5
        spot = place + (radius + 0.08) * _unit(place) if outside else place
        axis.text(
            *spot,
            str(head),
            fontsize=font if ring == 0 else 0.85 * font,
            ha="center",
            va="center_baseline",
            zorder=4,
            color="white" if dark else INK if ring == 0 else "#777777",
        )


def _ring_line(radius: float):
    from matplotlib.patches import Circle

    return Circle((0, 0), radius, facecolor="none", edgecolor="#dddddd", linewidth=0.6, linestyle=":", zorder=0.5)


def _colour_bar(figure, axes, colours, rings: bool) -> None:
    bar = figure.colorbar(
        colours,
        ax=axes,
        location="bottom",
        fraction=0.05,
        pad=0.02,
        aspect=45,
        shrink=0.6 if axes.shape[1] > 1 else 0.95,
    )
    bar.set_ticks(np.linspace(-colours.norm.vmax, colours.norm.vmax, 5))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=2, color=INK, labelcolor=INK)
    text = "mean edge weight   (arrow: from sender to receiver,  fill: a head's self-loop)"
    more = "\nouter rings: heads of the layers before" if rings else ""
    bar.set_label(text + more, fontsize=9, color=INK)
