"""Files of a head network: GraphML, GEXF (Gephi), JSON and CSV, written whole and read back."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gohgraph.common.files import checked_path, write_whole

if TYPE_CHECKING:
    from gohgraph.analysis.network import HeadNetwork

GRAPH_SUFFIXES = (".graphml", ".gexf", ".json", ".csv")
# What Gephi calls the columns of its tables of nodes and edges.
NODE, ENDS = "Id", ("Source", "Target")


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
        return HeadNetwork.from_networkx(_read(path))
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

    graph, suffix = network.to_networkx(), path.suffix.lower()
    if suffix == ".graphml":
        networkx.write_graphml(graph, path)
    elif suffix == ".gexf":
        networkx.write_gexf(graph, path)
    elif suffix == ".json":
        data = _without_nan(networkx.node_link_data(graph, edges="edges"))
        path.write_text(json.dumps(data, indent=1, allow_nan=False), encoding="utf-8")
    else:
        names = network.attributes()[1]
        rows = [[j, i, *(values[name] for name in names)] for j, i, values in graph.edges(data=True)]
        _write_rows(path, [*ENDS, *names], rows)


def _without_nan(value: Any) -> Any:
    """The same values with `None` for NaN, which JSON has not."""
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if value != value else value


def _write_nodes(network: HeadNetwork, path: Path) -> None:
    names, nodes = network.attributes()[0], network.to_networkx().nodes(data=True)
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
            for name in ("importance", "edge_importance"):
                if name in row and row[name] is None:
                    row[name] = float("nan")
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
