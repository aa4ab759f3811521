"""The head network as an interactive page: one HTML file that opens without a network."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from gohgraph.analysis.recording import Recordings
from gohgraph.common.checks import check_number
from gohgraph.common.files import checked_path, write_whole
from gohgraph.common.packages import needs
from gohgraph.drawing.attention_patterns import WEIGHTS
from gohgraph.drawing.circles import check_threshold
from gohgraph.drawing.colours import DIVERGING, round_limit
from gohgraph.drawing.layered import Layout, layout_of, self_loops, with_room
from gohgraph.drawing.page_controls import MANY, WIDGETS, controls_of, first_least, hint_of
from gohgraph.drawing.page_curve import curve_figure
from gohgraph.drawing.page_data import as_bytes, edge_columns, head_columns, strongest_edges, token_weights
from gohgraph.drawing.page_figures import Drawn, Themed, network_figure, strip_figure
from gohgraph.drawing.page_patterns import NAMES, SIDE, pattern_columns, pattern_figures
from gohgraph.drawing.page_script import KEYS, PREFERENCE, STRIP_VIEW, STYLE, THEME, UPDATE, VIEW
from gohgraph.drawing.tokens import check_tokens_recorded, shades_of, token_changes

if TYPE_CHECKING:
    from gohgraph.analysis.faithfulness import Faithfulness
    from gohgraph.analysis.network import HeadNetwork

MOST_EDGES, MOST_TOKENS = 4000, 400
# On dark paper a weight of 0 is dark as well.
DARK_DIVERGING = ("#9ecbff", "#4a94e0", "#25568c", "#33363c", "#8a4a1c", "#e8762a", "#ffc08a")
GREYS, DARK_GREYS = ("#ffffff", "#9a9a9a"), ("#1b1d21", "#6f7580")
DARK_WEIGHTS = ("#1b1d21", "#233a55", "#2f6fb0", "#7fb0d9", "#d7e8f8", "#ffffff")
WRAPPED = ":host { flex-wrap: wrap; max-width: 100%; }"


def save_page(
    heads: Recordings | HeadNetwork,
    path: str | os.PathLike[str],
    *,
    title: str = "head graphs",
    importance: Mapping[str, Tensor] | None = None,
    edge_importance: Mapping[str, Tensor] | None = None,
    threshold: float | None = None,
    limit: float | None = None,
    most_edges: int = MOST_EDGES,
    patterns: Recordings | None = None,
    faithfulness: Faithfulness | None = None,
) -> None:
    """Save the head network of a recording as one HTML file that opens from disk, without any request to a network.

    It shows the layered graph of `draw_network`, to zoom and drag; a head or an edge under the mouse tells its numbers;
    a slider hides weak edges, fields choose sites and layers, whose rows then stand alone. Where the recording has
    every token and its string (`record(model, every_token=True, token_strings=...)`), a click on a token of the text or
    an arrow key shows the weights at that token, a click beside it the means again; at most 400 tokens. A click on a
    head names its strongest senders and receivers, one on an edge its two ends; where attention was recorded
    (`record(model, attention=True)`), their patterns stand below, means over examples, at most 96 tokens of each and
    2 MiB in all, so that the file stays small. It is light or dark, as the reader's system is, until the button is
    pressed.

    Args:
        heads: a recording; or a network, by `attribution_graph` or another, which has no tokens to click.
        patterns: of a network, a recording with attention and token strings, whose patterns are shown with it.
        faithfulness: of a network, how much of the behaviour it carries, whose curve stands under it.
        path: a file that ends in .html.
        title: of the page.
        importance, edge_importance: as in `head_graph_of`.
        threshold: where the slider stands at first, as a share (0 to 1) of the strongest edge; `None` for the 300
            strongest edges by their mean, those above 0.05 of the strongest.
        limit: end of the colours, and of the widths, to compare pages and pictures; `None` above the strongest weight.
        most_edges: so many edges are on the page, the strongest by their mean, and as many again that are strongest at
            single tokens; self-loops not counted.

    Raises:
        ImportError: Bokeh is not installed.
        ValueError, OSError: another suffix, as `head_graph_of` and `draw`.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import gohgraph as goh
        >>> model = goh.LanguageModel(goh.TransformerConfig(9, d_model=8, num_heads=2, num_layers=2, d_ff=8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_page(goh.composition_graph(model), f"{folder}/heads.html")
        ...     Path(folder, "heads.html").read_text(encoding="utf-8").lstrip()[:15]
        '<!DOCTYPE html>'
    """
    from gohgraph.analysis.network import HeadNetwork, head_graph_of

    file = checked_path(path, (".html",))
    check_threshold(threshold or 0.0)
    if limit is not None:
        check_number("limit", limit, above=0)
    if isinstance(heads, HeadNetwork):
        recordings, network = patterns if patterns is not None else Recordings({}), heads
    else:
        recordings = heads
        network = head_graph_of(heads, importance=importance, edge_importance=edge_importance)
    document = page_document(recordings, network, title, threshold, most_edges, limit, faithfulness)
    from bokeh.embed import file_html
    from bokeh.resources import INLINE

    text = file_html(document, resources=INLINE, title=title, template=STYLE)
    write_whole(file, lambda pending: pending.write_text(text, encoding="utf-8"))


def page_document(
    heads: Recordings, network: HeadNetwork, title: str = "head graphs", threshold: float | None = None,
    most_edges: int = MOST_EDGES, limit: float | None = None, measured: Faithfulness | None = None,
) -> Any:  # fmt: skip
    """Returns the page of `save_page` as a `bokeh.document.Document`.

    Every part is a root of its own, which `STYLE` sets in its place: a text that changes, or a pattern that appears,
    would else lay out and draw all of the page.
    """
    with needs("bokeh for an interactive page", "interactive"):
        import bokeh  # noqa: F401
    from bokeh.document import Document
    from bokeh.events import DocumentReady
    from bokeh.layouts import row
    from bokeh.models import BooleanFilter, ColumnDataSource, CustomJS, Div, LinearColorMapper

    layout, themed = layout_of(network), Themed()
    weights = _weights_of_tokens(heads, network)
    chosen = strongest_edges(network, most_edges, weights)
    values = _token_values(weights, network, chosen)
    end = round_limit(max(float(np.abs(network.mean.numpy()).max(initial=0.0)), values["largest"]))
    limit = end if limit is None else limit
    mapper = LinearColorMapper(palette=_palette(DIVERGING), low=-limit, high=limit)
    columns, paths = edge_columns(network, layout, chosen)
    layout, points = with_room(layout, paths), {name: paths[..., n].ravel() for n, name in enumerate("xy")}
    sources = {
        "edges": ColumnDataSource(columns, name="edges"),
        "heads": ColumnDataSource(head_columns(network, layout), name="heads"),
    }
    # Nothing is drawn before the first update has said what.
    shown, tips = (BooleanFilter(name=name, booleans=[False] * len(chosen)) for name in ("shown", "tipped"))
    drawn = network_figure(network, layout, sources["edges"], sources["heads"], (shown, tips), mapper, themed)
    slider, sites, layers, toggle, status = controls_of(network, end, first_least(network, chosen, threshold))
    strip, tokens, letters, greys = _strip(heads, themed)
    patterns, shades = _patterns(heads, network, themed)
    curve = None if measured is None else curve_figure(measured, themed)
    about = Div(text="", name="about", stylesheets=[WIDGETS], width=SIDE - 16)
    between = int((network.edge_index[0] != network.edge_index[1]).sum())
    shared = {
        "filter": shown, "tips": tips, "many": MANY, "threshold": slider, "layers": layers, "sites": sites,
        "status": status, "toggle": toggle, "tokens": tokens, "values": values["edges"], "loops": values["loops"],
        "scale": values["scale"], "limit": limit, "rings": len(self_loops(network)), "total": between,
        "rows": drawn.rows, "plot": drawn.plot, "row_ticks": drawn.plot.yaxis[0].ticker, "about": about,
        "letters": drawn.letters, "paths": ColumnDataSource(points),
        "mean_of": ", mean over tokens" if heads else "",
        "hint": hint_of(tokens is not None, patterns["patterns"] is not None),
    }  # fmt: skip
    update = CustomJS(args={**sources, **shared, **patterns}, code=UPDATE)
    views = _views(drawn, layout, strip, letters)
    theme = CustomJS(args={**vars(themed), **_theme(mapper, drawn.bar, greys, shades), "toggle": toggle}, code=THEME)
    for model, changes in ((slider, ["value"]), (layers, ["value"]), *(((sites, ["active"]),) if sites else ())):
        for change in changes:
            model.js_on_change(change, update)
    toggle.js_on_change("active", theme, update)
    drawn.letters.js_on_change("visible", update)
    for source in (*sources.values(), *([tokens] if tokens else [])):
        source.selected.js_on_change("indices", update)
    heading = Div(text=f"<b>{html.escape(title)}</b>", stylesheets=[WIDGETS])
    document = Document(title=title)
    controls = row(*filter(None, (slider, sites, layers, toggle)), stylesheets=[WRAPPED])
    for part in filter(None, (heading, controls, status, strip, drawn.plot)):
        document.add_root(part)
    for part in (about, *(patterns["figures"] or ())):
        part.tags = ["beside"]
        document.add_root(part)
    if curve is not None:
        document.add_root(curve)
    # The first drawing is that of the controls as they stand.
    ready = [update, *views, CustomJS(args={"toggle": toggle}, code=PREFERENCE)]
    document.js_on_event(DocumentReady, *ready, *([CustomJS(args={"tokens": tokens}, code=KEYS)] if tokens else []))
    return document


def _views(drawn: Drawn, layout: Layout, strip: Any, texts: Any) -> list[Any]:
    """What fits letters and numbers to the zoom and the width of the window, for each figure once it is laid out."""
    from bokeh.models import CustomJS

    args = {
        "plot": drawn.plot, "letters": drawn.letters, "columns": drawn.columns,
        "column_ticks": drawn.plot.xaxis[0].ticker, "radius": layout.radius,
    }  # fmt: skip
    views = [CustomJS(args=args, code=VIEW)]
    drawn.plot.x_range.js_on_change("start", views[0])
    drawn.plot.x_range.js_on_change("end", views[0])
    drawn.plot.js_on_change("inner_width", views[0])
    if strip:
        views.append(CustomJS(args={"strip": strip, "texts": texts}, code=STRIP_VIEW))
        strip.js_on_change("inner_width", views[1])
    return views


def _weights_of_tokens(heads: Recordings, network: HeadNetwork) -> np.ndarray | None:
    """The weights of every token `[N, E]`, where they were recorded."""
    if not heads or heads.token_strings is None or any(part.every is None for part in heads.values()):
        return None
    return token_weights(heads, min(MOST_TOKENS, len(check_tokens_recorded(heads))))


def _token_values(weights: np.ndarray | None, network: HeadNetwork, chosen: np.ndarray) -> dict[str, Any]:
    """The weights of every token: sources of the chosen edges and of the heads' loops, and what a byte stands for."""
    from bokeh.models import ColumnDataSource

    if weights is None:
        return {"edges": None, "loops": None, "scale": 1.0, "largest": 0.0}
    weights = np.concatenate([weights, np.zeros_like(weights[:, :1])], axis=1)
    loops = np.concatenate(list(self_loops(network).values()))  # [K*N]
    at_loops = np.where(loops < 0, weights.shape[1] - 1, loops)
    numbers, scale = as_bytes(np.concatenate([weights[:, chosen], weights[:, at_loops]], axis=1))
    parts = numbers[:, : len(chosen)], numbers[:, len(chosen) :]
    edges, at_heads = (ColumnDataSource({"weight": np.ascontiguousarray(part).ravel()}) for part in parts)
    return {"edges": edges, "loops": at_heads, "scale": scale, "largest": scale * int(np.abs(numbers).max(initial=0))}


def _strip(heads: Recordings, themed: Themed) -> tuple[Any, Any, Any, Any]:
    """The figure of the text, its tokens, its letters and its greys; nothing where tokens were not recorded."""
    if not heads or heads.token_strings is None or any(part.every is None for part in heads.values()):
        return None, None, None, None
    from bokeh.models import LinearColorMapper

    greys = LinearColorMapper(palette=_palette(GREYS), low=0, high=1)
    count = min(MOST_TOKENS, len(heads.token_strings))
    shades = shades_of(token_changes(heads)[:count])
    return *strip_figure(heads.token_strings[:count], shades, greys, themed), greys


def _patterns(heads: Recordings, network: HeadNetwork, themed: Themed) -> tuple[dict[str, Any], Any]:
    """What the script needs of attention patterns, and their colours; nothing where they were not recorded."""
    from bokeh.models import ColumnDataSource, LinearColorMapper

    columns = pattern_columns(heads, network)
    if columns is None:
        return dict.fromkeys(("patterns", "bytes", "figures", "cells", "marks", "side", "asked")), None
    shades = LinearColorMapper(palette=_palette(WEIGHTS), low=0, high=1)
    figures = pattern_figures(columns, heads.token_strings, shades, themed)
    of_heads = {name: columns[name] for name in ("pattern", "queries", "keys")}
    args = {
        "patterns": ColumnDataSource(of_heads, name="patterns"),
        "bytes": ColumnDataSource({"weight": columns["weight"]}), "figures": figures, "side": columns["size"],
        "asked": columns["tokens"],
    }  # fmt: skip
    for part in ("cells", "marks"):
        args[part] = [
            figure.select_one({"name": f"{name} {part.removesuffix('s') if part == 'marks' else part}"})
            for name, figure in zip(NAMES, figures, strict=True)
        ]
    return args, shades


def _theme(mapper: Any, bar: Any, greys: Any, shades: Any) -> dict[str, Any]:
    return {
        "mapper": mapper, "bar": bar, "greys": greys, "shades": shades, "light_palette": _palette(DIVERGING),
        "dark_palette": _palette(DARK_DIVERGING), "light_greys": _palette(GREYS), "dark_greys": _palette(DARK_GREYS),
        "light_shades": _palette(WEIGHTS), "dark_shades": _palette(DARK_WEIGHTS),
    }  # fmt: skip


def _palette(colours: tuple[str, ...]) -> list[str]:
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    return [to_hex(colour) for colour in LinearSegmentedColormap.from_list("palette", colours)(np.linspace(0, 1, 129))]
