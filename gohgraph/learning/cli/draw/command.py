"""The command itself: chooses what a model has to show, runs it, writes the file and prints the strongest edges."""

from __future__ import annotations

import argparse
import webbrowser
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from gohgraph.analysis import edge_attribution, head_importance
from gohgraph.analysis.attention_record import attention_modules
from gohgraph.analysis.module_names import block_of, named_blocks, of_layer
from gohgraph.analysis.record import recordable
from gohgraph.common.checks import there
from gohgraph.common.command_line import ArgumentParser
from gohgraph.drawing.attention_patterns import draw_attention
from gohgraph.learning.checkpoints import training_steps
from gohgraph.learning.cli.draw.flags import ABOUT, add_flags, checked
from gohgraph.learning.cli.draw.sources import (
    attended,
    attributed,
    chosen,
    length_of,
    named,
    newest_of,
    of_weights,
    recorded,
    said_of_cut,
    task_of,
    text_of,
)
from gohgraph.learning.cli.draw.views import Seen, write_graph, write_network
from gohgraph.learning.readers.reader import Batch, Inputs, Reader

TABLE = 10


def draw_parser(**options: Any) -> ArgumentParser:
    """Returns the parser of the command; options are of `argparse.ArgumentParser`."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser(description=ABOUT, formatter_class=raw, allow_abbrev=False, **options)
    add_flags(parser)
    return parser


def draw_model(flags: argparse.Namespace) -> None:
    """Writes what --out and --view ask for, and prints the strongest edges."""
    out = checked(flags)
    torch.set_num_threads(flags.threads)
    found = chosen(flags)
    name = "demo" if flags.demo else Path(flags.model).resolve().name
    chose = f", so it is shown --from {found.source}" if flags.source is None else ""
    notes = [*newest_of(found.folder), *([f"{found.why}{chose}"] if found.why else [])]
    if flags.view == "attention":
        printed = _draw_attention(flags, there(found.reader), out, name)
    elif found.source == "graph":
        printed = _draw_graph(flags, there(found.reader), out, name, notes)
    else:
        if found.reader is not None:
            of = attributed(flags, found.reader, name)
        else:
            of = of_weights(there(found.folder), name, not flags.no_learned)
        network, said = of.network, of.said
        notes += of.notes
        patterns = attended(there(found.reader), there(of.inputs)) if flags.attention else None
        write_network(network, flags, out, said if flags.title is None else flags.title, patterns)
        printed = f"{out}: {said}{_said(notes)}\n\n{TABLE} strongest edges\n{_network_table(network.strongest(TABLE))}"
    print(printed)
    if flags.open:
        webbrowser.open(out.resolve().as_uri())


def _draw_attention(flags: argparse.Namespace, reader: Reader, out: Path, name: str) -> str:
    """Draws what heads attend to in one window of the text, and returns what is to be printed."""
    of_layer(attention_modules(reader.model), flags.layer)
    task = task_of(flags, reader)
    heads = attended(reader, task.inputs)
    where = "".join(f", {of} {getattr(flags, of)}" for of in ("layer", "head") if getattr(flags, of) is not None)
    said = f"{name}: attention over {_amount([task.inputs])} of {named(flags, reader)}{where}"
    notes = said_of_cut(flags, reader, task)
    _check_known(reader, text_of(flags, reader), notes)
    draw_attention(heads, flags.layer, flags.head, out, title=said if flags.title is None else flags.title)
    return f"{out}: {said}{_said(notes)}"


def _draw_graph(flags: argparse.Namespace, reader: Reader, out: Path, name: str, notes: list[str]) -> str:
    """Draws the model's own graph and returns what is to be printed."""
    of_layer(named_blocks(map(block_of, recordable(reader.model)[0])), flags.layer)
    if flags.view == "film":
        training_steps(flags.model)
    length, shows_tokens = length_of(flags, reader), flags.view == "tokens" or flags.suffix == ".html"
    if shows_tokens and not reader.strings_known:
        if flags.view == "tokens":
            raise ValueError(
                f"Expected a model that reads one text for --view tokens (got {reader.what}). Do change the view."
            )
        shows_tokens = False
        notes = [*notes, f"{reader.what} has no single text to click on"]

    def batches_of(text: bytes | None) -> list[Batch]:
        return reader.batches(text, length, 1 if shows_tokens else max(1, flags.tokens // length))

    text = text_of(flags, reader)
    batches = batches_of(text)
    _check_token(flags, reader, batches)
    _check_known(reader, text, notes)
    text_said = named(flags, reader)
    said = f"{name}: mean edge weights over {_amount([inputs for inputs, _ in batches])} of {text_said}"
    heads = recorded(reader, reader.model, batches, every_token=shows_tokens, attention=flags.attention)
    importance = head_importance(reader.model, reader.loss, batches)
    edge_importance = edge_attribution(reader.model, reader.loss, batches)
    title = said if flags.title is None else flags.title
    seen = Seen(reader, batches, batches_of, heads, importance, edge_importance, name, title, text_said)
    write_graph(seen, flags, out)
    lines = [f"{out}: {said}{_said([*notes, *reader.notes(batches)])}"]
    lines += [f"\n{TABLE} strongest edges (by the mean of their weight)", _table(seen.network.strongest(TABLE))]
    lines += [f"\n{TABLE} most important edges (by the estimated rise of the loss without them, {reader.unit})"]
    return "\n".join([*lines, _table(seen.network.strongest(TABLE, by="edge_importance"))])


def _amount(given: list[Inputs]) -> str:
    is_images = "pixel_values" in given[0]
    shapes = (inputs["pixel_values"].shape[:1] if is_images else inputs["input_ids"].shape for inputs in given)
    return f"{sum(shape.numel() for shape in shapes):,} {'images' if is_images else 'tokens'}"


def _check_token(flags: argparse.Namespace, reader: Reader, batches: list[Batch]) -> None:
    if flags.token is None:
        return
    count = len(reader.strings(batches[0]))
    if not -count <= flags.token < count:
        raise ValueError(f"Expected a token from 0 to {count - 1} (got {flags.token}). Do choose one of the text.")


def _check_known(reader: Reader, text: bytes | None, notes: list[str]) -> None:
    if text is not None and (unknown := reader.tokens.known(text)[1]):
        notes.append(unknown)


def _said(notes: Iterable[str]) -> str:
    return "".join(f"\n  {note}" for note in notes)


def _named_edges(edges: list[dict[str, Any]]) -> list[str]:
    """The first column of a table: layer.head of sender and receiver, all of one width."""
    names = [f"{edge['sender']} -> {edge['receiver']}" for edge in edges]
    return [f"  {name:<{max(18, *map(len, names), 0)}}" for name in names]


def _network_table(edges: list[dict[str, Any]]) -> str:
    named = zip(_named_edges(edges), edges, strict=True)
    return "\n".join(f"{name} {edge['site']:<10} {edge['mean']:>+10.4g}" for name, edge in named)


def _table(edges: list[dict[str, Any]]) -> str:
    """One line for each edge: layer.head of sender and receiver, where, and its numbers."""
    width = len(max(_named_edges(edges), default="")) - 2
    lines = [f"  {'edge':<{width}} {'site':<10} {'mean':>8} {'sd':>8} {'share':>6} {'importance':>11}"]
    for name, edge in zip(_named_edges(edges), edges, strict=True):
        site = edge["site"] if max(other["round"] for other in edges) == 1 else f"{edge['site']} {edge['round']}"
        lines.append(
            f"{name} {site:<10} {edge['mean']:>+8.4f} {edge['std']:>8.4f} "
            f"{edge['share']:>6.2f} {edge['edge_importance']:>+11.5f}"
        )
    return "\n".join(lines)
