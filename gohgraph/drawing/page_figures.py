"""The two figures of an interactive page: the layered network, and the text as a strip of tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from gohgraph.drawing.figures import INK
from gohgraph.drawing.layered import Layout, head_names, self_loops
from gohgraph.drawing.page_script import NAME_COLUMNS, NAME_ROWS
from gohgraph.drawing.tokens import CHOSEN, readable, strip_of

if TYPE_CHECKING:
    from gohgraph.analysis.network import HeadNetwork

PIXELS = 110
LINE = "#e6e6e6"


@dataclass
class Themed:
    """The parts of a page whose colours change with its theme."""

    figures: list[Any] = field(default_factory=list)
    inks: list[Any] = field(default_factory=list)
    axes: list[Any] = field(default_factory=list)
    titles: list[Any] = field(default_factory=list)
    rows: list[Any] = field(default_factory=list)
    outlines: list[Any] = field(default_factory=list)
    legends: list[Any] = field(default_factory=list)


@dataclass
class Drawn:
    """The figure of the network and its parts that a script moves."""

    plot: Any
    bar: Any
    rows: Any
    columns: Any
    letters: Any


def network_figure(
    network: HeadNetwork, layout: Layout, edges: Any, heads: Any, filters: tuple[Any, Any], mapper: Any, themed: Themed
) -> Drawn:
    """Returns the figure of the network, rows of heads with curves between them, and its colour bar.

    Edges and heads are the `ColumnDataSource`s of `page_data`, the filters are of edges and of
    their tips, `mapper` colours weights. Names
    of layers and numbers of heads are those of the axes, so that they stay on zoom.
    """
    from bokeh.models import CDSView, ColorBar, Range1d, TapTool
    from bokeh.plotting import figure
    from bokeh.transform import transform

    left = layout.places[:, 0].min() - 0.4
    plot = figure(
        width=round(PIXELS * layout.right), height=round(PIXELS * (layout.top - layout.bottom)) + 70, min_width=300,
        x_range=Range1d(left, layout.right), y_range=Range1d(layout.bottom, layout.top), sizing_mode="stretch_width",
        max_width=1400, tools="pan,wheel_zoom,box_zoom,reset,save", active_scroll="wheel_zoom", name="network",
    )  # fmt: skip
    plot.grid.visible, plot.outline_line_color = False, None
    plot.toolbar.logo = None
    rows, columns = _name_axes(plot, network, layout, themed)
    colour, (view, tipped) = transform("weight", mapper), (CDSView(filter=chosen) for chosen in filters)
    line = {"line_color": colour, "line_width": "width", "line_alpha": "alpha"}
    curves = plot.multi_line("xs", "ys", source=edges, view=view, name="curves", hover_line_width=6, **line)
    curves.nonselection_glyph = curves.selection_glyph = curves.glyph
    tips = {"marker": "triangle", "angle": "angle", "size": "tip", "fill_color": colour, "line_color": None}
    points = plot.scatter("tip_x", "tip_y", source=edges, view=tipped, fill_alpha="alpha", name="tips", **tips)
    points.nonselection_glyph = points.selection_glyph = points.glyph
    discs, letters = _draw_heads(plot, network, heads, mapper, themed)
    _add_tools(plot, network, edges, heads, curves, discs)
    plot.add_tools(TapTool(renderers=[curves, *discs]))
    bar = ColorBar(
        color_mapper=mapper, orientation="horizontal", title="edge weight", height=10, width=260, padding=6,
        title_text_color=INK, major_label_text_color=INK, bar_line_color=None, name="bar",
    )  # fmt: skip
    plot.add_layout(bar, "below")
    themed.figures.append(plot)
    return Drawn(plot, bar, rows, columns, letters)


def _add_tools(plot: Any, network: HeadNetwork, edges: Any, heads: Any, curves: Any, discs: list) -> None:
    """Adds what is told under the mouse."""
    from bokeh.models import HoverTool

    names = [name for name in ("round", "mean", "std", "share") if name in edges.data]
    numbers = [(name, f"@{name}" if name == "round" else f"@{name}{{0.000}}") for name in names]
    if "edge_importance" in edges.data:
        numbers.append(("importance", "@edge_importance{0.00000}"))
    about = [("edge", "@sender \u2192 @receiver, @site"), ("weight shown", "@weight{0.000}"), *numbers]
    plot.add_tools(HoverTool(renderers=[curves], tooltips=about, line_policy="interp", name="edge hover"))
    loops = self_loops(network)
    about = [("head", "@label, @kind")]
    for number, name in enumerate(loops):
        about.append(("self-loop" if len(loops) == 1 else f"self-loop, {name}", f"@loop_{number}{{0.000}}"))
    about.append(("load", "@load{0.00}"))
    about += [("importance", "@importance{0.00000}")] if "importance" in heads.data else []
    plot.add_tools(HoverTool(renderers=discs, tooltips=about, name="head hover"))


def strip_figure(strings: list[str], shades: Any, greys: Any, themed: Themed) -> tuple[Any, Any, Any]:
    """Returns the figure of the text, the source of its tokens, shaded by `shades` `[N]`, and the glyph of its letters.

    A click selects a token.
    """
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
        name="strip", min_width=300,
    )  # fmt: skip
    plot.axis.visible, plot.grid.visible, plot.outline_line_color = False, False, None
    cell = {"fill_color": transform("shade", greys), "line_color": "#bbbbbb", "line_width": 0.5}
    boxes = plot.rect("x", "y", "width", 0.9, source=tokens, name="boxes", **cell)
    boxes.nonselection_glyph = boxes.glyph
    boxes.selection_glyph = _chosen(boxes.glyph)
    letters = plot.text(
        "x", "y", text="text", source=tokens, text_align="center", text_baseline="middle", text_font=value("monospace"),
        text_font_size="12px", text_color=INK,
    )  # fmt: skip
    letters.nonselection_glyph = letters.selection_glyph = letters.glyph
    plot.add_tools(TapTool(renderers=[boxes]), HoverTool(renderers=[boxes], tooltips=[("token", "@number: @text")]))
    themed.figures.append(plot)
    themed.inks.append(letters.glyph)
    return plot, tokens, letters.glyph


def _name_axes(plot: Any, network: HeadNetwork, layout: Layout, themed: Themed) -> tuple[Any, Any]:
    """Names rows and columns at the axes; returns their sources: `y`, `title` of rows, `x`, `title` of columns."""
    from bokeh.models import ColumnDataSource, CustomJSTickFormatter, FixedTicker

    heights = np.arange(len(network.blocks)) * layout.gap
    rows = ColumnDataSource({"y": heights, "base": heights, "title": network.blocks}, name="rows")
    places = dict(zip(layout.places[:, 0].round(6).tolist(), head_names(network), strict=True))
    columns = ColumnDataSource({"x": list(places), "title": list(places.values())}, name="columns")
    for axis, source, code, ticks in (
        (plot.yaxis[0], rows, NAME_ROWS, heights), (plot.xaxis[0], columns, NAME_COLUMNS, list(places))
    ):  # fmt: skip
        axis.ticker = FixedTicker(ticks=list(ticks))
        axis.formatter = CustomJSTickFormatter(args={"source": source}, code=code)
        style = {"major_label_text_font_size": "11px", "major_tick_line_color": None, "axis_line_color": None}
        axis.update(**style, minor_tick_line_color=None, major_label_text_color=INK)
    themed.axes += [*plot.axis]
    left, right = layout.places[:, 0].min() - 0.3, layout.places[:, 0].max() + 0.3
    lines = plot.segment(left, "y", right, "y", source=rows, line_color=LINE)
    themed.rows.append(lines.glyph)
    return rows, columns


def _draw_heads(plot: Any, network: HeadNetwork, heads: Any, mapper: Any, themed: Themed) -> tuple[list, Any]:
    from bokeh.models import CDSView, ColumnDataSource, IndexFilter
    from bokeh.transform import transform

    drawn = []
    # The rings of further sites lie below the disc of the first.
    for ring in reversed(range(len(self_loops(network)))):
        for is_shared in (True, False):
            numbers = [number for number, kind in enumerate(network.kind) if (kind == "shared") == is_shared]
            if not numbers:
                continue
            style = {"source": heads, "view": CDSView(filter=IndexFilter(numbers)), "line_color": INK}
            style["fill_color"] = transform(f"loop_{ring}", mapper)
            if is_shared:
                marks = plot.rect("x", "y", f"side_{ring}", f"side_{ring}", **style)
            else:
                marks = plot.circle("x", "y", radius=f"radius_{ring}", radius_dimension="x", **style)
            marks.nonselection_glyph = marks.glyph
            marks.selection_glyph = _chosen(marks.glyph)
            drawn.append(marks)
    themed.outlines += [marks.glyph for marks in drawn]
    # A source of their own, which is filled where they are large enough to be seen.
    source = ColumnDataSource({"x": [], "y": [], "number": [], "ink": []})
    letters = plot.text(
        "x", "y", text="number", source=source, text_align="center", text_baseline="middle", text_font_size="8px",
        text_color="ink", name="numbers", visible=False,
    )  # fmt: skip
    letters.level = "overlay"
    return drawn, letters


def _chosen(glyph: Any) -> Any:
    """The glyph of a head that is chosen."""
    outlined = glyph.clone()
    outlined.update(line_color=CHOSEN, line_width=3)
    return outlined
