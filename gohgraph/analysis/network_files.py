"""Files of a head network: GraphML, GEXF (Gephi), JSON and CSV, written whole and read back."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gohgraph.common.files import checked_path, write_whole

if TYPE_CHECKING:
    from gohgraph.analysis.network import HeadNetwork

GRAPH_SUFFIXES = (".graphml", ".gexf", ".json", ".csv")
# What Gephi calls the columns of its tables of nodes and edges.
NODE, ENDS = "Id", ("Source", "Target")
# What XML has no way to write, nor UTF-8, and tables lose; with the backslash, so that the way back is one.
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\\]")
ESCAPE = re.compile(r"\\u([0-9a-f]{4})")


def save_head_graph(network: HeadNetwork, path: str | os.PathLike[str]) -> None:
    """Writes a head network in the format of the file's suffix, with all attributes.

    `.graphml` and `.gexf` are networkx's, `.json` its node-link data. `.csv` is a table of edges, beside which
    `NAME.nodes.csv` holds the heads; Gephi imports both.

    Args:
        network: as `head_graph_of` makes it.
        path: a file that ends in .graphml, .gexf, .json or .csv; an older one is kept where it cannot be written.
    """
    path = checked_path(path, GRAPH_SUFFIXES)
    if path.suffix.lower() == ".csv":
        # Nodes first: the edges' table is the one that is asked for, and the last to change.
        write_whole(_nodes_of(path), lambda pending: _write_nodes(network, pending))
    write_whole(path, lambda pending: _write(network, pending))


def load_head_graph(path: str | os.PathLike[str]) -> HeadNetwork:
    """Reads a head network that `save_head_graph` wrote."""
    from gohgraph.analysis.network import HeadNetwork

    path = Path(path)
    if path.suffix.lower() not in GRAPH_SUFFIXES:
        raise ValueError(f"Expected a file that ends in {', '.join(GRAPH_SUFFIXES)} (got {path}). Do pass another.")
    try:
        return HeadNetwork.from_networkx(_in_words(_read(path), _unescaped))
    except OSError:
        raise
    # Each parser has errors of its own for a damaged file.
    except Exception as error:
        raise ValueError(
            f"Expected a head graph written by save_head_graph (got {path}: {' '.join(str(error).split())[:200]}). "
            "Do write it again."
        ) from error


def _write(network: HeadNetwork, path: Path) -> None:
    import networkx

    graph, suffix = _in_words(network.to_networkx(), _escaped), path.suffix.lower()
    if suffix == ".graphml":
        networkx.write_graphml(graph, path)
    elif suffix == ".gexf":
        networkx.write_gexf(graph, path)
    elif suffix == ".json":
        data = _finite(networkx.node_link_data(graph, edges="edges"))
        path.write_text(json.dumps(data, indent=1, allow_nan=False), encoding="utf-8")
    else:
        names = network.attributes()[1]
        rows = [[j, i, *(values[name] for name in names)] for j, i, values in graph.edges(data=True)]
        _write_rows(path, [*ENDS, *names], rows)


def _finite(value: Any) -> Any:
    """The same values as JSON can hold them: `None` for NaN, words for infinity."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else str(value)


def _in_words(graph: Any, change: Callable[[str], str]) -> Any:
    """A `networkx` graph with all its words changed, in place."""
    for values in (*(row[-1] for row in graph.nodes(data=True)), *(row[-1] for row in graph.edges(data=True))):
        values.update({name: change(word) for name, word in values.items() if isinstance(word, str)})
    return graph


def _escaped(word: str) -> str:
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", word)


def _unescaped(word: str) -> str:
    return ESCAPE.sub(lambda found: chr(int(found[1], 16)), word)


def _write_nodes(network: HeadNetwork, path: Path) -> None:
    names, nodes = network.attributes()[0], _in_words(network.to_networkx(), _escaped).nodes(data=True)
    _write_rows(path, [NODE, *names], [[node, *(values[name] for name in names)] for node, values in nodes])


def _write_rows(path: Path, header: list[str], rows: list[list[Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def _nodes_of(path: Path) -> Path:
    return path.with_name(f"{path.stem}.nodes{path.suffix}")


def _read(path: Path) -> Any:
    """The `networkx` graph in a file."""
    import networkx

    suffix = path.suffix.lower()
    if suffix == ".graphml":
        return networkx.read_graphml(path, node_type=int, force_multigraph=True)
    if suffix == ".gexf":
        return networkx.read_gexf(path, node_type=int)
    if suffix == ".json":
        data = json.loads(path.read_text(encoding="utf-8"))
        for row in (*data["nodes"], *data["edges"]):
            row.update({name: math.nan for name, value in row.items() if value is None})
        return networkx.node_link_graph(data, edges="edges")
    graph = networkx.MultiDiGraph()
    for row in _read_rows(_nodes_of(path)):
        graph.add_node(int(row.pop(NODE)), **row)
    for row in _read_rows(path):
        graph.add_edge(*(int(row.pop(end)) for end in ENDS), **row)
    return graph


def _read_rows(path: Path) -> list[dict[str, Any]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
