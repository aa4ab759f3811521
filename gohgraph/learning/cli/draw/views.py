"""What `gohgraph draw` makes of a recorded model: one function for each view."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from tqdm import tqdm

from gohgraph.analysis import edge_strength, pruning_curve, random_scores
from gohgraph.analysis.network_files import GRAPH_SUFFIXES, save_head_graph
from gohgraph.analysis.recording import Recordings
from gohgraph.common.checks import there
from gohgraph.common.hub import local_folder
from gohgraph.drawing.circles import draw
from gohgraph.drawing.difference import draw_difference
from gohgraph.drawing.film import save_film
from gohgraph.drawing.layered import draw_network
from gohgraph.drawing.matrices import draw_matrices
from gohgraph.drawing.page import save_page
from gohgraph.drawing.panels import of_one_layer
from gohgraph.drawing.pruning import draw_pruning
from gohgraph.drawing.tokens import draw_tokens
from gohgraph.learning.checkpoints import load_own_model, training_steps
from gohgraph.learning.cli.draw.sources import recorded
from gohgraph.learning.readers.loading import load_reader
from gohgraph.learning.readers.reader import Batch, Reader

if TYPE_CHECKING:
    from gohgraph.analysis.network import HeadNetwork


@dataclass(frozen=True)
class Seen:
    """What is shown: the model and how it reads, the batches it ran, and what was recorded and measured there."""

    reader: Reader
    batches: list[Batch]
    other: Callable[[bytes], list[Batch]]
    heads: Recordings
    importance: dict[str, Tensor]
    edge_importance: dict[str, Tensor]
    name: str
    title: str
    text: str

    @property
    def network(self) -> HeadNetwork:
        from gohgraph.analysis.network import head_graph_of

        return head_graph_of(self.heads, importance=self.importance, edge_importance=self.edge_importance)


def write_graph(seen: Seen, flags: argparse.Namespace, out: Path) -> None:
    """Writes a model's own head graph."""
    if flags.suffix in GRAPH_SUFFIXES:
        save_head_graph(seen.network, out)
    elif flags.suffix == ".html":
        save_page(
            seen.heads,
            out,
            title=seen.title,
            threshold=flags.threshold,
            limit=flags.limit,
            importance=seen.importance,
            edge_importance=seen.edge_importance,
        )
    else:
        DRAWERS[flags.view](seen, flags, out)


def write_network(
    network: HeadNetwork, flags: argparse.Namespace, out: Path, title: str, patterns: Recordings | None = None
) -> None:  # fmt: skip
    """Writes a network by attribution or by weights; a page with what its heads attend to, where that was recorded."""
    if flags.suffix in GRAPH_SUFFIXES:
        save_head_graph(network, out)
    elif flags.suffix == ".html":
        save_page(network, out, title=title, patterns=patterns, **_scale(flags))
    else:
        draw_network(network, out, title=title, **_scale(flags))


def _scale(flags: argparse.Namespace) -> dict[str, Any]:
    return {"threshold": flags.threshold, "limit": flags.limit}


def _titled(flags: argparse.Namespace, title: str) -> str:
    return title if flags.title is None else flags.title


def _of_layer(heads: Recordings, layer: int | str | None) -> Recordings:
    return heads if layer is None else Recordings(of_one_layer(heads, layer), heads.token_strings)


def _circle(seen: Seen, flags: argparse.Namespace, out: Path) -> None:
    draw(_of_layer(seen.heads, flags.layer), out, title=seen.title, **_scale(flags))


def _matrix(seen: Seen, flags: argparse.Namespace, out: Path) -> None:
    draw_matrices(_of_layer(seen.heads, flags.layer), out, title=seen.title, **_scale(flags))


def _network(seen: Seen, flags: argparse.Namespace, out: Path) -> None:
    draw_network(seen.network, out, title=seen.title, **_scale(flags))


def _tokens(seen: Seen, flags: argparse.Namespace, out: Path) -> None:
    heads, token = _of_layer(seen.heads, flags.layer), flags.token or 0
    title = _titled(flags, f"{seen.name}: token {token}, {there(heads.token_strings)[token]!r}, of {seen.text}")
    draw_tokens(heads, token, out, title=title, **_scale(flags))


def _difference(seen: Seen, flags: argparse.Namespace, out: Path) -> None:
    other = Path(flags.compare)
    if other.is_file():
        first, of = recorded(seen.reader, seen.reader.model, seen.other(other.read_bytes())), "the text run"
    else:
        first, of = recorded(seen.reader, load_reader(local_folder(flags.compare, {})).model, seen.batches), seen.name
    title = _titled(flags, f"{of} minus {other.resolve().name}")
    first, second = (_of_layer(heads, flags.layer) for heads in (first, seen.heads))
    draw_difference(first, second, out, title=title, **_scale(flags))


def _pruning(seen: Seen, flags: argparse.Namespace, out: Path) -> None:
    model = seen.reader.model
    orders = {
        "by attribution": seen.edge_importance,
        "by strength": edge_strength(seen.heads),
        "random": random_scores(model),
    }
    curves = pruning_curve(model, seen.reader.loss, seen.batches, orders)
    title = _titled(flags, f"{seen.name}: loss without the least edges")
    draw_pruning({name: [curve] for name, curve in curves.items()}, out, title=title)


def _film(seen: Seen, flags: argparse.Namespace, out: Path) -> None:
    steps = tqdm(training_steps(flags.model).items(), desc="film", unit="checkpoint", disable=None, leave=False)
    frames = [(f"step {step:,}", recorded(seen.reader, load_own_model(path), seen.batches)) for step, path in steps]
    save_film(frames, out, title=_titled(flags, seen.name), **_scale(flags))


DRAWERS: dict[str, Callable[[Seen, argparse.Namespace, Path], None]] = {
    "circle": _circle,
    "matrix": _matrix,
    "network": _network,
    "tokens": _tokens,
    "difference": _difference,
    "pruning": _pruning,
    "film": _film,
}
