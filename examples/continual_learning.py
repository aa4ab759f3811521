"""Learns four kinds of text one after another: adapters for each task over frozen heads, and what they have to beat.

    python examples/continual_learning.py
    python examples/continual_learning.py --methods graph lora both --seeds 0 1 2 --learning-rates 5e-3 1e-2 2e-2

A small language model is trained on Python's documentation, and then learns Python sources, C++ headers, Unicode names
and licences, each only once. Fine-tuning, EWC and replay change the whole model; "graph", "lora" and "both" leave it
frozen and give each task a head graph, low-rank updates of all linear layers (LoRA), or half of each, of about equal
size. The table shows the average loss after the last task, backward transfer and forgetting, and for the adapters
also what is lost when the task is not told but inferred from a quarter of each window. The first command takes
four minutes on one thread. Expected (docs/results.md): adapters forget nothing; average losses of 2.45 with LoRA,
2.65 with a head graph of its size and 2.15 with replay, from 3.45 of the base.

The run folder holds the base, a folder for every method with its tasks, results/ with the losses of every run, and
table.md. Ctrl-C stops it; the same command with --resume goes on.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from gohgraph import HeadGraphConfig, LanguageModel, SiteConfig, TransformerConfig
from gohgraph.common.command_line import ArgumentParser, run
from gohgraph.common.tables import markdown_table, mean_and_deviation
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
from gohgraph.learning.contests.contest import Contest, Run
from gohgraph.learning.contests.in_processes import InProcesses
from gohgraph.learning.contests.matching import count_parameters
from gohgraph.learning.data.corpus import Corpus
from gohgraph.learning.data.domains import load_domain
from gohgraph.learning.loop import train
from gohgraph.learning.regimes.adapters import TaskAdapters
from gohgraph.learning.regimes.continual import (
    ElasticWeights,
    Learner,
    PerTask,
    Replay,
    Windows,
    average_loss,
    backward_transfer,
    forgetting,
    learn_in_sequence,
)
from gohgraph.learning.regimes.language import VOCAB_SIZE
from gohgraph.learning.regimes.low_rank import ALL_LINEAR, add_low_rank, matching_rank
from gohgraph.learning.run_folder import write_text
from gohgraph.learning.train_config import FREE_ON_RESUME

BASE, TASKS = "documentation", ("python", "cpp", "names", "licences")
ADAPTERS = ("graph", "lora", "both")
# Learning rates of adapters and of whole models, where no grid is given.
OWN_RATES = {True: 1e-2, False: 2e-3}
METHODS = ("fine-tuning", "ewc", "replay", *ADAPTERS)
# What does not change the result of a run.
FREE_FLAGS = {"run", "resume", "methods", "seeds", "learning_rates", "threads", *FREE_ON_RESUME}
SIZES = ("d_model", "num_heads", "num_layers", "d_ff", "length", "batch_size", "steps", "base_steps", "windows")
FULL = dict(zip(SIZES, (64, 8, 3, 256, 64, 8, 150, 600, 64), strict=True))
SMOKE = dict(zip(SIZES, (16, 4, 1, 8, 16, 4, 4, 6, 4), strict=True))


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    return run(_parser(), partial(_main, argv), argv)


def _main(argv: list[str], flags: argparse.Namespace) -> None:
    fill_sizes(flags, FULL, SMOKE)
    if flags.in_degree < 2 or flags.in_degree > flags.num_heads or flags.in_degree % 2:
        raise ValueError(
            f"Expected an even --in-degree of 2..{flags.num_heads} (got {flags.in_degree}). Do change it: 'both' takes "
            "half of it."
        )
    folder = open_folder(flags, "continual")
    contests = _contests(flags, folder)
    results: dict[Run, dict[str, Any]] = {}
    with resumable("continual_learning", argv, folder):
        limit = 20_000 if flags.smoke else 500_000
        base, *tasks = (load_domain(name, limit=limit) for name in (BASE, *TASKS))
        bases = {seed: _base(base, flags, seed, _place(folder, flags, seed) / "base") for seed in flags.seeds}
        learn, arguments = partial(_learn, bases, tasks, flags, folder), partial(_arguments, flags)
        runner = InProcesses(learn, arguments, folder / "results", loss=lambda result: result["average_loss"])
        for contest in contests:
            results |= contest.hold(runner)
    _report(results, folder, flags)


def _contests(flags: argparse.Namespace, folder: Path) -> list[Contest]:
    """One over the grid; without one, adapters and whole models have a learning rate each."""
    if flags.learning_rates:
        return [Contest(dict.fromkeys(flags.methods), flags.seeds, flags.learning_rates, folder)]
    groups = {adapts: [name for name in flags.methods if (name in ADAPTERS) is adapts] for adapts in OWN_RATES}
    return [
        Contest(dict.fromkeys(names), flags.seeds, [OWN_RATES[adapts]], folder)
        for adapts, names in groups.items()
        if names
    ]


def _arguments(flags: argparse.Namespace, run: Run) -> dict[str, Any]:
    settings = {name: value for name, value in vars(flags).items() if name not in FREE_FLAGS}
    return {"method": run.name, "seed": run.seed, "rate": run.rate, "settings": settings}


def _place(folder: Path, flags: argparse.Namespace, seed: int) -> Path:
    return folder / f"seed-{seed}" if len(flags.seeds) > 1 else folder


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add_run_flags(parser, "continual")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    add("--in-degree", type=int, default=4, help="of the head graph, a ring (default %(default)s)")
    add("--learning-rates", type=float, nargs="+", metavar="RATE", help="of several, each method takes its best on the "
        f"first seed (default: {OWN_RATES[True]:g} for adapters, {OWN_RATES[False]:g} for the whole model)")
    add("--base-learning-rate", type=float, default=2e-3, help="of the model they begin with (default %(default)s)")
    add("--ewc-strength", type=float, default=1e4, help="lambda of EWC (default %(default)s)")
    add("--replay-share", type=float, default=0.5, help="of a batch that is from earlier tasks (default %(default)s)")
    add("--replay-memory", type=int, default=50_000, help="bytes kept of each earlier task (default %(default)s)")
    add_size_flags(parser, FULL)
    add_training_flags(parser)
    return parser


def _config(flags: argparse.Namespace) -> TransformerConfig:
    shape = {name: getattr(flags, name) for name in ("d_model", "num_heads", "num_layers", "d_ff")}
    return TransformerConfig(VOCAB_SIZE, **shape)


def _windows(flags: argparse.Namespace, seed: int) -> Windows:
    return Windows(flags.batch_size, flags.length, limit=flags.windows, seed=seed)


def _base(text: Corpus, flags: argparse.Namespace, seed: int, folder: Path) -> LanguageModel:
    """Trains the model that all methods begin with, as the only task of a learner."""
    torch.manual_seed(seed)
    model = LanguageModel(_config(flags))
    learner = Learner(model, [text], _windows(flags, seed))
    train(
        model,
        partial(learner.batch, 0),
        learner.loss,
        train_config(flags, seed, flags.base_learning_rate, steps=flags.base_steps),
        folder,
        evaluate=lambda model: {"validation_loss": learner.measure(0).mean().item()},
        resume=can_resume(folder, flags),
        settings={"model": model.config.to_dict(), "flags": vars(flags)},
        description=f"base: {text.name}",
    )
    return model.cpu()


def _learn(
    bases: dict[int, LanguageModel],
    tasks: list[Corpus],
    flags: argparse.Namespace,
    folder: Path,
    *,
    method: str,
    seed: int,
    rate: float,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Takes a method through all tasks at a learning rate; returns its losses, and how much is forgotten."""
    base, place = bases[seed], _place(folder, flags, seed) / method
    if flags.learning_rates and len(flags.learning_rates) > 1:
        place = place / f"rate-{rate:g}"
    torch.manual_seed(seed)
    learner = _learner(method, base, tasks, flags, seed)
    adapts = method in ADAPTERS
    # Adapters decay towards the shared model by nothing, as PEFT's do.
    own = {"weight_decay": 0.0} if adapts else {}
    before = torch.stack([learner.measure(task).mean() for task in range(len(tasks))])
    about = {"method": method, "model": base.config.to_dict(), "flags": settings}
    losses = learn_in_sequence(
        learner, train_config(flags, seed, rate, **own), place, resume=flags.resume, settings=about
    )
    result = {
        "losses": losses.tolist(),
        "before": before.tolist(),
        "parameters": learner.model.size() if adapts else count_parameters(learner.model),
        "average_loss": average_loss(losses),
        "backward_transfer": backward_transfer(losses),
        "forgetting": forgetting(losses),
    }
    if adapts:
        prefix = max(2, flags.length // 4)
        inferred = [learner.measure_inferred(task, prefix=prefix) for task in range(len(tasks))]
        result["inferred_loss"] = mean(values.mean().item() for values, _ in inferred)
        result["inferred"] = mean(share for _, share in inferred)
    return result


def _learner(
    method: str, base: LanguageModel, tasks: list[Corpus], flags: argparse.Namespace, seed: int
) -> Learner:
    windows = _windows(flags, seed)
    if method in ADAPTERS:
        return PerTask(TaskAdapters(_adapted(method, base, flags), len(tasks)), tasks, windows)
    model = copy.deepcopy(base)
    if method == "ewc":
        return ElasticWeights(model, tasks, windows, strength=flags.ewc_strength)
    if method == "replay":
        return Replay(model, tasks, windows, memory=flags.replay_memory, share=flags.replay_share)
    return Learner(model, tasks, windows)


def _adapted(method: str, base: LanguageModel, flags: argparse.Namespace) -> LanguageModel:
    """The base with neutral adapters: as many parameters in each method as whole edges and ranks allow."""
    whole = _graph_parameters(base, flags.in_degree)
    degree = {"graph": flags.in_degree, "lora": 0, "both": flags.in_degree // 2}[method]
    graph = HeadGraphConfig(SiteConfig.ring(degree)) if degree else None
    model = LanguageModel(dataclasses.replace(base.config, head_graph=graph))
    missing, unexpected = model.load_state_dict(base.state_dict(), strict=False)
    if unexpected or any("output_graph" not in name for name in missing):
        raise RuntimeError(f"the base does not fit the model with adapters: {missing}, {unexpected}")
    rest = whole - (_graph_parameters(base, degree) if degree else 0)
    if method != "graph":
        add_low_rank(model, matching_rank(base, rest, ALL_LINEAR), targets=ALL_LINEAR)
    return model


def _graph_parameters(base: LanguageModel, degree: int) -> int:
    graph = HeadGraphConfig(SiteConfig.ring(degree))
    with torch.random.fork_rng(devices=[]):
        model = LanguageModel(dataclasses.replace(base.config, head_graph=graph))
    return count_parameters(model) - count_parameters(base)


def _report(results: dict[Run, dict[str, Any]], folder: Path, flags: argparse.Namespace) -> None:
    """Prints and writes the table: means over seeds, with their standard deviations."""
    rates = {run.name: run.rate for run in results}
    of_seeds = {name: [results[name, rate, seed] for seed in flags.seeds] for name, rate in rates.items()}

    def over_seeds(method: str, key: str) -> str:
        values = [result.get(key) for result in of_seeds[method]]
        return "" if None in values else mean_and_deviation(values)

    keys = ("average_loss", "backward_transfer", "forgetting", "inferred_loss", "inferred")
    named = [key.replace("_", " ") for key in keys[:3]]
    header = ["method", "learning rate", "trained per task", *named, "loss, task inferred", "task found"]
    rows = []
    for method in flags.methods:
        about = [method, f"{rates[method]:g}", f"{of_seeds[method][0]['parameters']:,}"]
        rows.append([*about, *(over_seeds(method, key) for key in keys)])
    untrained = [mean(result["before"]) for result in of_seeds[flags.methods[0]]]
    rows.insert(0, ["base, untouched", "", "0", mean_and_deviation(untrained), *[""] * 4])
    table = markdown_table([header, *rows]) + "\n"
    write_text(folder / "table.md", table)
    print(f"\n{table}\nlosses in nats per byte over {', '.join(TASKS)}; written: {folder / 'table.md'}")


if __name__ == "__main__":
    sys.exit(main())
