"""How much of a behaviour the circuit of an interactive page carries: a figure under its network."""

from __future__ import annotations

from typing import Any

import numpy as np

from gohgraph.analysis.faithfulness import RANDOM, Faithfulness
from gohgraph.drawing.faithfulness import NAMES
from gohgraph.drawing.figures import INK
from gohgraph.drawing.page_figures import Themed
from gohgraph.drawing.pruning import COLOURS
from gohgraph.drawing.pruning import RANDOM as GREY


def curve_figure(measured: Faithfulness, themed: Themed) -> Any:
    """Returns the curves of `draw_faithfulness` with their 95 % intervals, each point of which tells its numbers."""
    from bokeh.models import ColumnDataSource, FixedTicker, HoverTool, NumeralTickFormatter
    from bokeh.plotting import figure

    plot = figure(
        width=700, height=300, min_width=300, max_width=700, sizing_mode="stretch_width", x_axis_type="log", tools="",
        toolbar_location=None, name="faithfulness", title="how much of the behaviour the strongest edges carry",
        x_axis_label="edges kept [%]", y_axis_label="f, share of the behaviour left", tags=["under"],
    )  # fmt: skip
    dots = []
    for place, name in enumerate(measured.values):
        f, low, high = np.array(measured.curve(name)).T  # each [S]
        source = ColumnDataSource({"share": 100 * np.array(measured.shares), "f": f, "low": low, "high": high})
        colour, dash = (GREY, "dashed") if name == RANDOM else (COLOURS[place % len(COLOURS)], "solid")
        shown = {"source": source, "legend_label": NAMES.get(name, name)}
        plot.varea("share", "low", "high", fill_color=colour, fill_alpha=0.18, source=source)
        plot.line("share", "f", line_color=colour, line_width=2, line_dash=dash, **shown)
        dots.append(plot.scatter("share", "f", size=6, fill_color=colour, line_color=None, source=source))
    about = [("edges kept", "@share{0.0} %"), ("f", "@f{0.00} [@low{0.00}, @high{0.00}]")]
    plot.add_tools(HoverTool(renderers=dots, tooltips=about))
    plot.outline_line_color, plot.grid.grid_line_alpha = None, 0.2
    plot.title.text_font_size, plot.title.text_color = "12px", INK
    plot.xaxis.ticker, plot.xaxis.formatter = FixedTicker(ticks=[0.1, 1, 10, 100]), NumeralTickFormatter(format="0.[0]")
    for axis in plot.axis:
        axis.update(axis_line_color=None, major_tick_line_color=None, minor_tick_line_color=None)
    for legend in plot.legend:
        legend.update(location="top_left", background_fill_alpha=0, border_line_color=None, label_text_color=INK)
    themed.figures.append(plot)
    themed.axes += [*plot.axis]
    themed.titles.append(plot.title)
    themed.legends += [*plot.legend]
    return plot
