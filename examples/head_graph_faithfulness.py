"""How much of what trained head graphs do is carried by how few of their edges.

    python examples/train_language_model.py --recipe modern --run runs/heads --steps 300
    python examples/head_graph_faithfulness.py runs/heads

All edges of a model's head graphs are worth something for the text it was trained on: the log probability of the next
byte falls when their messages are those of another text, their mean over texts, or none. On other windows of the text
the edges that are worth most are kept and all others are patched: f is 1 for the whole model, 0 without messages.
Beside that order stand the edges' strength (root mean square of the weight), the size of the mean weight, and random
edges. Prints a table of Markdown with intervals over windows, and writes faithfulness.json and .png to the run folder.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

import gohgraph as goh
from gohgraph.analysis.metrics import log_probability
from gohgraph.common.checks import check_choice, check_int
from gohgraph.common.command_line import ArgumentParser, run
from gohgraph.common.files import write_text_whole
from gohgraph.learning.checkpoints import load_language_model
from gohgraph.learning.data.corpus import PYTHON_DOCS, evaluation_batches, load_corpus

AGAINST = ("zero", "mean", "other")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    return run(_parser(), study, argv)


def study(flags: argparse.Namespace) -> None:
    """Measures a run's model, prints the table and draws the curves."""
    for name in ("windows", "length", "random", "threads"):
        check_int(f"--{name}", getattr(flags, name), low=2 if name == "length" else 1)
    check_choice("--against", flags.against, AGAINST)
    torch.set_num_threads(flags.threads)
    model = load_language_model(flags.run)
    text = load_corpus(flags.data).validation
    known, held_out, other = (windows(part, flags) for part in text.chunk(3))
    against = other if flags.against == "other" else flags.against
    with goh.record(model) as heads, torch.no_grad():
        model(known)
    whole = goh.attribution_graph(model, known, against=against, metric=log_probability(known))
    network = whole.only(torch.tensor([graph in heads for graph in whole.graph]))
    measured = goh.faithfulness(
        model, network, held_out, against=against, metric=log_probability(held_out),
        beside=_orders(network, heads), random=flags.random,
    )  # fmt: skip
    print(
        f"{network.num_edges:,} edges of {len(heads)} head graphs; log probability of a byte, {flags.windows} windows "
        f"of {flags.length}: {measured.everything.mean():.4f}, without messages ({flags.against}) "
        f"{measured.nothing.mean():.4f}\n"
    )
    print(measured.table())
    results = {name: {"f": measured.curve(name), "cpr": measured.cpr(name), "cmd": measured.cmd(name)}
               for name in measured.values}  # fmt: skip
    write_text_whole(flags.run / "faithfulness.json", json.dumps({"flags": _told(flags), **results}, indent=1))
    goh.draw_faithfulness(measured, flags.run / "faithfulness.png")


def windows(text: Tensor, flags: argparse.Namespace) -> Tensor:
    """So many windows `[B, T]` of a text, evenly spread."""
    batches = evaluation_batches(text, batch_size=flags.windows, length=flags.length, limit=flags.windows)
    return next(iter(batches))[0]


def _orders(network: goh.HeadNetwork, heads: goh.analysis.recording.Recordings) -> dict[str, goh.HeadNetwork]:
    """The same edges with their strength, and with their mean weight."""
    strength = torch.cat([recording.strength for recording in heads.values()])
    mean = torch.cat([recording.mean.abs().mean(dim=0) for recording in heads.values()])
    orders = {}
    for name, values in {"strength": strength, "mean weight": mean}.items():
        orders[name] = copy.copy(network)
        orders[name].mean = values
    return orders


def _told(flags: argparse.Namespace) -> dict[str, object]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(flags).items()}


def _parser() -> ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("run", type=Path, help="run folder of a language model with head graphs")
    add("--data", default=PYTHON_DOCS, help="text it is asked about (default: %(default)s)")
    add("--against", default="zero", help=f"of {', '.join(AGAINST)}: what patched messages are (default: %(default)s)")
    add("--windows", type=int, default=20, help="of text, for edges and again for f (default: %(default)s)")
    add("--length", type=int, default=64, help="bytes of a window (default: %(default)s)")
    add("--random", type=int, default=2, help="random orders of edges (default: %(default)s)")
    add("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
