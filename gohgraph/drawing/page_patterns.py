"""What heads attend to, on an interactive page: as bytes, and the two figures that show a sender and a receiver."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from gohgraph.analysis.module_names import block_of
from gohgraph.analysis.recording import Recordings
from gohgraph.drawing.attention_patterns import MOST_LABELS, patterns_of
from gohgraph.drawing.figures import INK
from gohgraph.drawing.tokens import CHOSEN, readable

if TYPE_CHECKING:
    from gohgraph.analysis.network import HeadNetwork
    from gohgraph.drawing.page_figures import Themed

# So many bytes of patterns are on a page, one for each weight, of at most so many tokens a head.
MOST_BYTES, MOST_TOKENS = 2 << 20, 96
SIDE = 300
NAMES = ("sender", "receiver")


def pattern_columns(heads: Recordings, network: HeadNetwork) -> dict[str, Any] | None:
    """Returns the patterns of a network's heads as bytes, 255 sqrt(weight); `None` where attention was not recorded.

    Returns:
        `weight`: of all patterns, each `[n, n]`, in one row; `size`: n; `pattern`: the number of every head's, `[N]`,
        -1 where it has none; `queries`, `keys`: how many rows and columns of it are filled, `[N]`; `tokens`: how many
        there were.
    """
    recorded = getattr(heads, "attention", None)
    if not recorded:
        return None
    places = {node: place for node, place in enumerate(zip(network.block, network.head.tolist(), strict=True))}
    by_title = {recording.title: recording for recording in recorded.values()}
    # Where a graph stands in a block, the module's name tells whose maps they are.
    receivers = (network.block[i] for i in network.edge_index[1].tolist())
    of_block = dict(zip(receivers, (recorded.get(block_of(name)) for name in network.graph), strict=True))
    chosen, longest = [], 0
    for node, (block, head) in places.items():
        recording = of_block.get(block) or by_title.get(block)
        if recording is not None and head in recording.heads and network.kind[node] in ("head", "shared", "routed"):
            chosen.append((node, recording, recording.heads.index(head)))
            longest = max(longest, *recording.maps.shape[-2:])
    if not chosen:
        return None
    size = max(1, min(longest, MOST_TOKENS, math.isqrt(MOST_BYTES // len(chosen))))
    weights = np.zeros((len(chosen), size, size), dtype=np.uint8)
    numbers, filled = np.full(network.num_nodes, -1, dtype=np.int32), np.zeros((2, network.num_nodes), dtype=np.int32)
    means = {id(recording): patterns_of(recording).clamp(0, 1).sqrt().mul(255).round() for _, recording, _ in chosen}
    for number, (node, recording, place) in enumerate(chosen):
        pattern = means[id(recording)][place, :size, :size].numpy()
        weights[number, : pattern.shape[0], : pattern.shape[1]] = pattern
        numbers[node], filled[:, node] = number, pattern.shape
    return {
        "weight": weights.ravel(), "size": size, "pattern": numbers, "queries": filled[0], "keys": filled[1],
        "tokens": longest,
    }  # fmt: skip


def pattern_figures(columns: dict[str, Any], strings: list[str] | None, mapper: Any, themed: Themed) -> list[Any]:
    """Returns two empty figures, named "sender" and "receiver", with the sources that fill them of the same names."""
    return [_pattern_figure(name, columns["size"], strings, mapper, themed) for name in NAMES]


def _pattern_figure(name: str, size: int, strings: list[str] | None, mapper: Any, themed: Themed) -> Any:
    from bokeh.models import ColumnDataSource, FixedTicker, HoverTool, Range1d
    from bokeh.plotting import figure
    from bokeh.transform import transform

    plot = figure(
        width=SIDE, height=SIDE, x_range=Range1d(-0.5, size - 0.5), y_range=Range1d(size - 0.5, -0.5), tools="",
        toolbar_location=None, name=f"{name} pattern", visible=False, title=name,
    )  # fmt: skip
    empty: dict[str, list[float]] = {column: [] for column in ("x", "y", "weight", "shade", "query", "key")}
    cells = plot.rect(
        "x", "y", 1, 1, source=ColumnDataSource(empty, name=f"{name} cells"), fill_color=transform("shade", mapper),
        line_color=None,
    )  # fmt: skip
    mark = ColumnDataSource({"y": []}, name=f"{name} mark")
    plot.hspan("y", source=mark, line_color=CHOSEN, line_width=1.5)
    plot.add_tools(HoverTool(renderers=[cells], tooltips=[("@query \u2192 @key", "@weight{0.000}")]))
    step = next(step for step in (1, 2, 5, 10, 20) if size / step <= MOST_LABELS / 2 or step == 20)
    for axis in plot.axis:
        axis.ticker = FixedTicker(ticks=list(range(0, size, step)))
        if strings is not None:
            axis.major_label_overrides = {n: readable(strings[n])[:9] for n in range(min(size, len(strings)))}
        style = {"major_label_text_font_size": "9px", "major_tick_line_color": None, "axis_line_color": None}
        style |= {"axis_label_text_font_size": "10px", "major_label_text_color": INK, "axis_label_text_color": INK}
        axis.update(**style, axis_label_standoff=0)
    plot.xaxis.major_label_orientation = math.pi / 2
    plot.xaxis.axis_label, plot.yaxis.axis_label = "key: what is attended to", "query: who attends"
    plot.grid.visible, plot.outline_line_color = False, None
    plot.title.text_font_size, plot.title.text_color = "12px", INK
    themed.figures.append(plot)
    themed.axes += [*plot.axis]
    themed.titles.append(plot.title)
    return plot
