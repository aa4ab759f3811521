"""Recordings and networks at a glance: a few lines of text, and a table with a picture in a notebook's cell."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from gohgraph.analysis.module_names import graph_titles

if TYPE_CHECKING:
    from gohgraph.analysis.network import HeadNetwork
    from gohgraph.analysis.recording import Recording, Recordings

# What draws the picture: the room of drawings puts its function in, which stands above this one.
pictures: list[Callable[[Any], str]] = []
MOST_ROWS = 12
NOTHING = "Recordings of no head graph"
HEAD = ("head graph", "heads", "edges", "tokens", "mean |weight|", "strongest edge")
ATTENTION = ("attention of", "heads", "examples", "queries x keys")


def line_of(recording: Recording) -> str:
    """Returns what a recording holds, in a line."""
    heads, edges, tokens, mean, strongest = cells_of(recording)
    told = f"mean |weight| {mean}, strongest edge {strongest}" if recording.tokens else "nothing seen yet"
    kept = ", every token kept" if recording.every is not None else ""
    return f"Recording({heads} heads, {edges} edges, {tokens} tokens{kept}: {told})"


def cells_of(recording: Recording) -> list[str]:
    """Returns heads, edges, tokens, mean |weight| and the strongest edge of a recording, as text."""
    numbers = [f"{recording.num_heads}", f"{recording.edge_index.shape[1]:,}", f"{recording.tokens:,}"]
    if not recording.tokens or not recording.edge_index.numel():
        return [*numbers, "-", "-"]
    mean = recording.mean  # [R, E]
    edge = int(mean.abs().max(dim=0).values.argmax())
    value = mean[int(mean[:, edge].abs().argmax()), edge].item()
    sender, receiver = recording.edge_index[:, edge].tolist()
    back, head = divmod(sender, recording.num_heads)
    earlier = f" of {back} layer{'s' * (back > 1)} before" if back else ""
    return [*numbers, f"{mean.abs().mean().item():.4f}", f"{head}{earlier} \u2192 {receiver}: {value:+.4f}"]


def text_of(heads: Recordings) -> str:
    """Returns a line for every recording, of head graphs and of attention, aligned."""
    tables = []
    for head, rows in _tables_of(heads):
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        cells = (zip(row, widths, strict=True) for row in (head, *rows))
        tables.append("\n".join("  ".join(f"{cell:<{width}}" for cell, width in row).rstrip() for row in cells))
    return "\n\n".join(tables) or NOTHING


def html_of(heads: Recordings) -> str:
    """Returns the tables of recordings, and the picture of them once tokens were seen."""
    tables = [_table(head, rows) for head, rows in _tables_of(heads)]
    if not tables:
        return f"<p>{NOTHING}</p>"
    seen = any(one.tokens for one in heads.values()) or any(one.examples for one in heads.attention.values())
    return "".join(tables) + ("".join(draw(heads) for draw in pictures) if seen else "<p>nothing seen yet</p>")


def _tables_of(heads: Recordings) -> list[tuple[Sequence[str], list[list[str]]]]:
    """The heads and rows of the tables that are not empty: one of head graphs, one of attention."""
    graphs = [[title, *cells_of(one)] for title, one in zip(graph_titles(list(heads)), heads.values(), strict=True)]
    maps = []
    for one in heads.attention.values():
        shape = " x ".join(map(str, one.maps.shape[-2:])) if one.examples else "-"
        maps.append([one.title, str(len(one.heads)), str(one.examples), shape])
    return [(head, rows) for head, rows in ((HEAD, graphs), (ATTENTION, maps)) if rows]


def html_of_network(network: HeadNetwork) -> str:
    """Returns what a network is, its strongest edges, and its picture."""
    sites = ", ".join(dict.fromkeys(network.site))
    about = f"{network.num_nodes:,} heads in {len(network.blocks)} blocks, {network.num_edges:,} edges ({sites})"
    finite = bool(torch.isfinite(network.mean).all())
    edges = network.strongest(min(MOST_ROWS, network.num_edges)) if finite else []
    rows = [[f"{edge['sender']} \u2192 {edge['receiver']}", edge["site"], f"{edge['mean']:+.4g}"] for edge in edges]
    parts = [f"<p>{html.escape(about)}</p>", _table(("strongest edges", "site", "mean"), rows)]
    return "".join([*parts, *(draw(network) for draw in pictures)])


def _table(head: Sequence[str], rows: list[list[str]]) -> str:
    lines = [f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows[:MOST_ROWS]]
    rest = f"<p>and {len(rows) - MOST_ROWS} more</p>" if len(rows) > MOST_ROWS else ""
    return f"<table>{''.join(lines)}</table>{rest}"
