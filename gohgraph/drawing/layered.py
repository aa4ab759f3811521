"""Figure of a whole model's head network: a row of heads for each layer."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gohgraph.common.files import checked_path
from gohgraph.drawing.circles import arrows, check_threshold
from gohgraph.drawing.colours import colour_bar, colour_scale, is_dark
from gohgraph.drawing.figures import INK, WIDTH, finish, new_figure
from gohgraph.drawing.given import network_given

if TYPE_CHECKING:
    from gohgraph.analysis.network import HeadNetwork

MOST_EDGES = 300
# Inches between rows, by the number of rows that has so much room.
GAPS = ((6, 1.15), (12, 0.85), (24, 0.65), (1 << 30, 0.5))
LEFT = 0.9
STYLES = {
    "outputs": "solid", "scores": (0, (4, 1.5)), "weights": (0, (1, 1)), "queries": (0, (6, 1, 1, 1)),
    "keys": (0, (9, 1)), "values": (0, (1, 3)), "mlp": (0, (3, 3)), "logits": "solid",
}  # fmt: skip
STYLE_NAMES = {
    "outputs": "solid", "scores": "dashed", "weights": "dotted", "queries": "dash-dotted", "keys": "long dashes",
    "values": "wide dots", "mlp": "short dashes", "logits": "solid",
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """Where heads stand, in inches.

    Args:
        places: `[N, 2]`.
        rows: row of every head, `[N]`, from 0 at the bottom.
        radius: of a head of full load or importance.
        gap: between rows.
        width, height: of the whole.
    """

    places: np.ndarray
    rows: np.ndarray
    radius: float
    gap: float
    width: float
    height: float


def draw_network(
    network: HeadNetwork,
    path: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
    threshold: float = 0.0,
    limit: float | None = None,
    most_edges: int = MOST_EDGES,
):
    """Draw the head graphs of a whole model in one picture, a row of heads for each attention block, the first below.

    Edges within a layer are arcs: above the row to the right, below it to the left. Edges of earlier layers come from
    their own row. Colour is the mean weight, width its magnitude, on one scale for all; the fill of a head is its
    self-loop. Its size is its importance where the network has that, else its load. Shared heads of a router are
    squares.

    Args:
        network: as `head_graph_of` makes it; or a recording or a model, of which it is made.
        threshold: edges weaker than this share (0 to 1) of the strongest are left out.
        most_edges: so many edges are drawn, the strongest of all layers.
        path, title, limit, and what is returned and raised: as in `draw`.
    """
    path = checked_path(path)
    check_threshold(threshold)
    network = network_given(network)
    weights = network.mean.numpy()
    if not np.isfinite(weights).all():
        raise ValueError("Expected finite edge weights (got NaN or infinity). Do check the training run.")
    layout = layout_of(network)
    strongest = float(np.abs(weights).max(initial=0.0))
    colours = colour_scale(strongest, limit)
    figure = new_figure(layout.width, layout.height + 1.0)
    axes = figure.subplots(1, 1, squeeze=False)
    axis = axes[0, 0]
    axis.set(xlim=(0, layout.width), ylim=(-0.5 * layout.gap - 0.15, layout.height - 0.5 * layout.gap), aspect="equal")
    axis.set_axis_off()
    senders, receivers = network.edge_index.numpy()
    between = senders != receivers
    shown = np.flatnonzero(between & (np.abs(weights) >= threshold * strongest) & (weights != 0))
    shown = shown[np.argsort(np.abs(weights[shown]), kind="stable")][-most_edges:]
    _draw_rows(axis, network, layout)
    _draw_edges(axis, network, layout, shown, colours)
    _draw_heads(axis, network, layout, colours)
    colour_bar(figure, axes, colours, _label(network, len(shown), int(between.sum())))
    return finish(figure, title, path)


def layout_of(network: HeadNetwork) -> Layout:
    """Returns the places of a network's heads: by block from below, by number from the left, key/value heads last."""
    blocks = {block: row for row, block in enumerate(network.blocks)}
    rows = np.array([blocks[block] for block in network.block])
    heads = network.head.numpy().astype(float)
    is_key = np.array([kind == "key/value" for kind in network.kind])
    heads[is_key] += heads[~is_key].max(initial=0) + 2
    across = heads.max(initial=0) + 1
    gap = next(gap for most, gap in GAPS if len(blocks) <= most)
    step = min((WIDTH - LEFT - 0.2) / across, 1.2)
    radius = min(0.15, 0.40 * step, 0.26 * gap)
    places = np.stack([LEFT + (heads + 0.5) * step, rows * gap], axis=1)  # [N, 2]
    return Layout(places, rows, radius, gap, LEFT + across * step + 0.2, len(blocks) * gap + 0.2)


def head_names(network: HeadNetwork) -> list[str]:
    """Returns what stands in every node: a head's number, the first letter of what is no head."""
    is_head = (kind in ("head", "key/value", "shared", "routed") for kind in network.kind)
    numbers = network.head.tolist()
    return [str(n) if own else kind[0] for n, own, kind in zip(numbers, is_head, network.kind, strict=True)]


def head_sizes(network: HeadNetwork) -> np.ndarray:
    """Returns the size of every head in [0.5, 1], `[N]`: by importance where that is known, else by load."""
    if "importance" in network and network.importance.nan_to_num().max() > 0:
        share = (network.importance.nan_to_num() / network.importance.nan_to_num().max()).numpy()
    else:
        share = network.load.numpy()
    return 0.5 + 0.5 * np.sqrt(np.clip(share, 0, 1))


def arcs(network: HeadNetwork, layout: Layout, edges: np.ndarray, radii: np.ndarray, tips: np.ndarray):
    """Returns the curves `[E, 25, 2]` of edges and their tips `[E, 3, 2]`."""
    senders, receivers = network.edge_index.numpy()[:, edges]
    start, end = layout.places[senders], layout.places[receivers]
    within = layout.rows[senders] == layout.rows[receivers]
    along = end[:, 0] - start[:, 0]
    # Longer arcs are higher, and none reaches the next row.
    rise = 0.86 * layout.gap * np.sqrt(np.abs(along) / max(np.ptp(layout.places[:, 0]), 1e-9)) + 0.15 * layout.gap
    control = (start + end) / 2
    control[:, 1] += np.where(within, np.sign(along) * np.minimum(rise, 0.88 * layout.gap), 0.0)
    # What passes by a row leaves its heads to the left.
    passed = np.abs(layout.rows[senders] - layout.rows[receivers]) - 1
    control[:, 0] += np.where(passed > 0, layout.radius * np.minimum(1.8 + 1.2 * passed, 6.0), 0.0)
    paths, points = arrows(start, control, end, radii[senders], 1.05 * radii[receivers], tips)
    return paths, points

def _draw_rows(axis, network: HeadNetwork, layout: Layout) -> None:
    for row, block in enumerate(network.blocks):
        height = row * layout.gap
        axis.plot([LEFT, layout.width - 0.2], [height, height], color="#e6e6e6", linewidth=0.8, zorder=0)
        axis.text(LEFT - 0.12, height, block, fontsize=8, ha="right", va="center", color=INK)
    if 72 * layout.radius < 4.4:
        heads = np.unique(network.head.numpy())
        step = next(step for step in (1, 2, 4, 8, 16, 32, 64) if len(heads) / step <= 20)
        for head in heads[::step]:
            place = layout.places[int(np.flatnonzero(network.head.numpy() == head)[0]), 0]
            axis.text(place, -0.5 * layout.gap, str(head), fontsize=7, ha="center", va="top", color=INK)


def _draw_edges(axis, network: HeadNetwork, layout: Layout, edges: np.ndarray, colours) -> None:
    from matplotlib.collections import LineCollection, PolyCollection

    weights = network.mean.numpy()[edges]
    share = np.minimum(np.abs(weights) / colours.norm.vmax, 1.0)
    tips = layout.radius * (0.45 + 0.55 * np.sqrt(share))
    paths, points = arcs(network, layout, edges, layout.radius * head_sizes(network), tips)
    colour = colours.to_rgba(weights)
    widths = (0.4 + 2.6 * share) * min(1.0, layout.radius / 0.1)
    sites = np.array([network.site[e] for e in edges])
    for site in dict.fromkeys(network.site):
        chosen = sites == site
        style = {"colors": colour[chosen], "linewidths": widths[chosen], "linestyles": [STYLES.get(site, (0, (2, 2)))]}
        axis.add_collection(LineCollection(paths[chosen], **style))
    axis.add_collection(PolyCollection(points, facecolors=colour, edgecolors="none", zorder=2.1))


def _draw_heads(axis, network: HeadNetwork, layout: Layout, colours) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Circle, Rectangle

    fills = np.ones((network.num_nodes, 4))
    senders, receivers = network.edge_index.numpy()
    loops = np.flatnonzero(senders == receivers)
    # Of several self-loops the last shows: sites come in the order outputs, scores.
    for edge in loops[::-1]:
        fills[receivers[edge]] = colours.to_rgba(network.mean[edge].item())
    patches = []
    for place, size, kind in zip(layout.places, head_sizes(network) * layout.radius, network.kind, strict=True):
        if kind == "shared":
            patches.append(Rectangle(place - 0.885 * size, 1.77 * size, 1.77 * size))
        else:
            patches.append(Circle(place, size))
    width = 0.8 if layout.radius > 0.08 else 0.4
    axis.add_collection(PatchCollection(patches, facecolors=fills, edgecolors=INK, linewidths=width, zorder=3))
    if 72 * layout.radius >= 4.4:
        for name, place, fill in zip(head_names(network), layout.places, fills, strict=True):
            axis.text(
                *place, name, fontsize=min(8.5, 90 * layout.radius), ha="center", va="center_baseline", zorder=4,
                color="white" if is_dark(fill) else INK,
            )  # fmt: skip


def _label(network: HeadNetwork, shown: int, edges: int) -> str:
    label = "mean edge weight   (arcs above a row lead to the right, below it to the left;  fill: self-loop)"
    notes = [f"the {shown} strongest of {edges} edges"] if shown < edges else []
    notes.append("size: importance of the head" if "importance" in network else "")
    if any(kind == "routed" for kind in network.kind):
        notes.append("square: shared head;  circle: routed head" + ("" if "importance" in network else ";  size: load"))
    if "key/value" in network.kind:
        notes.append("right: key/value heads")
    sites = list(dict.fromkeys(network.site))
    if len(sites) > 1:
        notes.append(",  ".join(f"{STYLE_NAMES.get(site, 'broken')}: {site}" for site in sites))
    return "\n".join([label, ";  ".join(filter(None, notes))]).rstrip()
