"""The head network as an interactive page: one HTML file that opens without a network."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from gohgraph.analysis.record import Recordings
from gohgraph.common.files import checked_path, write_whole
from gohgraph.common.packages import needs
from gohgraph.drawing.circles import check_threshold
from gohgraph.drawing.colours import DIVERGING, round_limit
from gohgraph.drawing.layered import layout_of
from gohgraph.drawing.page_data import as_bytes, edge_columns, head_columns, self_loops, strongest_edges, token_weights
from gohgraph.drawing.page_figures import Themed, network_figure, strip_figure
from gohgraph.drawing.page_script import PREFERENCE, STYLE, THEME, UPDATE
from gohgraph.drawing.tokens import check_tokens_recorded, shades_of, token_changes

if TYPE_CHECKING:
    from gohgraph.analysis.network import HeadNetwork

MOST_EDGES, MOST_TOKENS = 4000, 400
# On dark paper a weight of 0 is dark as well.
DARK_DIVERGING = ("#9ecbff", "#4a94e0", "#25568c", "#33363c", "#8a4a1c", "#e8762a", "#ffc08a")
GREYS, DARK_GREYS = ("#ffffff", "#9a9a9a"), ("#1b1d21", "#6f7580")
WIDGETS = ":host, label, .bk-input-group, .bk-slider-title { color: var(--ink); }"


def save_page(
    heads: Recordings | HeadNetwork,
    path: str | os.PathLike[str],
    *,
    title: str = "head graphs",
    importance: Mapping[str, Tensor] | None = None,
    edge_importance: Mapping[str, Tensor] | None = None,
    threshold: float = 0.05,
    most_edges: int = MOST_EDGES,
) -> None:
    """Save the head network of a recording as one HTML file that opens from disk, without any request to a network.

    It shows the layered graph of `draw_network`, to zoom and drag; a head or an edge under the mouse tells its numbers;
    a slider hides weak edges, a field chooses layers. Where the recording has every token and its string
    (`record(model, every_token=True, token_strings=...)`), a click on a token of the text shows the weights at that
    token, a click beside it the means again; at most 400 tokens. It is light or dark, as the reader's system is,
    until the button is pressed.

    Args:
        heads: a recording; or a network, by `attribution_graph` or another, which has no tokens to click.
        path: a file that ends in .html.
        title: of the page.
        importance, edge_importance: as in `head_graph_of`.
        threshold: where the slider stands at first, as a share (0 to 1) of the strongest edge.
        most_edges: so many edges are on the page, the strongest, self-loops not counted.

    Raises:
        ImportError: Bokeh is not installed.
        ValueError, OSError: another suffix, as `head_graph_of` and `draw`.
    """
    from gohgraph.analysis.network import HeadNetwork, head_graph_of

    path = checked_path(path, (".html",))
    check_threshold(threshold)
    if isinstance(heads, HeadNetwork):
        heads, network = Recordings({}), heads
    else:
        network = head_graph_of(heads, importance=importance, edge_importance=edge_importance)
    document = page_document(heads, network, title, threshold, most_edges)
    from bokeh.embed import file_html
    from bokeh.resources import INLINE

    text = file_html(document, resources=INLINE, title=title, template=STYLE)
    write_whole(path, lambda pending: pending.write_text(text, encoding="utf-8"))


def page_document(
    heads: Recordings, network: HeadNetwork, title: str = "head graphs", threshold: float = 0.05,
    most_edges: int = MOST_EDGES,
):  # fmt: skip
    """Returns the page of `save_page` as a `bokeh.document.Document`."""
    with needs("bokeh for an interactive page", "interactive"):
        import bokeh  # noqa: F401
    from bokeh.document import Document
    from bokeh.events import DocumentReady
    from bokeh.layouts import column, row
    from bokeh.models import BooleanFilter, ColumnDataSource, CustomJS, Div, LinearColorMapper

    layout, loops = layout_of(network), self_loops(network)
    chosen = strongest_edges(network, most_edges)
    values = _token_values(heads, chosen, loops)
    limit = round_limit(max(float(np.abs(network.mean.numpy()).max(initial=0.0)), values["largest"]))
    mapper = LinearColorMapper(palette=_palette(DIVERGING), low=-limit, high=limit)
    sources = {
        "edges": ColumnDataSource(edge_columns(network, layout, chosen), name="edges"),
        "heads": ColumnDataSource(head_columns(network, layout, loops), name="heads"),
    }
    shown, themed = BooleanFilter(name="shown"), Themed()
    plot, bar = network_figure(network, layout, *sources.values(), shown, mapper, themed)
    strongest = float(np.abs(network.mean.numpy()[chosen]).max(initial=0.0))
    slider, layers, toggle, status = _controls(network.blocks, limit, threshold * strongest)
    strip, tokens, greys = _strip(heads, values, themed)
    shared = {
        "filter": shown, "threshold": slider, "layers": layers, "status": status, "toggle": toggle, "tokens": tokens,
        "values": values["edges"], "loops": values["loops"], "scale": values["scale"], "limit": limit,
    }  # fmt: skip
    update = CustomJS(args={**sources, **shared}, code=UPDATE)
    theme = CustomJS(args={**vars(themed), **_theme(mapper, bar, greys), "toggle": toggle}, code=THEME)
    slider.js_on_change("value", update)
    layers.js_on_change("value", update)
    toggle.js_on_change("active", theme, update)
    if tokens is not None:
        tokens.selected.js_on_change("indices", update)
    heading = Div(text=f"<b>{html.escape(title)}</b>", stylesheets=[WIDGETS])
    document = Document(title=title)
    controls = row(slider, layers, toggle, status)
    document.add_root(column(heading, controls, *strip, plot, sizing_mode="stretch_width"))
    # The first drawing is that of the controls as they stand.
    document.js_on_event(DocumentReady, update, CustomJS(args={"toggle": toggle}, code=PREFERENCE))
    return document


def _controls(blocks: list[str], limit: float, threshold: float) -> tuple[Any, Any, Any, Any]:
    """The threshold's slider, the choice of layers, the button for the theme, and the line that counts edges."""
    from bokeh.models import Div, MultiChoice, Slider, Toggle

    style = {"stylesheets": [WIDGETS]}
    slider = Slider(
        start=0, end=limit, step=limit / 200, value=round(threshold, 4), title="hide weights below", format="0.000",
        name="threshold", width=260, **style,
    )  # fmt: skip
    layers = MultiChoice(options=blocks, placeholder="all layers", name="layers", width=260, **style)
    toggle = Toggle(label="dark", name="theme", width=70)
    return slider, layers, toggle, Div(text="", name="status", margin=(12, 5, 5, 15), **style)


def _token_values(heads: Recordings, chosen: np.ndarray, loops: np.ndarray) -> dict[str, Any]:
    """The weights of every token: sources of the chosen edges and of the heads' loops, and what a byte stands for."""
    from bokeh.models import ColumnDataSource

    if getattr(heads, "token_strings", None) is None or any(part.every is None for part in heads.values()):
        return {"edges": None, "loops": None, "scale": 1.0, "largest": 0.0}
    weights = token_weights(heads, min(MOST_TOKENS, len(check_tokens_recorded(heads))))  # [N, E]
    weights = np.concatenate([weights, np.zeros_like(weights[:, :1])], axis=1)
    at_loops = np.where(loops < 0, weights.shape[1] - 1, loops)
    numbers, scale = as_bytes(np.concatenate([weights[:, chosen], weights[:, at_loops]], axis=1))
    parts = numbers[:, : len(chosen)], numbers[:, len(chosen) :]
    edges, at_heads = (ColumnDataSource({"weight": np.ascontiguousarray(part).ravel()}) for part in parts)
    return {"edges": edges, "loops": at_heads, "scale": scale, "largest": scale * int(np.abs(numbers).max(initial=0))}


def _strip(heads: Recordings, values: dict[str, Any], themed: Themed) -> tuple[list, Any, Any]:
    """The figure of the text in a list, its tokens and its greys; nothing where tokens were not recorded."""
    if values["edges"] is None:
        return [], None, None
    from bokeh.models import LinearColorMapper

    greys = LinearColorMapper(palette=_palette(GREYS), low=0, high=1)
    count = min(MOST_TOKENS, len(heads.token_strings))
    shades = shades_of(token_changes(heads)[:count])
    plot, tokens = strip_figure(heads.token_strings[:count], shades, greys, themed)
    return [plot], tokens, greys


def _theme(mapper: Any, bar: Any, greys: Any) -> dict[str, Any]:
    return {
        "mapper": mapper, "bar": bar, "greys": greys, "light_palette": _palette(DIVERGING),
        "dark_palette": _palette(DARK_DIVERGING), "light_greys": _palette(GREYS), "dark_greys": _palette(DARK_GREYS),
    }  # fmt: skip


def _palette(colours: tuple[str, ...]) -> list[str]:
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    return [to_hex(colour) for colour in LinearSegmentedColormap.from_list("palette", colours)(np.linspace(0, 1, 129))]
