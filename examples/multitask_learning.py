"""Trains on five kinds of text at once: a head graph for each, one for all, and separate models.

    python examples/multitask_learning.py
    python examples/multitask_learning.py --methods graph graph-per-task --temperature 5 --seeds 0 1 2
    python examples/multitask_learning.py --learning-rates 2e-3 4e-3 8e-3 --seeds 0 1 2

The tasks are Python's documentation and sources, C++ headers, Unicode names and licences. "plain" and "graph" are one
model for all tasks, without and with a head graph, widened to as many parameters as "graph-per-task" has; of the
models "...-per-task" all share the heads, and each task owns its head graph, low-rank updates of as many parameters,
or its read-out; "separate" is a model for every task, with a fifth of the steps each. All see as many bytes. The first
command takes five minutes on one thread. Expected (docs/results.md): mean losses of 1.87 with a head graph for each
task, 1.89 with LoRA, 1.99 for plain attention, 2.09 for separate models.

The run folder holds a folder for every model with its log and losses.json, curves.png and table.md. Ctrl-C stops it;
the same command with --resume goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

from gohgraph import HeadGraphConfig, LanguageModel, TransformerConfig
from gohgraph.common.command_line import ArgumentParser, run
from gohgraph.common.tables import markdown_table, mean_and_deviation
from gohgraph.drawing import draw_curves
from gohgraph.learning.cli.experiment import (
    add_run_flags,
    add_size_flags,
    add_training_flags,
    can_resume,
    fill_sizes,
    open_folder,
    resumable,
    train_config,
)
from gohgraph.learning.contests.contest import Contest, add_rate_flags
from gohgraph.learning.contests.matching import count_parameters, match_parameters
from gohgraph.learning.data.corpus import Corpus, sample_batch
from gohgraph.learning.data.domains import DOMAINS, load_domain
from gohgraph.learning.loop import Training
from gohgraph.learning.regimes.adapters import TaskAdapters
from gohgraph.learning.regimes.language import VOCAB_SIZE, window_losses
from gohgraph.learning.regimes.low_rank import add_low_rank, matching_rank
from gohgraph.learning.regimes.multitask import TaskSampler, task_output
from gohgraph.learning.run_folder import write_text

PER_TASK = ("graph-per-task", "lora-per-task", "read-out-per-task")
METHODS = ("plain", "graph", *PER_TASK, "separate")
SIZES = ("d_model", "num_heads", "num_layers", "d_ff", "length", "batch_size", "steps", "windows")
FULL = dict(zip(SIZES, (64, 8, 3, 256, 64, 8, 1000, 64), strict=True))
SMOKE = dict(zip(SIZES, (16, 4, 1, 8, 16, 3, 10, 4), strict=True))


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A model to train.

    Args:
        method: one of METHODS.
        tasks: numbers of the tasks it learns.
    """

    method: str
    tasks: tuple[int, ...]


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    return run(_parser(), partial(_main, argv), argv)


def _main(argv: list[str], flags: argparse.Namespace) -> None:
    fill_sizes(flags, FULL, SMOKE)
    if flags.steps < len(DOMAINS):
        raise ValueError(f"Expected --steps of at least {len(DOMAINS)} (got {flags.steps}). Do raise it.")
    folder = open_folder(flags, "multitask")
    with resumable("multitask_learning", argv, folder):
        texts = [load_domain(name, limit=20_000 if flags.smoke else 500_000) for name in DOMAINS]
        _sampler(texts, range(len(texts)), flags, 0)
        start, finish = partial(_training, texts, flags), partial(_finish, texts, flags)
        contestants = _contestants(flags, len(texts))
        contest = Contest(contestants, flags.seeds, flags.learning_rates, folder)
        results = contest.run(start, finish, resume=flags.resume)
    if results:
        _report(results, folder, flags)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add_run_flags(parser, "multitask")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    add("--temperature", type=float, help="tasks are drawn by size^(1/temperature) (default: all alike)")
    add_size_flags(parser, FULL)
    add_rate_flags(parser, learning_rate=4e-3)
    add_training_flags(parser)
    return parser


def _contestants(flags: argparse.Namespace, num_tasks: int) -> dict[str, Contestant]:
    everything = tuple(range(num_tasks))
    made = {method: Contestant(method, everything) for method in flags.methods if method != "separate"}
    if "separate" in flags.methods:
        made |= {f"separate-{name}": Contestant("separate", (task,)) for task, name in enumerate(DOMAINS)}
    return made


def _model(contestant: Contestant, flags: argparse.Namespace) -> nn.Module:
    """The model of a method; parameters are matched to those of a graph for each task."""
    shape = {name: getattr(flags, name) for name in ("d_model", "num_heads", "num_layers", "d_ff")}
    plain = TransformerConfig(VOCAB_SIZE, **shape)
    graph = dataclasses.replace(plain, head_graph=HeadGraphConfig())
    method, num_tasks = contestant.method, len(contestant.tasks)
    with torch.random.fork_rng(devices=[]):
        shared, own = (count_parameters(LanguageModel(config)) for config in (plain, graph))
        whole = shared + len(DOMAINS) * (own - shared)
        wide = {"plain": plain, "graph": graph}
        if method in wide:
            wide[method] = match_parameters(LanguageModel, wide[method], whole)
    if method in wide:
        return LanguageModel(wide[method])
    if method == "graph-per-task":
        return TaskAdapters(LanguageModel(graph), num_tasks, frozen=False)
    if method == "read-out-per-task":
        untied = LanguageModel(dataclasses.replace(plain, tie_embeddings=False))
        return TaskAdapters(untied, num_tasks, types=(), names=["head"], frozen=False)
    model = LanguageModel(plain)
    if method == "lora-per-task":
        add_low_rank(model, matching_rank(model, own - shared))
        return TaskAdapters(model, num_tasks, frozen=False)
    return model


def _sampler(texts: list[Corpus], tasks: Any, flags: argparse.Namespace, seed: int) -> TaskSampler:
    windows = {"batch_size": flags.batch_size, "length": flags.length, "seed": seed}
    sources = [partial(sample_batch, texts[task].train, **windows) for task in tasks]
    sizes = [float(len(texts[task].train)) for task in tasks]
    return TaskSampler(sources, sizes=sizes, temperature=flags.temperature, seed=seed)


def _training(
    texts: list[Corpus], flags: argparse.Namespace, contestant: Contestant, seed: int, rate: float, leaf: Path
) -> Training:
    torch.manual_seed(seed)
    steps = flags.steps * len(contestant.tasks) // len(texts)
    name = f"{seed}: {leaf.name}" if len(flags.seeds) > 1 else leaf.name

    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"validation_loss": mean(_losses(model, contestant, texts, flags).values())}

    return Training(
        _model(contestant, flags),
        _sampler(texts, contestant.tasks, flags, seed),
        task_output,
        train_config(flags, seed, rate, steps=steps),
        leaf,
        evaluate=evaluate,
        resume=can_resume(leaf, flags),
        settings={"contestant": dataclasses.asdict(contestant), "flags": vars(flags)},
        description=name,
    )


def _losses(
    model: nn.Module, contestant: Contestant, texts: list[Corpus], flags: argparse.Namespace
) -> dict[str, float]:
    """Validation loss of every task the model has learned, in nats per byte."""
    found = {}
    for number, task in enumerate(contestant.tasks):
        view = model.for_task(number) if isinstance(model, TaskAdapters) else model
        losses = window_losses(
            view, texts[task].validation, batch_size=16, length=flags.length, limit=flags.windows
        )
        found[texts[task].name] = losses.mean().item()
    return found


def _finish(texts: list[Corpus], flags: argparse.Namespace, training: Training, leaf: Path) -> dict[str, Any]:
    """Measures every task; writes losses.json and returns more of the same."""
    model = training.accelerator.unwrap_model(training.model).eval()
    values = training.folder.settings["contestant"]
    contestant = Contestant(values["method"], tuple(values["tasks"]))
    result = {
        "method": contestant.method,
        "seed": training.config.seed,
        "losses": _losses(model, contestant, texts, flags),
        "parameters": count_parameters(model),
    }
    write_text(leaf / "losses.json", json.dumps(result, indent=2))
    return {**result, "log": training.folder.rows}


def _report(results: dict[tuple[int, str], dict[str, Any]], folder: Path, flags: argparse.Namespace) -> None:
    """Prints and writes the table: losses of every task and their mean, over seeds."""
    rows = []
    for method in flags.methods:
        by_seed = []
        for seed in flags.seeds:
            own = [one for one in results.values() if (one["method"], one["seed"]) == (method, seed)]
            losses = {task: loss for one in own for task, loss in one["losses"].items()}
            size = sum(one["parameters"] for one in own)
            by_seed.append({**losses, "mean": mean(losses.values()), "parameters": size})
        columns = [mean_and_deviation([one[name] for one in by_seed]) for name in (*DOMAINS, "mean")]
        rates = sorted({one["learning_rate"] for one in own})
        rows.append([method, ", ".join(f"{rate:g}" for rate in rates), f"{by_seed[0]['parameters']:,}", *columns])
    table = markdown_table([["method", "learning rate", "parameters", *DOMAINS, "mean"], *rows]) + "\n"
    write_text(folder / "table.md", table)
    if len(results) > 1:
        draw_curves({one["leaf"]: one["log"] for one in results.values()}, folder / "curves.png")
    print(f"\n{table}\nvalidation loss in nats per byte; written: {folder / 'table.md'}, {folder / 'curves.png'}")


if __name__ == "__main__":
    sys.exit(main())
