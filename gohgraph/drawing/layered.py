"""Figure of a whole model's head network: a row of heads for each layer."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gohgraph.common.files import checked_path
from gohgraph.drawing.circles import DASHED, SIGN, arrows, check_threshold, tip_style
from gohgraph.drawing.colours import colour_bar, colour_scale, end_of, is_dark
from gohgraph.drawing.figures import INK, WIDTH, finish, new_figure, wrapped
from gohgraph.drawing.given import network_given

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

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
        right, bottom, top: ends of the whole; it begins at 0.
    """

    places: np.ndarray
    rows: np.ndarray
    radius: float
    gap: float
    right: float
    bottom: float
    top: float


def draw_network(
    network: HeadNetwork,
    path: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
    threshold: float = 0.0,
    limit: float | None = None,
    most_edges: int = MOST_EDGES,
) -> Figure:
    """Draw the head graphs of a whole model in one picture, a row of heads for each attention block, the first below.

    Edges within a layer are arcs: above the row to the right, below it to the left. Edges of earlier layers come from
    their own row. Colour is the mean weight, width its magnitude, on one scale for all; the fill of a head is its
    self-loop. Its size is its importance where the network has that, else its load. Shared heads of a router are
    squares.

    Args:
        network: as `head_graph_of` makes it; or a recording or a model, of which it is made.
        threshold: edges weaker than this share (0 to 1) of the strongest are left out.
        most_edges: so many edges are drawn, the strongest of all layers.
        path, title, limit, and what is returned: as in `draw`.

    Raises:
        ValueError, OSError: as `draw`.

    Example:
        >>> import gohgraph as goh
        >>> model = goh.LanguageModel(goh.TransformerConfig(9, d_model=8, num_heads=2, num_layers=2, d_ff=8))
        >>> figure = draw_network(goh.composition_graph(model), title="who could read whom")
        >>> figure.get_suptitle()
        'who could read whom'
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
    senders, receivers = network.edge_index.numpy()
    between = senders != receivers
    shown = np.flatnonzero(between & (np.abs(weights) >= threshold * strongest) & (weights != 0))
    shown = shown[np.argsort(np.abs(weights[shown]), kind="stable")][-most_edges:]
    figure = new_figure(layout.right, layout.top - layout.bottom + 0.85)
    axes = figure.subplots(1, 1, squeeze=False)
    axis = axes[0, 0]
    axis.set_axis_off()
    _draw_rows(axis, network, layout)
    layout = with_room(layout, _draw_edges(axis, network, layout, shown, colours))
    _draw_heads(axis, network, layout, colours)
    axis.set(xlim=(0, layout.right), ylim=(layout.bottom, layout.top), aspect="equal")
    label = wrapped(_label(network, len(shown), int(between.sum())), layout.right, 9)
    figure.set_size_inches(layout.right, layout.top - layout.bottom + 0.55 + 0.15 * (1 + label.count("\n")))
    colour_bar(figure, axes, colours, label)
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
    right, top = LEFT + across * step + 0.2, (len(blocks) - 0.5) * gap + 0.2
    return Layout(places, rows, radius, gap, right, -0.5 * gap - 0.15, top)


def with_room(layout: Layout, paths: np.ndarray) -> Layout:
    """Returns a layout whose ends hold all curves `[E, P, 2]`, too: those past many rows bow far to the right."""
    room = 0.08
    right = max(layout.right, paths[..., 0].max(initial=0.0) + room)
    bottom = min(layout.bottom, paths[..., 1].min(initial=0.0) - room)
    return replace(layout, right=right, bottom=bottom, top=max(layout.top, paths[..., 1].max(initial=0.0) + room))


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


def lanes_of(network: HeadNetwork) -> dict[tuple[str, int], int]:
    """Returns the number of every site and round that edges are of: each has paths of its own between two heads."""
    return {lane: n for n, lane in enumerate(dict.fromkeys(zip(network.site, network.round.tolist(), strict=True)))}


def self_loops(network: HeadNetwork) -> dict[str, np.ndarray]:
    """Returns the number of every head's self-loop, `[N]`, -1 where it has none, for each site and round with any."""
    senders, receivers = network.edge_index.numpy()
    loops: dict[str, np.ndarray] = {}
    several = len({number for _, number in lanes_of(network)}) > 1
    for edge in np.flatnonzero(senders == receivers):
        name = network.site[edge] + (f", round {int(network.round[edge])}" if several else "")
        loops.setdefault(name, np.full(network.num_nodes, -1))[receivers[edge]] = edge
    return loops or {"none": np.full(network.num_nodes, -1)}


def ring_radii(network: HeadNetwork, layout: Layout, rings: int) -> np.ndarray:
    """Returns the radii of the rings that show every head's self-loops, `[K, N]`, the innermost first."""
    grown = 1 + min(0.35, 0.7 / rings) * np.arange(rings)
    return grown[:, None] * (layout.radius * head_sizes(network))[None, :]


def arcs(
    network: HeadNetwork, layout: Layout, edges: np.ndarray, radii: np.ndarray, tips: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the curves `[E, 25, 2]` of edges and their tips `[E, 3, 2]`; those of every site have their own path."""
    senders, receivers = network.edge_index.numpy()[:, edges]
    numbers = lanes_of(network)
    lane = np.array([numbers[network.site[e], int(network.round[e])] for e in edges], dtype=float)
    start, end = layout.places[senders], layout.places[receivers]
    within = layout.rows[senders] == layout.rows[receivers]
    along = end[:, 0] - start[:, 0]
    # Longer arcs are higher, and none reaches the next row: a curve comes half as high as its control point.
    rise = 0.86 * layout.gap * np.sqrt(np.abs(along) / max(np.ptp(layout.places[:, 0]), 1e-9)) + 0.15 * layout.gap
    rise = np.minimum(rise, 0.88 * layout.gap) + 0.95 * layout.gap * lane / max(1, len(numbers))
    control = (start + end) / 2
    control[:, 1] += np.where(within, np.sign(along) * rise, 0.0)
    # What passes by a row leaves its heads to the left.
    passed = np.abs(layout.rows[senders] - layout.rows[receivers]) - 1
    control[:, 0] += np.where(passed > 0, layout.radius * np.minimum(1.8 + 1.2 * passed, 6.0), 0.0)
    control[:, 0] += np.where(within, 0.0, 2.5 * layout.radius * lane)
    paths, points = arrows(start, control, end, radii[senders], 1.05 * radii[receivers], tips)
    return paths, points


def _draw_rows(axis: Axes, network: HeadNetwork, layout: Layout) -> None:
    for row, block in enumerate(network.blocks):
        height = row * layout.gap
        axis.plot([LEFT, layout.right - 0.2], [height, height], color="#e6e6e6", linewidth=0.8, zorder=0)
        axis.text(LEFT - 0.12, height, block, fontsize=8, ha="right", va="center", color=INK)
    if 72 * layout.radius < 4.4:
        heads = np.unique(network.head.numpy())
        step = next(step for step in (1, 2, 4, 8, 16, 32, 64) if len(heads) / step <= 20)
        for head in heads[::step]:
            place = layout.places[int(np.flatnonzero(network.head.numpy() == head)[0]), 0]
            axis.text(place, -0.5 * layout.gap, str(head), fontsize=7, ha="center", va="top", color=INK)


def _draw_edges(
    axis: Axes, network: HeadNetwork, layout: Layout, edges: np.ndarray, colours: ScalarMappable
) -> np.ndarray:
    """Draws edges and returns their curves, `[E, 25, 2]`."""
    from matplotlib.collections import LineCollection, PolyCollection

    weights = network.mean.numpy()[edges]
    share = np.minimum(np.abs(weights) / end_of(colours), 1.0)
    tips = layout.radius * (0.45 + 0.55 * np.sqrt(share))
    paths, points = arcs(network, layout, edges, ring_radii(network, layout, len(self_loops(network)))[-1], tips)
    colour = colours.to_rgba(weights)
    widths = (0.6 + 2.4 * share) * min(1.0, layout.radius / 0.1)
    sites = np.array([network.site[e] for e in edges])
    for site in dict.fromkeys(network.site):
        chosen = sites == site
        style = {"colors": colour[chosen], "linewidths": widths[chosen], "linestyles": [STYLES.get(site, (0, (2, 2)))]}
        axis.add_collection(LineCollection(paths[chosen], **style))
    axis.add_collection(PolyCollection(list(points), **tip_style(colour, weights), zorder=2.1))
    return paths


def _draw_heads(axis: Axes, network: HeadNetwork, layout: Layout, colours: ScalarMappable) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Circle, Patch, Rectangle

    loops = self_loops(network)
    radii = ring_radii(network, layout, len(loops))
    width = 0.8 if layout.radius > 0.08 else 0.4
    # The rings of further sites lie below the disc of the first.
    for of_site, sizes in reversed(list(zip(loops.values(), radii, strict=True))):
        fills, loop = np.ones((network.num_nodes, 4)), np.zeros(network.num_nodes)
        loop[of_site >= 0] = network.mean.numpy()[of_site[of_site >= 0]]
        fills[of_site >= 0] = colours.to_rgba(loop[of_site >= 0])
        rims: dict[str, Any] = {"edgecolors": INK, "linewidths": width}
        rims["linestyles"] = [DASHED if weight < 0 else "solid" for weight in loop]
        patches: list[Patch] = []
        for place, size, kind in zip(layout.places, sizes, network.kind, strict=True):
            if kind == "shared":
                patches.append(Rectangle(place - 0.885 * size, 1.77 * size, 1.77 * size))
            else:
                patches.append(Circle(place, size))
        axis.add_collection(PatchCollection(patches, facecolors=fills, zorder=3, **rims))
    if 72 * layout.radius >= 4.4:
        for name, place, fill in zip(head_names(network), layout.places, fills, strict=True):
            axis.text(
                float(place[0]), float(place[1]), name, fontsize=min(8.5, 90 * layout.radius), ha="center",
                va="center_baseline", zorder=4, color="white" if is_dark(fill) else INK,
            )  # fmt: skip


def _label(network: HeadNetwork, shown: int, edges: int) -> str:
    pairs = network.edge_index.t().tolist()
    within = any(network.block[j] == network.block[i] for j, i in pairs if j != i)
    about = ["arcs above a row lead right, below it left"] if within else []
    has_loops = any(j == i for j, i in pairs)
    about += ["fill: self-loop"] if has_loops else []
    label = f"mean edge weight   ({';  '.join([*about, SIGN if has_loops else 'hollow tip: negative'])})"
    notes = [f"the {shown} strongest of {edges} edges"] if shown < edges else []
    notes.append("size: importance of the head" if "importance" in network else "")
    if any(kind == "routed" for kind in network.kind):
        notes.append("square: shared head;  circle: routed head" + ("" if "importance" in network else ";  size: load"))
    if "key/value" in network.kind:
        notes.append("right: key/value heads")
    if "mlp" in network.kind:
        notes.append("m: feed-forward")
    sites = list(dict.fromkeys(network.site))
    if len(self_loops(network)) > 1:
        notes.append(f"a head's rings from within: self-loops of {', '.join(self_loops(network))}")
    if len(sites) > 1:
        notes.append(",  ".join(f"{STYLE_NAMES.get(site, 'broken')}: {site}" for site in sites))
    return "\n".join([label, ";  ".join(filter(None, notes))]).rstrip()
