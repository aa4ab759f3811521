"""Head graphs in a notebook's cell: the interactive page, and the small picture beside a table."""

from __future__ import annotations

import base64
import html
import io
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gohgraph.analysis import summary
from gohgraph.analysis.recording import Recordings
from gohgraph.drawing.attention_patterns import draw_attention
from gohgraph.drawing.given import network_given
from gohgraph.drawing.layered import draw_network
from gohgraph.drawing.page import save_page

if TYPE_CHECKING:
    from torch import nn

    from gohgraph.analysis.network import HeadNetwork

# Dots an inch, and edges, of a picture beside a table.
DPI, MOST_EDGES = 80, 120


def show(heads: Recordings | HeadNetwork | nn.Module, *, height: int = 640, **options: Any) -> None:
    """Shows the interactive page of `save_page` inside the cell of a notebook.

    Args:
        heads: a recording or a network; or a model, for the weights its edges have at a context of zero.
        height: of the page in the cell, in pixels.
        **options: as in `save_page`.

    Raises:
        ImportError: outside of a notebook, without IPython; or without Bokeh.

    Example:
        >>> import gohgraph as goh
        >>> shape = dict(d_model=8, num_heads=2, num_layers=2, d_ff=8)
        >>> model = goh.LanguageModel(goh.TransformerConfig(9, **shape, head_graph=goh.HeadGraphConfig()))
        >>> goh.show(model)  # doctest: +SKIP
    """
    try:
        from IPython.display import HTML, display
    except ImportError as error:
        raise ImportError(f"Expected a notebook (got: {error}). Do write a file of the page by save_page.") from error
    source = heads if isinstance(heads, Recordings) else network_given(heads)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "heads.html"
        save_page(source, file, **options)
        page = file.read_text(encoding="utf-8")
    # An iframe keeps the page's styles and the notebook's apart.
    style = f"width: 100%; height: {height}px; border: 0"
    display(HTML(f'<div><iframe srcdoc="{html.escape(page)}" style="{style}"></iframe></div>'))


def picture(source: Any) -> str:
    """Returns the picture of a recording or a network as an image inside HTML; what is wrong as a sentence.

    It is the layered one, and of a recording of attention alone all heads' patterns.
    """
    try:
        has_no_graph = isinstance(source, Recordings) and not source
        figure = draw_attention(source) if has_no_graph else draw_network(network_given(source), most_edges=MOST_EDGES)
    except ValueError as error:
        return f"<p>{html.escape(str(error))}</p>"
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.06)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="a row of heads for each layer">'


summary.pictures.append(picture)
