"""The flags of `gohgraph draw`, and what of them can be checked before anything is read."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from gohgraph.analysis.network_files import GRAPH_SUFFIXES
from gohgraph.common.checks import check_int, check_number
from gohgraph.common.files import PICTURES, checked_path
from gohgraph.drawing.circles import check_threshold
from gohgraph.drawing.film import FILM_SUFFIXES

ABOUT = """Show the head graph of a model: pictures, an interactive page, files for Gephi, and its strongest edges.

    gohgraph draw runs/demo/goh --out heads.html --open
    gohgraph draw runs/demo/goh --view matrix --out heads.png
    gohgraph draw runs/demo/goh --view tokens --token 20 --text "heads talk to heads" --out token.svg
    gohgraph draw runs/demo/goh --view difference --compare other/model --out change.png
    gohgraph draw runs/demo/goh --view film --out film.gif
    gohgraph draw converted-llama --text "heads talk to heads" --out llama.html
    gohgraph draw HuggingFaceTB/SmolLM2-135M --text "heads talk to heads" --against "birds sing to birds"
    gohgraph draw SmolLM2-135M --from weights --view network --out composition.png
    gohgraph draw SmolLM2-135M --attention --layer 5 --head 3 --text "heads talk to heads" --out pattern.png
    gohgraph draw google-bert/bert-base-uncased --text "heads talk to [MASK]" --target heads
    gohgraph draw --demo --out heads.html

A model is a run of gohgraph (language models, classifiers, translation), a converted model, or any folder or hub name
of transformers. Models without head graphs, or with untrained ones, are shown by what their heads read of each other:
by attribution on a text, or by weights alone.

The suffix of --out chooses what is written: .png, .svg or .pdf a picture of --view, .html the interactive page, .gif or
.mp4 the film, .graphml, .gexf, .json or .csv the network of all heads."""
SOURCES = ("graph", "weights", "attribution")
VIEWS = ("circle", "matrix", "network", "tokens", "attention", "difference", "pruning", "film")
OF_A_LAYER = ("circle", "matrix", "tokens", "attention", "difference")
THRESHOLD, LENGTH = 0.05, 128


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags to a parser."""
    add = parser.add_argument
    add("model", nargs="?", help="a run folder or checkpoint, a converted model, a folder or hub name of transformers")
    add("--from", dest="source", choices=SOURCES, help="head graphs, weights, or attribution (default: what it has)")
    add("--against", help="attribution: a text as long or its file, zero (default), or mean (of a run's examples)")
    add("--target", help="attribution: a word, 'RIGHT|WRONG', a class or a translation (default: what it predicts)")
    add("--tokenizer", metavar="FOLDER", help="the tokenizer, where the model's folder has none (or a hub name)")
    add("--demo", action="store_true", help="needs no model: trains a small one for half a minute")
    add("--out", help="the file to write (default: heads.html, without bokeh heads.png)")
    add("--view", choices=VIEWS, help="what a picture shows (default: circle)")
    add("--layer", type=_layer, help=f"this layer, by its number or title, alone ({', '.join(OF_A_LAYER)})")
    add("--attention", action="store_true", help="what heads attend to: a picture of that, or a page that has it too")
    add("--head", type=int, help="this head alone, of --layer (attention)")
    add("--no-learned", action="store_true", help="weights, attribution: edges of head graphs count as parts of heads")
    add("--text", help="the text to run (default: of the run, or the built-in corpus, validation part)")
    add("--text-file", metavar="FILE", help="a file with the text to run")
    add("--token", type=int, help="number of the token to show (tokens; default: 0)")
    add("--threshold", type=float, help=f"edges below this share of the strongest hide ({THRESHOLD}; pages: 300 edges)")
    add("--limit", type=float, help="end of the colour scale, to compare pictures (default: above the strongest edge)")
    add("--compare", metavar="OTHER", help="difference from this one: a model, or a file with another text")
    add("--title", help="a line above the picture; '' for none (default: model and tokens)")
    add("--tokens", type=int, default=2048, help="tokens to run, in windows spread over the text (%(default)s)")
    add("--length", type=int, help=f"tokens of a window, and of the text shown (default: up to {LENGTH})")
    add("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    add("--open", action="store_true", help="open the file when it is written")


def _layer(text: str) -> int | str:
    """A layer's number or, where several layers have it, the title of an attention block."""
    return int(text) if text.lstrip("-").isdecimal() else text


def checked(flags: argparse.Namespace) -> Path:
    """Returns where to write, once the flags fit each other; fills in `suffix`, and the view of a picture."""
    if flags.out is None:
        flags.out = "heads.html" if find_spec("bokeh") is not None and flags.view is None else "heads.png"
    out = checked_path(flags.out, (*PICTURES, ".html", *FILM_SUFFIXES, *GRAPH_SUFFIXES))
    flags.suffix = out.suffix.lower()
    kinds = FILM_SUFFIXES if flags.view == "film" else PICTURES
    if flags.view is not None and flags.suffix not in kinds:
        raise ValueError(f"Expected --out of {', '.join(kinds)} for --view {flags.view} (got {out}). Do change it.")
    flags.view_given = flags.view
    _choose_view(flags, out)
    _check_numbers(flags)
    of_view = {"layer": OF_A_LAYER, "token": ("tokens",), "compare": ("difference",), "head": ("attention",)}
    for name, views in of_view.items():
        if getattr(flags, name) is not None and flags.view not in views:
            raise ValueError(f"Expected --{name} with --view {' or '.join(views)} (got {flags.view}). Do drop it.")
    if flags.head is not None and flags.layer is None:
        raise ValueError(f"Expected --layer with --head {flags.head} (got --layer None). Do name the head's layer.")
    if flags.view == "difference" and flags.compare is None:
        raise ValueError("Expected --compare for --view difference (got --compare None). Do name a model or a text.")
    if (flags.model is None) != flags.demo:
        raise ValueError(f"Expected a model or --demo (got {'both' if flags.demo else 'neither'}). Do pass one.")
    if flags.text is not None and flags.text_file is not None:
        raise ValueError("Expected --text or --text-file (got both). Do drop one.")
    if flags.view == "film" and flags.demo:
        raise ValueError("Expected a run folder for a film (got --demo). Do train one with --keep-checkpoints.")
    if flags.source is not None:
        check_source(flags, flags.source)
    return out


def _choose_view(flags: argparse.Namespace, out: Path) -> None:
    """Fills in the view of a picture, by its suffix and --attention."""
    if flags.attention and flags.view not in (None, "attention"):
        raise ValueError(f"Expected no --view {flags.view} with --attention, a view itself (got both). Do drop one.")
    if flags.attention and flags.suffix not in (*PICTURES, ".html"):
        raise ValueError(f"Expected a picture or a page for --attention (got {out}). Do change --out.")
    flags.attention = flags.attention or flags.view == "attention"
    if flags.view is None and flags.suffix in PICTURES:
        flags.view = "attention" if flags.attention else "circle"
    elif flags.view is None and flags.suffix in FILM_SUFFIXES:
        flags.view = "film"


def check_source(flags: argparse.Namespace, source: str) -> None:
    """Raises `ValueError` for flags that do not go with where the network comes from."""
    if flags.demo and source != "graph":
        raise ValueError(f"Expected --from graph for --demo, which has one (got {source}). Do drop one of them.")
    for name in ("against", "target"):
        if getattr(flags, name) is not None and source != "attribution":
            raise ValueError(f"Expected --{name} with --from attribution (got {source}). Do drop it.")
    if flags.no_learned and source == "graph":
        raise ValueError("Expected --no-learned with --from weights or attribution (got graph). Do drop it.")
    if source == "weights":
        if flags.attention:
            raise ValueError(
                "Expected --attention of a model that reads a text (got --from weights, which runs none). Do drop one."
            )
        for name in ("text", "text_file", "tokenizer"):
            if getattr(flags, name) is not None:
                flag = "--" + name.replace("_", "-")
                got = getattr(flags, name)
                raise ValueError(f"Expected no {flag} for --from weights (got {got}). Do drop it, or use attribution.")
    if source != "graph" and flags.view_given not in (None, "network", "attention"):
        raise ValueError(
            f"Expected --view network or attention for --from {source} (got {flags.view}). Do change it."
        )
    if source != "graph" and flags.layer is not None and flags.view != "attention":
        raise ValueError(
            f"Expected --layer with --attention for --from {source}, whose edges cross layers (got --layer "
            f"{flags.layer}). Do drop it; a page (--out heads.html) chooses layers."
        )
    if source != "graph" and flags.view == "film":
        raise ValueError(f"Expected a picture, a page or a file for --from {source} (got a film). Do change --out.")


def _check_numbers(flags: argparse.Namespace) -> None:
    for name in ("tokens", "length", "threads"):
        if getattr(flags, name) is not None:
            check_int(f"--{name}", getattr(flags, name), low=1)
    if flags.threshold is not None:
        check_threshold(flags.threshold)
    if flags.limit is not None:
        check_number("--limit", flags.limit, above=0)
    has_no_edges = flags.view in ("pruning", "attention")
    for name in ("threshold", "limit"):
        value = getattr(flags, name)
        if value is not None and (has_no_edges or flags.suffix in GRAPH_SUFFIXES):
            what = f"--view {flags.view}" if has_no_edges else flags.suffix
            raise ValueError(f"Expected no --{name} for {what}, which it would not change (got {value}). Do drop it.")
    # A page begins with as many edges as can be read.
    if flags.threshold is None and flags.suffix != ".html":
        flags.threshold = THRESHOLD
