"""Meta-learns to tell digits apart after a few examples: which part of the model should adapt to a task?

    python examples/meta_learning.py
    python examples/meta_learning.py --methods maml graph lora --shots 1 --seeds 0 1 2

Tasks are drawn from scikit-learn's handwritten digits: 0 to 5 in four rotations for learning, 6 to 9 only for the test.
In the inner loop "maml" adapts all parameters, "first-order" too but without second derivatives, "reptile" all with its
own outer step, "read-out" the last layer (ANIL), "graph" the head graphs alone, "lora" low-rank updates of the
attention's weights of about as many parameters, "graph+read-out" and "lora+read-out" both. The first command takes
ten minutes on one thread. Expected (docs/results.md): about 60 % with "maml", 50 % with "read-out", near chance (33 %)
with "graph" or "lora" alone; "graph+read-out" reaches 60 % with --learning-rates 1e-2.

The run folder holds a folder for every method with its log and result.json, curves.png and table.md. Ctrl-C stops it;
the same command with --resume goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gohgraph import Classifier, ClassifierConfig, HeadGraphConfig, HeadGraphConv, TransformerConfig
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
from gohgraph.learning.contests.contest import Contest, add_rate_flags, by_model
from gohgraph.learning.contests.matching import count_parameters
from gohgraph.learning.data.classification import load_digits
from gohgraph.learning.data.episodes import EpisodeSampler, few_shot_classes
from gohgraph.learning.loop import Training
from gohgraph.learning.regimes.language import standard_error
from gohgraph.learning.regimes.low_rank import ATTENTION, LowRankUpdate, add_low_rank, matching_rank
from gohgraph.learning.regimes.meta import MetaLearner, few_shot_accuracy, maml_loss, parameters_of, reptile_loss
from gohgraph.learning.run_folder import write_text

# What adapts in the inner loop: types and names of modules, all of them without either.
ADAPTED: dict[str, dict[str, Any]] = {
    "maml": {},
    "first-order": {},
    "reptile": {},
    "read-out": {"names": ["head"]},
    "graph": {"types": (HeadGraphConv,)},
    "lora": {"types": (LowRankUpdate,)},
    "graph+read-out": {"types": (HeadGraphConv,), "names": ["head"]},
    "lora+read-out": {"types": (LowRankUpdate,), "names": ["head"]},
}
HELD_OUT = 4
TEST_SEED = 1_000_003
SIZES = ("d_model", "num_heads", "num_layers", "d_ff", "tasks", "ways", "shots", "queries", "steps", "test_batches")
FULL = dict(zip(SIZES, (32, 4, 2, 64, 4, 3, 5, 10, 250, 25), strict=True))
SMOKE = dict(zip(SIZES, (8, 2, 1, 8, 2, 2, 1, 2, 4, 2), strict=True))


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    return run(_parser(), partial(_main, argv), argv)


def _main(argv: list[str], flags: argparse.Namespace) -> None:
    fill_sizes(flags, FULL, SMOKE)
    if flags.test_batches < 1:
        raise ValueError(f"Expected --test-batches of at least 1 (got {flags.test_batches}). Do raise it.")
    folder = open_folder(flags, "meta")
    with resumable("meta_learning", argv, folder):
        known, new = few_shot_classes(load_digits(), held_out=HELD_OUT)
        _sampler(known, flags, 0)
        test = _sampler(new, flags, TEST_SEED)
        start, finish = partial(_training, known, test, flags), partial(_finish, test, flags)
        methods = {method: method for method in flags.methods}
        contest = Contest(methods, flags.seeds, flags.learning_rates, folder)
        results = contest.run(start, finish, resume=flags.resume)
    if results:
        _report(results, folder, flags)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add_run_flags(parser, "meta")
    add("--methods", nargs="+", choices=ADAPTED, default=list(ADAPTED), help="default: all")
    add("--inner-steps", type=int, default=3, help="gradient steps on a task (default %(default)s)")
    add("--inner-learning-rate", type=float, default=0.1, help="to begin with, then learned (default %(default)s)")
    add_size_flags(parser, FULL)
    add_rate_flags(parser, learning_rate=3e-3)
    add_training_flags(parser, weight_decay=0.0)
    return parser


def _sampler(classes: list[torch.Tensor], flags: argparse.Namespace, seed: int) -> EpisodeSampler:
    numbers = {name: getattr(flags, name) for name in ("tasks", "ways", "shots", "queries")}
    return EpisodeSampler(classes, **numbers, seed=seed)


def _learner(method: str, flags: argparse.Namespace) -> MetaLearner:
    """A classifier with head graphs, or with low-rank updates of as many parameters, and its inner loop."""

    def classifier(graph: HeadGraphConfig | None) -> Classifier:
        shape = {name: getattr(flags, name) for name in ("d_model", "num_heads", "num_layers", "d_ff")}
        encoder = TransformerConfig(1, **shape, max_length=16, positions="learned", head_graph=graph)
        return Classifier(ClassifierConfig(encoder, num_classes=flags.ways, patch_size=2, channels=1))

    if method.startswith("lora"):
        with torch.random.fork_rng(devices=[]):
            whole = count_parameters(classifier(HeadGraphConfig()))
        model = classifier(None)
        add_low_rank(model, matching_rank(model, whole - count_parameters(model), ATTENTION), targets=ATTENTION)
    else:
        model = classifier(HeadGraphConfig())
    return MetaLearner(
        model,
        parameters_of(model, **ADAPTED[method]),
        steps=flags.inner_steps,
        learning_rate=flags.inner_learning_rate,
        second_order=method not in ("first-order", "reptile"),
    )


def _training(
    classes: list[torch.Tensor],
    test: EpisodeSampler,
    flags: argparse.Namespace,
    method: str,
    seed: int,
    rate: float,
    leaf: Path,
) -> Training:
    torch.manual_seed(seed)
    return Training(
        _learner(method, flags),
        _sampler(classes, flags, seed),
        reptile_loss if method == "reptile" else maml_loss,
        train_config(flags, seed, rate),
        leaf,
        evaluate=partial(_measure, test, min(5, flags.test_batches)),
        resume=can_resume(leaf, flags),
        settings={"method": method, "flags": vars(flags)},
        description=f"{seed}: {method}" if len(flags.seeds) > 1 else method,
    )


def _measure(test: EpisodeSampler, batches: int, learner: MetaLearner) -> dict[str, float]:
    """Loss and accuracy on tasks of classes never learned from."""
    device = learner.log_rate.device
    found = [few_shot_accuracy(learner, type(one)(*(x.to(device) for x in one))) for one in map(test, range(batches))]
    losses, accuracies = (torch.cat(side) for side in zip(*found, strict=True))
    return {
        "validation_loss": losses.mean().item(),
        "accuracy": accuracies.mean().item(),
        "standard_error": standard_error(accuracies),
    }


def _finish(test: EpisodeSampler, flags: argparse.Namespace, training: Training, leaf: Path) -> dict[str, Any]:
    """Measures on all test tasks; writes result.json and returns more of the same."""
    learner = training.accelerator.unwrap_model(training.model).eval()
    result = {
        "method": training.folder.settings["method"],
        "seed": training.config.seed,
        "parameters": count_parameters(learner),
        "bytes_adapted": learner.bytes_adapted(),
        **_measure(test, flags.test_batches, learner),
        "seconds": training.seconds,
    }
    write_text(leaf / "result.json", json.dumps(result, indent=2))
    return {**result, "log": training.folder.rows}


def _report(results: dict[tuple[int, str], dict[str, Any]], folder: Path, flags: argparse.Namespace) -> None:
    """Prints and writes the table: over seeds, or with the standard error over tasks of the only one."""
    rows = []
    for method, own in by_model(results).items():
        accuracy = mean_and_deviation([100 * one["accuracy"] for one in own], digits=1)
        if len(own) == 1:
            accuracy += f" ± {100 * own[0]['standard_error']:.1f}"
        loss = mean_and_deviation([one["validation_loss"] for one in own])
        seconds = mean_and_deviation([one["seconds"] for one in own], digits=0)
        sizes = [f"{own[0]['parameters']:,}", f"{own[0]['bytes_adapted']:,}"]
        rows.append([method, f"{own[0]['learning_rate']:g}", *sizes, accuracy, loss, seconds])
    header = ["inner loop", "learning rate", "parameters", "bytes adapted", "accuracy [%]", "loss", "time [s]"]
    table = markdown_table([header, *rows]) + "\n"
    write_text(folder / "table.md", table)
    if len(results) > 1:
        draw_curves({one["leaf"]: one["log"] for one in results.values()}, folder / "curves.png")
    basis = "standard deviation over seeds" if len(flags.seeds) > 1 else "standard error over tasks"
    print(f"\n{table}\n{flags.ways} ways, {flags.shots} shots, ± {basis}; written: {folder / 'table.md'}")


if __name__ == "__main__":
    sys.exit(main())
