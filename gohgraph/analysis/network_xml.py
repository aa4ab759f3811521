"""GEXF and GraphML of a head network, written line by line.

networkx reads what is written here; its own writers build the whole document first, and take ten times as long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TextIO
from xml.sax.saxutils import escape, quoteattr

import numpy as np

from gohgraph.analysis.network_columns import for_layout, node_colours, node_places, node_sizes, signed_colours

if TYPE_CHECKING:
    from gohgraph.analysis.network import HeadNetwork

GEXF = "http://www.gexf.net/1.2draft"
GRAPHML = "http://graphml.graphdrawing.org/xmlns"
TYPES = {int: "long", float: "double", str: "string"}
# What GEXF says by other means than attributes.
SAID = ("label", "weight")


def write_gexf(network: HeadNetwork, file: TextIO, words: Callable[[str], str]) -> None:
    """Writes GEXF 1.2 with Gephi's colour, size and position.

    Args:
        network: to write.
        file: opened as UTF-8.
        words: what is done to every word, so that XML can hold it.
    """
    table = for_layout(network)
    labels, weights = table.nodes["label"], table.edges["weight"]
    nodes, edges = ({n: c for n, c in part.items() if n not in SAID} for part in (table.nodes, table.edges))
    file.write(
        f"<?xml version='1.0' encoding='utf-8'?>\n<gexf xmlns=\"{GEXF}\" xmlns:viz=\"{GEXF}/viz\" version=\"1.2\">\n"
        '<graph defaultedgetype="directed" mode="static">\n'
    )
    for kind, columns in (("node", nodes), ("edge", edges)):
        file.write(f'<attributes class="{kind}" mode="static">\n')
        for number, (name, column) in enumerate(columns.items()):
            file.write(f'<attribute id="{kind[0]}{number}" title="{name}" type="{_type(column)}"/>\n')
        file.write("</attributes>\n")
    file.write("<nodes>\n")
    shown = zip(labels, _gexf_values("n", nodes, words), _places(network), strict=True)
    for number, (label, values, (x, y, size, (r, g, b))) in enumerate(shown):
        file.write(
            f'<node id="{number}" label={quoteattr(words(label))}><attvalues>{values}</attvalues>'
            f'<viz:size value="{size:.2f}"/><viz:color r="{r}" g="{g}" b="{b}"/>'
            f'<viz:position x="{x:.1f}" y="{y:.1f}" z="0"/></node>\n'
        )
    file.write("</nodes>\n<edges>\n")
    colours = signed_colours(np.array(table.edges["mean"])).tolist()
    rows = zip(*table.ends, weights, _gexf_values("e", edges, words), colours, strict=True)
    for number, (j, i, weight, values, (r, g, b)) in enumerate(rows):
        file.write(
            f'<edge id="{number}" source="{j}" target="{i}" weight="{weight!r}"><attvalues>{values}</attvalues>'
            f'<viz:color r="{r}" g="{g}" b="{b}"/></edge>\n'
        )
    file.write("</edges>\n</graph>\n</gexf>\n")


def write_graphml(network: HeadNetwork, file: TextIO, words: Callable[[str], str]) -> None:
    """Writes GraphML, with place, size and colour as the attributes that Gephi knows; arguments as `write_gexf`."""
    table = for_layout(network)
    x, y, sizes, colours = zip(*_places(network), strict=True)
    channels = dict(zip("rgb", map(list, zip(*colours, strict=True)), strict=True))
    nodes = {**table.nodes, "x": list(x), "y": list(y), "size": list(sizes), **channels}
    file.write(f"<?xml version='1.0' encoding='utf-8'?>\n<graphml xmlns=\"{GRAPHML}\">\n")
    for kind, columns in (("node", nodes), ("edge", table.edges)):
        for number, (name, column) in enumerate(columns.items()):
            about = f'for="{kind}" attr.name="{name}" attr.type="{_type(column)}"'
            file.write(f'<key id="{kind[0]}{number}" {about}/>\n')
    file.write('<graph edgedefault="directed">\n')
    for number, values in enumerate(_graphml_values("n", nodes, words)):
        file.write(f'<node id="{number}">{values}</node>\n')
    for j, i, values in zip(*table.ends, _graphml_values("e", table.edges, words), strict=True):
        file.write(f'<edge source="{j}" target="{i}">{values}</edge>\n')
    file.write("</graph>\n</graphml>\n")


def _places(network: HeadNetwork) -> Iterator[tuple[float, float, float, list[int]]]:
    """x, y, size and colour of every node."""
    places, sizes = node_places(network).tolist(), node_sizes(network).tolist()
    for (x, y), size, colour in zip(places, sizes, node_colours(network).tolist(), strict=True):
        yield x, y, size, colour


def _type(column: list[Any]) -> str:
    return TYPES[type(column[0])] if column else "string"


def _gexf_values(letter: str, columns: dict[str, list[Any]], words: Callable[[str], str]) -> Iterator[str]:
    texts = [_texts(column, lambda word: quoteattr(words(word))[1:-1]) for column in columns.values()]
    heads = [f'<attvalue for="{letter}{number}" value="' for number in range(len(texts))]
    for row in zip(*texts, strict=True):
        yield "".join([head + text + '"/>' for head, text in zip(heads, row, strict=True)])


def _graphml_values(letter: str, columns: dict[str, list[Any]], words: Callable[[str], str]) -> Iterator[str]:
    texts = [_texts(column, lambda word: escape(words(word))) for column in columns.values()]
    heads = [f'<data key="{letter}{number}">' for number in range(len(texts))]
    for row in zip(*texts, strict=True):
        yield "".join([head + text + "</data>" for head, text in zip(heads, row, strict=True)])


def _texts(column: list[Any], of_word: Callable[[str], str]) -> Iterator[str]:
    """The values of a column as XML has them, one at a time; few words stand in many rows."""
    known: dict[str, str] = {}
    for value in column:
        if isinstance(value, str):
            if value not in known:
                known[value] = of_word(value)
            yield known[value]
        elif isinstance(value, float) and not math.isfinite(value):
            # As XML Schema, Java and Python read it.
            yield "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        else:
            yield repr(value)
