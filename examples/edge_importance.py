"""Asks which edges of trained head graphs matter: what orders them as ablation does, and the loss without the others.

    python examples/train_language_model.py --run runs/heads --seeds 0 1 2 --steps 1500
    python examples/edge_importance.py runs/heads

Edges are measured on windows of the validation text and pruned models on others. Prints tables of Markdown, and writes
importance.json and pruning.png to the run folder. A finished seed is not measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gohgraph import analysis, draw_pruning, record
from gohgraph.common.command_line import ArgumentParser, fill_in, run
from gohgraph.common.files import read_json
from gohgraph.common.tables import markdown_table, mean_and_deviation
from gohgraph.learning.checkpoints import load_language_model
from gohgraph.learning.data.corpus import PYTHON_DOCS, evaluation_batches, load_corpus
from gohgraph.learning.regimes.language import next_token_output
from gohgraph.learning.run_folder import write_text

KEEP = (1.0, 0.8, 0.6, 0.4, 0.3, 0.2, 0.1, 0.05, 0.0)
TABLE = (1.0, 0.8, 0.6, 0.4, 0.2, 0.1, 0.0)
RANDOM_ORDERS = 3
FULL, SMOKE = {"windows": 32, "length": 128}, {"windows": 2, "length": 32}


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    return run(_parser(), measure, argv)


def measure(flags: argparse.Namespace) -> None:
    """Measures every seed of a run, prints the tables and draws the curves."""
    fill_in(flags, SMOKE if flags.smoke else FULL)
    if flags.threads < 1 or flags.windows < 1 or flags.length < 1:
        raise ValueError("Expected --threads, --windows and --length of at least 1 (got less). Do raise them.")
    torch.set_num_threads(flags.threads)
    folder = Path(flags.run)
    seeds = sorted(folder.glob("seed-*")) or [folder]
    results = []
    for seed in seeds:
        file = seed / f"importance{_mark(flags)}.json"
        if not file.is_file():
            write_text(file, json.dumps(_measure(seed, flags), indent=1))
        results.append(read_json(file, "delete it"))
        if results[-1]["windows"] != [flags.windows, flags.length]:
            raise ValueError(
                f"Expected --windows and --length as in {file} (got others). Do repeat them, or delete that file."
            )
    about = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}, {flags.windows} windows of {flags.length} bytes"
    print(_agreement_table(results))
    print(f"order of all edges against that by ablation, 1 is the same; {about}")
    print(_pruning_table(results))
    print(f"loss in nats a byte on other windows, by the share of edges kept; {about}")
    if flags.smoke:
        print("too few windows to tell anything: leave out --smoke")
    shares = [share for result in results for share in result["static_shares"]]
    print(f"static share of edges: {min(shares):.2f} to {max(shares):.2f} by layer and seed")
    curves = {name: [curve for result in results for curve in result["curves"][name]] for name in results[0]["curves"]}
    picture = folder / f"pruning{_mark(flags)}.png"
    draw_pruning(curves, picture, title=f"loss without the least edges, {len(seeds)} seeds")
    print(f"picture: {picture}")


def _mark(flags: argparse.Namespace) -> str:
    """What stands in the names of files that no measurement goes on from."""
    return "-smoke" if flags.smoke else ""


def _parser() -> ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("run", help="the run folder of one seed or several")
    parser.add_argument("--windows", type=int, help=f"of text, for edges, and again for pruning ({FULL['windows']})")
    parser.add_argument("--length", type=int, help=f"bytes of a window (default: {FULL['length']})")
    parser.add_argument("--smoke", action="store_true", help="a few short windows, to see that it runs")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    return parser


@cache
def _halves() -> tuple[Tensor, Tensor]:
    """The text that edges are measured on, and that for pruned models."""
    text = load_corpus(PYTHON_DOCS).validation
    return text[: len(text) // 2], text[len(text) // 2 :]


def _measure(folder: Path, flags: argparse.Namespace) -> dict[str, Any]:
    """How every order agrees with ablation, and its pruning curves."""
    model = load_language_model(folder)
    windows = {"batch_size": 32, "length": flags.length, "limit": flags.windows}
    known, held_out = (list(evaluation_batches(half, **windows)) for half in _halves())
    with record(model) as heads, torch.no_grad():
        for inputs, _ in known:
            model(inputs)
    ablation = analysis.edge_ablation(model, next_token_output, known)
    orders = {
        "ablation": ablation,
        "attribution, halfway": analysis.edge_attribution(model, next_token_output, known),
        "attribution, at the weights": analysis.edge_attribution(model, next_token_output, known, at=0.0),
        "strength": analysis.edge_strength(heads),
        "size of the mean": {name: one.mean.abs().mean(dim=0) for name, one in heads.items()},
    }
    random = {f"random {seed}": analysis.random_scores(model, seed) for seed in range(RANDOM_ORDERS)}
    everything = {**orders, **random}
    curves = analysis.pruning_curve(model, next_token_output, held_out, everything, KEEP)
    return {
        "windows": [flags.windows, flags.length],
        "rank_agreement": {name: analysis.rank_agreement(scores, ablation) for name, scores in everything.items()},
        "static_shares": [found.static_share for found in analysis.measures(heads).values()],
        "curves": {name: [curves[name]] for name in orders} | {"random": [curves[name] for name in random]},
    }


def _agreement_table(results: list[dict[str, Any]]) -> str:
    lines = [["order of edges", "rank correlation with ablation"]]
    for name in results[0]["rank_agreement"]:
        if name != "ablation":
            lines.append([name, mean_and_deviation([result["rank_agreement"][name] for result in results], 2)])
    return "\n" + markdown_table(lines)


def _pruning_table(results: list[dict[str, Any]]) -> str:
    lines = [["edges kept", *(f"{share:.0%}" for share in TABLE)]]
    for name in results[0]["curves"]:
        cells = []
        for share in TABLE:
            seeds = [[dict(map(tuple, curve))[share] for curve in result["curves"][name]] for result in results]
            cells.append(mean_and_deviation([statistics.mean(losses) for losses in seeds]))
        lines.append([name, *cells])
    return "\n" + markdown_table(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
