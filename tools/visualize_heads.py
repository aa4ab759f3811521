"""Show the head graph of a language model: pictures, an interactive page, files for Gephi, and its strongest edges.

    python tools/visualize_heads.py runs/demo/goh --out heads.html --open
    python tools/visualize_heads.py runs/demo/goh --view matrix --out heads.png
    python tools/visualize_heads.py runs/demo/goh --view tokens --token 20 --text "heads talk to heads" --out token.svg
    python tools/visualize_heads.py runs/demo/goh --view difference --compare other/model --out change.png
    python tools/visualize_heads.py runs/demo/goh --view film --out film.gif
    python tools/visualize_heads.py converted-llama --text "heads talk to heads" --out llama.html
    python tools/visualize_heads.py --demo --out heads.html
    python tools/visualize_heads.py SmolLM2-135M --text "heads talk to heads" --against "birds sing to birds"
    python tools/visualize_heads.py SmolLM2-135M --from weights --view network --out composition.png

Models of transformers without head graphs are shown by what their heads read of each other: by attribution on a text,
or by weights alone.

The suffix of --out chooses what is written: .png, .svg or .pdf a picture of --view, .html the interactive page, .gif or
.mp4 the film, .graphml, .gexf, .json or .csv the network of all heads.
"""

from __future__ import annotations

import argparse
import sys
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from stock_heads import SOURCES, chosen_source, stock_network
from tqdm import tqdm

import gohgraph as goh
from gohgraph.analysis import edge_attribution, edge_strength, head_importance, pruning_curve, random_scores
from gohgraph.analysis.network_files import GRAPH_SUFFIXES
from gohgraph.analysis.record import Recordings
from gohgraph.common.checks import check_int
from gohgraph.common.command_line import ArgumentParser, run
from gohgraph.common.files import PICTURES, checked_path
from gohgraph.drawing.film import FILM_SUFFIXES
from gohgraph.drawing.panels import of_layer
from gohgraph.learning.checkpoints import load_language_model, training_steps
from gohgraph.learning.data.corpus import PYTHON_DOCS, evaluation_batches, load_corpus
from gohgraph.learning.regimes.demo import demo_model
from gohgraph.learning.regimes.text_models import TextModel, load_text_model, of_bytes

VIEWS = ("circle", "matrix", "network", "tokens", "difference", "pruning", "film")
OF_A_LAYER = ("circle", "matrix", "tokens", "difference")
BATCH, TABLE = 8, 10


@dataclass(frozen=True)
class Seen:
    """What is shown: the model, the text it ran over, and what was recorded and measured there."""

    source: TextModel
    batches: list[Any]
    heads: Recordings
    importance: dict[str, torch.Tensor]
    edge_importance: dict[str, torch.Tensor]
    title: str

    @property
    def network(self) -> goh.HeadNetwork:
        return goh.head_graph_of(self.heads, importance=self.importance, edge_importance=self.edge_importance)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    return run(_parser(), visualize, argv)


def visualize(flags: argparse.Namespace) -> None:
    """Runs the model over the text, writes what --out and --view ask for, and prints its strongest edges."""
    source = chosen_source(flags)
    out = _checked(flags)
    torch.set_num_threads(flags.threads)
    if source != "graph":
        _visualize_stock(flags, source, out)
        return
    source = of_bytes(demo_model()) if flags.demo else load_text_model(flags.checkpoint)
    seen = _seen(source, _batches(source, _text(flags.text, flags.text_file), flags), flags)
    _write(seen, flags, out)
    print(f"{out}: {_mean_title(flags, seen.batches)}")
    print(f"\n{TABLE} strongest edges (by the mean of their weight)\n{_table(seen.network.strongest(TABLE))}")
    print(f"\n{TABLE} most important edges (by the estimated rise of the loss without them, in nats)")
    print(_table(seen.network.strongest(TABLE, by="edge_importance")))
    if flags.open:
        webbrowser.open(out.resolve().as_uri())


def _visualize_stock(flags: argparse.Namespace, source: str, out: Path) -> None:
    """The same for a network by weights or attribution."""
    text = "" if source == "weights" else bytes(_text(flags.text, flags.text_file).tolist()).decode("utf-8", "replace")
    network, said = stock_network(flags, source, text[: 40 * flags.length])
    title = said if flags.title is None else flags.title
    if flags.suffix in GRAPH_SUFFIXES:
        goh.save_head_graph(network, out)
    elif flags.suffix == ".html":
        goh.save_page(network, out, title=title, threshold=flags.threshold)
    else:
        goh.draw_network(network, out, title=title, threshold=flags.threshold)
    print(f"{out}: {said}\n\n{TABLE} strongest edges")
    for edge in network.strongest(TABLE):
        print(f"  {edge['sender'] + ' -> ' + edge['receiver']:<18} {edge['site']:<10} {edge['mean']:>+9.4f}")
    if flags.open:
        webbrowser.open(out.resolve().as_uri())


def _parser() -> ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("checkpoint", nargs="?", help="folder of save_pretrained, save_converted, transformers, a run, or a checkpoint")
    add("--from", dest="source", choices=SOURCES, help="head graphs, weights, or attribution (default: what it has)")
    add("--against", help="attribution: another text of as many tokens or its file, or mean or zero (default: zero)")
    add("--target", help="attribution: a word after the text, or 'RIGHT|WRONG' (default: every next token)")
    add("--tokenizer", metavar="FOLDER", help="the tokenizer of a model whose folder has none")
    add("--demo", action="store_true", help="needs no checkpoint: trains a small model for half a minute")
    add("--out", default="heads.html", help="the file to write (default: %(default)s)")
    add("--view", choices=VIEWS, help="what a picture shows (default: circle)")
    add("--layer", type=int, help=f"this layer alone ({', '.join(OF_A_LAYER)})")
    add("--text", help="the text to run (default: the built-in corpus, validation part)")
    add("--text-file", metavar="FILE", help="a file with the text to run")
    add("--token", type=int, help="number of the token to show (tokens; default: 0)")
    add("--threshold", type=float, default=0.05, help="share of the strongest edge that weaker ones fall below")
    add("--compare", metavar="OTHER", help="difference from this one: a checkpoint, or a file with another text")
    add("--title", help="a line above the picture; '' for none (default: checkpoint and tokens)")
    add("--tokens", type=int, default=2048, help="tokens to run, in windows spread over the text (%(default)s)")
    add("--length", type=int, default=128, help="tokens of a window, and of the text shown (%(default)s)")
    add("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    add("--open", action="store_true", help="open the file when it is written")
    return parser


def _checked(flags: argparse.Namespace) -> Path:
    """Where to write, once the flags fit each other."""
    out = checked_path(flags.out, (*PICTURES, ".html", *FILM_SUFFIXES, *GRAPH_SUFFIXES))
    flags.suffix = out.suffix.lower()
    kinds = FILM_SUFFIXES if flags.view == "film" else PICTURES
    if flags.view is not None and flags.suffix not in kinds:
        raise ValueError(f"Expected --out of {', '.join(kinds)} for --view {flags.view} (got {out}). Do change it.")
    if flags.view is None:
        flags.view = "film" if flags.suffix in FILM_SUFFIXES else "circle" if flags.suffix in PICTURES else None
    for name in ("tokens", "length", "threads"):
        check_int(f"--{name}", getattr(flags, name), low=1)
    for name, views in (("layer", OF_A_LAYER), ("token", ("tokens",)), ("compare", ("difference",))):
        if getattr(flags, name) is not None and flags.view not in views:
            raise ValueError(f"Expected --{name} with --view {' or '.join(views)} (got {flags.view}). Do drop it.")
    if flags.view == "difference" and flags.compare is None:
        raise ValueError("Expected --compare for --view difference (got none). Do name a checkpoint or a text.")
    if (flags.checkpoint is None) != flags.demo:
        raise ValueError(f"Expected a checkpoint or --demo (got {'both' if flags.demo else 'neither'}). Do pass one.")
    if flags.text is not None and flags.text_file is not None:
        raise ValueError("Expected --text or --text-file (got both). Do drop one.")
    if flags.view == "film" and flags.demo:
        raise ValueError("Expected a run folder for a film (got --demo). Do train one with --keep-checkpoints.")
    return out


def _text(words: str | None, file: str | None) -> torch.Tensor:
    """The bytes to run, uint8 `[N]`."""
    if words is None and file is None:
        return load_corpus(PYTHON_DOCS).validation
    data = words.encode() if file is None else Path(file).read_bytes()
    if len(data) < 2:
        raise ValueError(f"Expected a text of at least two bytes (got {len(data)}). Do pass a longer one.")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _batches(source: TextModel, text: torch.Tensor, flags: argparse.Namespace) -> list[Any]:
    """Windows of the text and what follows each token, `[B, T]` both; the first alone where tokens are shown."""
    tokens = source.encode(text)
    if source.longest is not None and flags.length > source.longest:
        raise ValueError(
            f"Expected --length up to the model's max_length {source.longest} (got {flags.length}). Do lower it."
        )
    length = min(flags.length, len(tokens) - 1)
    if length < 1:
        raise ValueError(f"Expected a text of at least two tokens (got {len(tokens)}). Do pass a longer one.")
    limit = 1 if _shows_tokens(flags) else max(1, flags.tokens // length)
    return list(evaluation_batches(tokens, batch_size=BATCH, length=length, limit=limit))


def _shows_tokens(flags: argparse.Namespace) -> bool:
    return flags.view == "tokens" or flags.suffix == ".html"


def _seen(source: TextModel, batches: list[Any], flags: argparse.Namespace) -> Seen:
    title = _mean_title(flags, batches) if flags.title is None else flags.title
    heads = _recorded(source, batches, every_token=_shows_tokens(flags))
    importance = head_importance(source.model, source.loss, batches)
    return Seen(source, batches, heads, importance, edge_attribution(source.model, source.loss, batches), title)


def _recorded(source: TextModel, batches: list[Any], every_token: bool = False) -> Recordings:
    """What every head graph did; `record` refuses a model without one."""
    strings = source.strings(batches[0][0][0]) if every_token else None
    with goh.record(source.model, every_token=every_token, token_strings=strings) as heads, torch.inference_mode():
        for batch in batches:
            source.loss(source.model, batch)
    return heads


def _mean_title(flags: argparse.Namespace, batches: list[Any]) -> str:
    return f"{_name(flags)}: mean edge weights over {sum(inputs.numel() for inputs, _ in batches):,} tokens"


def _name(flags: argparse.Namespace) -> str:
    return "demo" if flags.demo else Path(flags.checkpoint).resolve().name


def _write(seen: Seen, flags: argparse.Namespace, out: Path) -> None:
    if flags.suffix in GRAPH_SUFFIXES:
        goh.save_head_graph(seen.network, out)
    elif flags.suffix == ".html":
        importances = {"importance": seen.importance, "edge_importance": seen.edge_importance}
        goh.save_page(seen.heads, out, title=seen.title, threshold=flags.threshold, **importances)
    else:
        DRAWERS[flags.view](seen, flags, out)


def _of_layer(heads: Recordings, layer: int | None) -> Recordings:
    return heads if layer is None else Recordings(of_layer(heads, layer), heads.token_strings)


def _circle(seen: Seen, flags: argparse.Namespace, out: Path) -> None:
    goh.draw(_of_layer(seen.heads, flags.layer), out, title=seen.title, threshold=flags.threshold)


def _matrix(seen: Seen, flags: argparse.Namespace, out: Path) -> None:
    goh.draw_matrices(_of_layer(seen.heads, flags.layer), out, title=seen.title)


def _network(seen: Seen, flags: argparse.Namespace, out: Path) -> None:
    goh.draw_network(seen.network, out, title=seen.title, threshold=flags.threshold)


def _tokens(seen: Seen, flags: argparse.Namespace, out: Path) -> None:
    title = _name(flags) if flags.title is None else flags.title
    heads = _of_layer(seen.heads, flags.layer)
    goh.draw_tokens(heads, flags.token or 0, out, title=title, threshold=flags.threshold)


def _difference(seen: Seen, flags: argparse.Namespace, out: Path) -> None:
    other = Path(flags.compare)
    if other.is_file():
        batches = _batches(seen.source, _text(None, str(other)), flags)
        first, of = _recorded(seen.source, batches), "the text run"
    else:
        first, of = _recorded(load_text_model(other), seen.batches), _name(flags)
    title = f"{of} minus {other.resolve().name}" if flags.title is None else flags.title
    first, second = (_of_layer(heads, flags.layer) for heads in (first, seen.heads))
    goh.draw_difference(first, second, out, title=title, threshold=flags.threshold)


def _pruning(seen: Seen, flags: argparse.Namespace, out: Path) -> None:
    orders = {
        "by attribution": seen.edge_importance,
        "by strength": edge_strength(seen.heads),
        "random": random_scores(seen.source.model),
    }
    curves = pruning_curve(seen.source.model, seen.source.loss, seen.batches, orders)
    title = f"{_name(flags)}: loss without the least edges" if flags.title is None else flags.title
    goh.draw_pruning({name: [curve] for name, curve in curves.items()}, out, title=title)


def _film(seen: Seen, flags: argparse.Namespace, out: Path) -> None:
    steps = tqdm(training_steps(flags.checkpoint).items(), desc="film", unit="checkpoint", disable=None, leave=False)
    frames = [(f"step {step:,}", _recorded(of_bytes(load_language_model(path)), seen.batches)) for step, path in steps]
    title = _name(flags) if flags.title is None else flags.title
    goh.save_film(frames, out, title=title, threshold=flags.threshold)


DRAWERS: dict[str, Callable[[Seen, argparse.Namespace, Path], None]] = {
    "circle": _circle,
    "matrix": _matrix,
    "network": _network,
    "tokens": _tokens,
    "difference": _difference,
    "pruning": _pruning,
    "film": _film,
}


def _table(edges: list[dict[str, Any]]) -> str:
    """One line for each edge: layer.head of sender and receiver, where, and its numbers."""
    lines = [f"  {'edge':<18} {'site':<10} {'mean':>8} {'sd':>8} {'share':>6} {'importance':>11}"]
    for edge in edges:
        site = edge["site"] if max(other["round"] for other in edges) == 1 else f"{edge['site']} {edge['round']}"
        lines.append(
            f"  {edge['sender'] + ' -> ' + edge['receiver']:<18} {site:<10} {edge['mean']:>+8.4f} {edge['std']:>8.4f} "
            f"{edge['share']:>6.2f} {edge['edge_importance']:>+11.5f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
