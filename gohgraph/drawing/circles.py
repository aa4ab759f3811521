"""Figure of head graphs as circles: one for each layer, site and round."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from gohgraph.common.files import checked_path
from gohgraph.drawing.colours import FAINT, colour_bar, colour_scale, end_of, is_dark
from gohgraph.drawing.figures import INK, finish, new_figure
from gohgraph.drawing.given import recordings_of
from gohgraph.drawing.panels import Panel, draw_panels, grid_of, panels_of, strongest_weight

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

RING_GAP = 0.46
# More edges than this in a circle of so many inches are a blot: the strongest are drawn.
MOST_EDGES = {3.0: 400, 0.0: 150}
# From so many heads on strengths are shown by rank, and of fewer edges: all widths would be hairlines.
DENSE, MOST_OF_DENSE = 32, {3.0: 160, 0.0: 60}
LABEL = "mean edge weight   (arrow: from sender to receiver,  fill: a head's self-loop)"
# What tells the sign without colours.
SIGN = "hollow tip, dashed rim: negative"
DASHED = (0, (2.5, 1.5))


def draw(
    heads: Mapping[str, Any] | nn.Module,
    path: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
    threshold: float = 0.05,
    limit: float | None = None,
    most_edges: int | None = None,
    label: str = LABEL,
) -> Figure:
    """Draw every head graph of a recording, one circle of heads for each layer, site and round.

    An arrow leads from the sender j to the receiver i. Its colour is the mean of alpha_ji over the recorded
    tokens, on a symmetric range shared by all circles; its width is the magnitude. The fill of a head is its
    self-loop alpha_ii, white where it has none; its size is its load. Under a router, heads that are always active
    are squares. Senders of earlier layers (`cross_layer`) stand on outer rings.

    Args:
        heads: the result of `record`: {module name: Recording}, each with
            `edge_index [2, E]`, `num_heads` and `mean [R, E]`, and where known `load` and `num_shared`; or a model,
            for the weights its edges have at a context of zero.
        path: where to save; a name that ends in .png, .svg or .pdf. `None` saves nothing.
        title: a line above the circles.
        threshold: edges weaker than this share (0 to 1) of the strongest one are faint grey hairlines.
        limit: end of the colour range, the same for several figures; `None` for the next round number above the
            strongest edge.
        most_edges: so many of a circle's edges are drawn, the strongest; `None` for as many as can be told apart.
        label: of the colour bar.

    Returns:
        The `matplotlib.figure.Figure`.

    Raises:
        ValueError: nothing was recorded, a weight is not finite, `threshold` or `limit` is out of range, or the suffix
            is unknown.
        OSError: the folder of `path` is missing or cannot be written; an older file is kept.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> ring = torch.tensor([[0, 1, 2], [1, 2, 0]])
        >>> recording = SimpleNamespace(edge_index=ring, num_heads=3, mean=torch.tensor([[0.5, -0.5, 0.1]]))
        >>> figure = draw({"decoder.layers.0.attention.output_graph": recording})
        >>> figure.axes[0].get_title()
        'layer 0 outputs'
    """
    path = checked_path(path)
    check_threshold(threshold)
    panels = panels_of(recordings_of(heads))
    rows, columns, size = grid_of(panels)
    table = MOST_OF_DENSE if any(is_dense(panel) for panel in panels) else MOST_EDGES
    most_edges = next(most for least, most in table.items() if size >= least) if most_edges is None else most_edges
    label = circle_label(label, panels, most_edges)
    figure = new_figure(size * columns, (size + 0.22) * len(rows) + 0.8 + 0.17 * label.count("\n"))
    axes = figure.subplots(len(rows), columns, squeeze=False)
    strongest = strongest_weight(panels)
    colours = colour_scale(strongest, limit)
    faint_below = threshold * strongest
    draw_panels(axes, rows, lambda axis, panel: draw_circle(axis, panel, colours, faint_below, size, most_edges))
    colour_bar(figure, axes, colours, label)
    return finish(figure, title, path)


def is_dense(panel: Panel) -> bool:
    """Whether a circle has so many heads that its edges are drawn by rank."""
    return panel.num_heads >= DENSE


def check_threshold(threshold: float) -> None:
    """Raises `ValueError` for a threshold out of [0, 1]."""
    if not 0 <= threshold <= 1:
        raise ValueError(f"Expected a threshold from 0 to 1 (got {threshold}). Do pass a share of the strongest edge.")


def circle_label(label: str, panels: list[Panel], most_edges: int) -> str:
    """Returns the text below circles: a label, and what else these circles need explained."""
    notes = []
    if any(panel.num_shared is not None for panel in panels):
        notes.append("square: shared head, always active;  circle: routed head;  size: share of tokens that use it")
    if any(panel.rings for panel in panels):
        notes.append("outer rings: heads of the layers before")
    if any((panel.senders != panel.receivers).sum() > most_edges for panel in panels):
        notes.append(f"the {most_edges} strongest edges of each graph")
    if any(is_dense(panel) for panel in panels):
        notes[-1:] = [";  ".join([*notes[-1:], "width and opacity: rank among them"])]
    if any((panel.weights < 0).any() for panel in panels):
        notes.append(SIGN)
    return "\n".join([label, *notes])


def draw_circle(
    axis: Axes, panel: Panel, colours: ScalarMappable, faint_below: float, size: float, most_edges: int
) -> None:
    """Draws one head graph on an axis of so many inches; edges up to `faint_below` are hairlines."""
    from matplotlib.patches import Circle

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
    radii = radius * np.concatenate([0.6 + 0.4 * panel.loads, *[np.full(panel.num_heads, 0.8)] * panel.rings])  # [S]
    _draw_edges(axis, panel, places, radii, colours, faint_below, most_edges, size)
    font = 6.5 if outside else min(9.0, 1.3 * points)
    # Outside, numbers must not run into each other: every second or fourth where the circle is small.
    between = 2 * math.pi * outer / max(panel.num_heads, 1) * 72 * size / (2 * reach)
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64) if step * between >= 10 or step == 64) if outside else 1
    _draw_heads(axis, panel, places, radii, colours, font, outside, step)
    for ring in range(1, panel.rings + 1):
        line = {"facecolor": "none", "edgecolor": "#dddddd", "linewidth": 0.6, "linestyle": ":", "zorder": 0.5}
        axis.add_patch(Circle((0, 0), 1.0 + RING_GAP * ring, **line))
        style = {"fontsize": 8, "color": "#777777", "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1}}
        _write(axis, _on_ring(panel, ring, np.array(panel.num_heads)), panel.ring_name(ring), **style)


def _on_ring(panel: Panel, ring: int, heads: np.ndarray) -> np.ndarray:
    """Where heads stand: a layer's own on the unit circle from the top clockwise, earlier layers outside.

    Outer rings are turned a little, so that no head hides another, and have one free place for their label.
    """
    places = panel.num_heads + (ring > 0)
    angle = np.pi / 2 - 2 * np.pi * (heads + ring / (panel.rings + 1)) / places
    # A single head stands in the middle of its circle.
    radius = (1.0 if panel.num_heads > 1 else 0.0) + RING_GAP * ring
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)  # [H, 2]


def _draw_edges(
    axis: Axes,
    panel: Panel,
    places: np.ndarray,
    radii: np.ndarray,
    colours: ScalarMappable,
    faint_below: float,
    most_edges: int,
    size: float,
) -> None:
    from matplotlib.collections import LineCollection, PolyCollection
    from matplotlib.colors import to_rgba

    # Strong edges last, on top; a self-loop is the fill of its head.
    order = [e for e in np.argsort(np.abs(panel.weights)) if panel.senders[e] != panel.receivers[e]][-most_edges:]
    weights = panel.weights[order]
    share = np.minimum(np.abs(weights) / end_of(colours), 1.0)
    faint = np.abs(weights) <= faint_below
    scale = min(1.0, (80 / max(len(order), 1)) ** 0.3)
    colour = np.where(faint[:, None], np.array(to_rgba(FAINT)), colours.to_rgba(weights))
    heads = radii.max() * (0.28 + 0.42 * np.sqrt(share))
    senders, receivers = panel.senders[order], panel.receivers[order]
    widths = np.where(faint, 0.4, 0.5 + 2.9 * share) * scale
    if is_dense(panel):
        rank = np.linspace(0, 1, len(order))
        widths = np.where(faint, 0.3, 0.35 + 1.5 * rank**2)
        colour[:, 3] = np.where(faint, 0.6, 0.25 + 0.75 * rank)
        # A tip is as large as is seen, whatever room its head has: so many inches.
        heads = (0.035 + 0.05 * rank) * min(1.0, 2.4 / size)
    paths, tips = curves(places[senders], places[receivers], radii[senders], radii[receivers], heads)
    axis.add_collection(LineCollection(list(paths), colors=colour, linewidths=widths, capstyle="butt"))
    axis.add_collection(PolyCollection(list(tips), **tip_style(colour, weights), zorder=2.1))


def tip_style(colour: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """The style of arrow tips, hollow where a weight is negative, so that its sign is seen without colours."""
    fills = np.where((weights < 0)[:, None], 1.0, colour)  # [E, 4]
    return {"facecolors": fills, "edgecolors": colour, "linewidths": np.where(weights < 0, 0.7, 0.0)}


def curves(
    start: np.ndarray, end: np.ndarray, from_radius: np.ndarray, to_radius: np.ndarray, heads: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Quadratic Bezier curves between heads, `[E, 25, 2]`, and their arrow tips, `[E, 3, 2]`.

    They bow to the left of their direction, so that both directions are seen; all but those between
    neighbours are drawn towards the centre, so that they pass inside the heads between.
    """
    along = end - start  # [E, 2]
    left = np.stack([-along[:, 1], along[:, 0]], axis=1)  # [E, 2]
    nearest = np.linalg.norm(along, axis=1).min(initial=np.inf)
    inward = np.where(np.linalg.norm(along, axis=1) > 1.3 * nearest, 0.7, 1.0)[:, None]
    control = inward * (start + end) / 2 + 0.14 * left  # [E, 2]
    return arrows(start, control, end, from_radius, 1.06 * to_radius, heads)


def arrows(
    start: np.ndarray, control: np.ndarray, end: np.ndarray, gap: np.ndarray, tip_gap: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Quadratic Bezier curves `[E, 25, 2]` and tips `[E, 3, 2]` of so many lengths, with gaps at both ends `[E]`."""
    away, into = _unit(control - start), _unit(end - control)
    start, tip = start + gap[:, None] * away, end - tip_gap[:, None] * into
    base = tip - lengths[:, None] * into
    t = np.linspace(0, 1, 25)[None, :, None]
    paths = (1 - t) ** 2 * start[:, None] + 2 * t * (1 - t) * control[:, None] + t**2 * base[:, None]  # [E, 25, 2]
    side = 0.45 * lengths[:, None] * np.stack([-into[:, 1], into[:, 0]], axis=1)  # [E, 2]
    return paths, np.stack([tip, base + side, base - side], axis=1)  # [E, 3, 2]


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _draw_heads(
    axis: Axes,
    panel: Panel,
    places: np.ndarray,
    radii: np.ndarray,
    colours: ScalarMappable,
    font: float,
    outside: bool,
    step: int,
) -> None:
    from matplotlib.patches import Circle, Rectangle

    gates = {int(j): w for j, i, w in zip(panel.senders, panel.receivers, panel.weights, strict=True) if j == i}
    for index, (place, radius) in enumerate(zip(places, radii, strict=True)):
        ring, head = divmod(index, panel.num_heads)
        fill = colours.to_rgba(gates[index]) if index in gates else (1.0, 1.0, 1.0, 1.0)
        style: dict[str, Any] = {"edgecolor": INK, "linewidth": 0.8}
        if ring:
            style = {"edgecolor": "#999999", "linewidth": 0.7}
        if gates.get(index, 0.0) < 0:
            style["linestyle"] = DASHED
        if panel.is_shared(head):
            side = 1.77 * radius
            axis.add_patch(Rectangle(place - side / 2, side, side, facecolor=fill, zorder=3, **style))
        else:
            axis.add_patch(Circle(place, radius, facecolor=fill, zorder=3, **style))
        if head % step:
            continue
        spot = place + (radii.max() + 0.08) * _unit(place) if outside else place
        ink = "white" if not outside and is_dark(fill) else INK if ring == 0 else "#777777"
        _write(axis, spot, str(head), fontsize=font if ring == 0 else 0.85 * font, color=ink)

def _write(axis: Axes, place: np.ndarray, text: str, **style: Any) -> None:
    axis.text(float(place[0]), float(place[1]), text, ha="center", va="center_baseline", zorder=4, **style)
