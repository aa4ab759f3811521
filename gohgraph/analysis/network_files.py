"""Files of a head network: GraphML, GEXF (Gephi), JSON and CSV, written whole and read back."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from gohgraph.analysis.network_columns import RESIDUAL, columns_of
from gohgraph.analysis.network_xml import write_gexf, write_graphml
from gohgraph.common.files import checked_path, write_whole

if TYPE_CHECKING:
    from gohgraph.analysis.network import HeadNetwork

GRAPH_SUFFIXES = (".graphml", ".gexf", ".json", ".csv")
# What Gephi calls the columns of its tables of nodes and edges.
NODE, ENDS, WEIGHT = "Id", ("Source", "Target"), "Weight"
# What XML has no way to write, nor UTF-8, and tables lose; with the backslash, so that the way back is one.
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\\]")
ESCAPE = re.compile(r"\\u([0-9a-f]{4})")


def save_head_graph(network: HeadNetwork, path: str | os.PathLike[str]) -> None:
    """Writes a head network in the format of the file's suffix, with all attributes.

    `.graphml` and `.gexf` have `weight`, |mean|, and colour, size and place of every head, as Gephi takes them; where
    nothing joins two layers, residual edges do, of the site "residual", so that layouts hold together. `.json` is
    networkx's node-link data. `.csv` is a table of edges, beside which `NAME.nodes.csv` holds the heads; Gephi imports
    both. `load_head_graph` reads all of them back as they were saved.

    Args:
        network: as `head_graph_of` makes it.
        path: a file that ends in .graphml, .gexf, .json or .csv; an older one is kept where it cannot be written.

    Raises:
        ValueError, OSError: another suffix; no such folder, or no place to write.

    Example:
        >>> import tempfile, gohgraph as goh
        >>> shape = dict(d_model=8, num_heads=2, num_layers=2, d_ff=8)
        >>> model = goh.LanguageModel(goh.TransformerConfig(9, **shape, head_graph=goh.HeadGraphConfig()))
        >>> path = tempfile.mkdtemp() + "/heads.gexf"
        >>> save_head_graph(goh.head_graph_of(model), path)
        >>> load_head_graph(path).num_edges
        8
    """
    file = checked_path(path, GRAPH_SUFFIXES)
    if file.suffix.lower() == ".csv":
        # Nodes first: the edges' table is the one that is asked for, and the last to change.
        write_whole(_nodes_of(file), lambda pending: _write(_write_nodes, network, pending))
    write_whole(file, lambda pending: _write(WRITERS[file.suffix.lower()], network, pending))


def load_head_graph(path: str | os.PathLike[str]) -> HeadNetwork:
    """Reads a head network that `save_head_graph` wrote.

    Args:
        path: a file that ends in .graphml, .gexf, .json or .csv.

    Returns:
        The network with its attributes, nodes and edges in their order.

    Raises:
        ValueError: another suffix, or a file that is damaged or of another program.
        OSError: it cannot be read.

    Example:
        >>> import tempfile
        >>> import gohgraph as goh
        >>> model = goh.LanguageModel(goh.TransformerConfig(9, d_model=8, num_heads=2, num_layers=2, d_ff=8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     goh.save_head_graph(goh.composition_graph(model), f"{folder}/heads.json")
        ...     load_head_graph(f"{folder}/heads.json").label
        ['0.0', '0.1', '1.0', '1.1']
    """
    from gohgraph.analysis.network import HeadNetwork

    path = Path(path)
    if path.suffix.lower() not in GRAPH_SUFFIXES:
        raise ValueError(f"Expected a file that ends in {', '.join(GRAPH_SUFFIXES)} (got {path}). Do pass another.")
    try:
        return HeadNetwork.from_networkx(_as_saved(_read(path)))
    except OSError:
        raise
    # Each parser has errors of its own for a damaged file.
    except Exception as error:
        raise ValueError(
            f"Expected a head graph written by save_head_graph (got {path}: {' '.join(str(error).split())[:200]}). "
            "Do write it again."
        ) from error


def _write(writer: Callable[[HeadNetwork, TextIO], None], network: HeadNetwork, path: Path) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer(network, file)


def _write_json(network: HeadNetwork, file: TextIO) -> None:
    """Node-link data as networkx has them, a line for every node and edge."""
    columns = columns_of(network)
    file.write('{"directed": true, "multigraph": true, "graph": {}, "nodes": [\n')
    _write_lines(({**row, "id": number} for number, row in enumerate(_rows(columns.nodes))), file)
    file.write('], "edges": [\n')
    keys: dict[tuple[int, int], int] = {}

    def edges() -> Iterator[dict[str, Any]]:
        for row, j, i in zip(_rows(columns.edges), *columns.ends, strict=True):
            keys[j, i] = keys.get((j, i), -1) + 1
            yield {**row, "source": j, "target": i, "key": keys[j, i]}

    _write_lines(edges(), file)
    file.write("]}\n")


def _write_lines(rows: Iterable[dict[str, Any]], file: TextIO) -> None:
    for number, row in enumerate(rows):
        file.write(",\n" * (number > 0) + json.dumps(row, allow_nan=False))
    file.write("\n")


def _rows(columns: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """The rows of columns as JSON can hold them: `None` for NaN, words for infinity."""
    names = list(columns)
    for values in zip(*(map(_finite, column) for column in columns.values()), strict=True):
        yield dict(zip(names, values, strict=True))


def _finite(value: Any) -> Any:
    if isinstance(value, str):
        return _escaped(value)
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else str(value)


def _write_edges(network: HeadNetwork, file: TextIO) -> None:
    columns = columns_of(network)
    weight = network.mean.abs().tolist()
    rows = zip(*columns.ends, weight, *map(_words_escaped, columns.edges.values()), strict=True)
    _write_rows(file, [*ENDS, WEIGHT, *columns.edges], rows)


def _write_nodes(network: HeadNetwork, file: TextIO) -> None:
    nodes = columns_of(network).nodes
    _write_rows(file, [NODE, *nodes], zip(range(network.num_nodes), *map(_words_escaped, nodes.values()), strict=True))


def _write_rows(file: TextIO, header: list[str], rows: Iterable[Sequence[Any]]) -> None:
    writer = csv.writer(file)
    writer.writerow(header)
    writer.writerows(rows)


WRITERS: dict[str, Callable[[HeadNetwork, TextIO], None]] = {
    ".graphml": lambda network, file: write_graphml(network, file, _escaped),
    ".gexf": lambda network, file: write_gexf(network, file, _escaped),
    ".json": _write_json,
    ".csv": _write_edges,
}


def _words_escaped(column: list[Any]) -> list[Any]:
    return [_escaped(value) if isinstance(value, str) else value for value in column]


def _as_saved(graph: Any) -> Any:
    """A `networkx` graph as its network was, in place: words as they were, without the edges that files alone have."""
    for values in (*(row[-1] for row in graph.nodes(data=True)), *(row[-1] for row in graph.edges(data=True))):
        values.update({name: _unescaped(word) for name, word in values.items() if isinstance(word, str)})
    edges = graph.edges(keys=True, data="site") if graph.is_multigraph() else graph.edges(data="site")
    graph.remove_edges_from([edge[:-1] for edge in edges if edge[-1] == RESIDUAL])
    return graph


def _escaped(word: str) -> str:
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", word)


def _unescaped(word: str) -> str:
    return ESCAPE.sub(lambda found: chr(int(found[1], 16)), word)


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
        rows = list(csv.DictReader(file))
    if any(None in row.values() for row in rows):
        raise ValueError(f"a row of {path.name} is cut off")
    return rows
