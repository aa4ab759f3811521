"""The two figures of an interactive page: the layered network, and the text as a strip of tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from gohgraph.drawing.figures import INK
from gohgraph.drawing.layered import Layout
from gohgraph.drawing.tokens import CHOSEN, readable, strip_of

if TYPE_CHECKING:
    from gohgraph.analysis.network import HeadNetwork

PIXELS = 110
LINE = "#e6e6e6"


@dataclass
class Themed:
    """The parts of a page whose colours change with its theme: papers, letters, lines and outlines."""

    figures: list[Any] = field(default_factory=list)
    inks: list[Any] = field(default_factory=list)
    rows: list[Any] = field(default_factory=list)
    outlines: list[Any] = field(default_factory=list)


def network_figure(
    network: HeadNetwork, layout: Layout, edges: Any, heads: Any, shown: Any, mapper: Any, themed: Themed
) -> tuple[Any, Any]:
    """Returns the figure of the network, rows of heads with curves between them, and its colour bar.

    Edges and heads are the `ColumnDataSource`s of `page_data`, `shown` filters edges, `mapper` colours weights.
    """
    from bokeh.models import CDSView, ColorBar, HoverTool, Range1d
    from bokeh.plotting import figure
    from bokeh.transform import transform

    bottom, top = -0.5 * layout.gap - 0.1, layout.height - 0.5 * layout.gap
    plot = figure(
        width=round(PIXELS * layout.width), height=round(PIXELS * layout.height) + 60, match_aspect=True,
        x_range=Range1d(0, layout.width), y_range=Range1d(bottom, top), sizing_mode="scale_width", max_width=1400,
        tools="pan,wheel_zoom,box_zoom,reset,save", active_scroll="wheel_zoom", name="network",
    )  # fmt: skip
    plot.axis.visible, plot.grid.visible, plot.outline_line_color = False, False, None
    plot.toolbar.logo = None
    _draw_rows(plot, network, layout, themed)
    colour, view = transform("weight", mapper), CDSView(filter=shown)
    curves = plot.multi_line(
        "xs", "ys", source=edges, view=view, line_color=colour, line_width="width", name="curves",
        hover_line_width=6, line_cap="round",
    )  # fmt: skip
    tips = {"marker": "triangle", "angle": "angle", "size": "tip", "color": colour}
    plot.scatter("tip_x", "tip_y", source=edges, view=view, **tips)
    discs = _draw_heads(plot, network, layout, heads, colour, themed)
    names = [name for name in ("round", "mean", "std", "share") if name in edges.data]
    numbers = [(name, f"@{name}" if name == "round" else f"@{name}{{0.000}}") for name in names]
    if "edge_importance" in edges.data:
        numbers.append(("importance", "@edge_importance{0.00000}"))
    about = [("edge", "@sender \u2192 @receiver, @site"), ("weight shown", "@weight{0.000}"), *numbers]
    plot.add_tools(HoverTool(renderers=[curves], tooltips=about, line_policy="interp", name="edge hover"))
    about = [("head", "@label, @kind"), ("self-loop", "@weight{0.000}"), ("load", "@load{0.00}")]
    about += [("importance", "@importance{0.00000}")] if "importance" in heads.data else []
    plot.add_tools(HoverTool(renderers=discs, tooltips=about, name="head hover"))
    bar = ColorBar(
        color_mapper=mapper, orientation="horizontal", title="edge weight", height=10, width=300, padding=6,
        title_text_color=INK, major_label_text_color=INK, bar_line_color=None, name="bar",
    )  # fmt: skip
    plot.add_layout(bar, "below")
    themed.figures.append(plot)
    return plot, bar


def strip_figure(strings: list[str], shades: Any, greys: Any, themed: Themed):
    """Returns the figure of the text and the source of its tokens, shaded by `shades` `[N]`; a click selects one."""
    from bokeh.core.properties import value
    from bokeh.models import ColumnDataSource, HoverTool, Range1d, TapTool
    from bokeh.plotting import figure
    from bokeh.transform import transform

    lines = strip_of(strings)
    cells = [(*cell, -row) for row, line in enumerate(lines) for cell in line]
    numbers, left, need, y = (np.array(column) for column in zip(*cells, strict=True))
    texts = [readable(string) for string in strings]
    places = {"number": numbers, "x": left + need / 2, "y": y, "width": need - 0.14}
    tokens = ColumnDataSource({**places, "text": texts, "shade": shades}, name="tokens")
    plot = figure(
        width=1000, height=26 * len(lines) + 20, x_range=Range1d(0, max((left + need).max(), 40)), tools="",
        y_range=Range1d(0.6 - len(lines), 0.6), sizing_mode="stretch_width", max_width=1400, toolbar_location=None,
        name="strip",
    )  # fmt: skip
    plot.axis.visible, plot.grid.visible, plot.outline_line_color = False, False, None
    cell = {"fill_color": transform("shade", greys), "line_color": "#bbbbbb", "line_width": 0.5}
    boxes = plot.rect("x", "y", "width", 0.9, source=tokens, name="boxes", **cell)
    boxes.nonselection_glyph = boxes.glyph
    boxes.selection_glyph = boxes.glyph.clone(line_color=CHOSEN, line_width=3)
    letters = plot.text(
        "x", "y", text="text", source=tokens, text_align="center", text_baseline="middle", text_font=value("monospace"),
        text_font_size="12px", text_color=INK,
    )  # fmt: skip
    letters.nonselection_glyph = letters.selection_glyph = letters.glyph
    plot.add_tools(TapTool(renderers=[boxes]), HoverTool(renderers=[boxes], tooltips=[("token", "@number: @text")]))
    themed.figures.append(plot)
    themed.inks.append(letters.glyph)
    return plot, tokens


def _draw_rows(plot: Any, network: HeadNetwork, layout: Layout, themed: Themed) -> None:
    heights = [row * layout.gap for row in range(len(network.blocks))]
    left, right = layout.places[:, 0].min() - 0.3, layout.places[:, 0].max() + 0.3
    rows = plot.segment([left] * len(heights), heights, [right] * len(heights), heights, line_color=LINE)
    names = plot.text(
        [left - 0.08] * len(heights), heights, network.blocks, text_align="right", text_baseline="middle",
        text_font_size="11px", text_color=INK,
    )  # fmt: skip
    themed.rows.append(rows.glyph)
    themed.inks.append(names.glyph)


def _draw_heads(plot: Any, network: HeadNetwork, layout: Layout, heads: Any, colour: Any, themed: Themed) -> list:
    from bokeh.models import CDSView, IndexFilter

    drawn = []
    for is_shared in (True, False):
        numbers = [number for number, kind in enumerate(network.kind) if (kind == "shared") == is_shared]
        if not numbers:
            continue
        view = CDSView(filter=IndexFilter(numbers))
        style = {"source": heads, "view": view, "fill_color": colour, "line_color": INK}
        if is_shared:
            drawn.append(plot.rect("x", "y", "side", "side", **style))
        else:
            drawn.append(plot.circle("x", "y", radius="radius", **style))
    themed.outlines += [marks.glyph for marks in drawn]
    if layout.radius * PIXELS >= 7:
        letters = plot.text(
            "x", "y", text="number", source=heads, text_align="center", text_baseline="middle",
            text_font_size=f"{min(13, round(layout.radius * PIXELS))}px", text_color="ink",
        )  # fmt: skip
        letters.level = "overlay"
    return drawn
