"""Trains a classifier of images or text with head graphs, or beside plain attention of equal parameters (--compare).

    python examples/train_classifier.py --compare
    python examples/train_classifier.py --task text --compare
    python examples/train_classifier.py --task text --data folder --length 64

Images are scikit-learn's handwritten digits, cut into 16 patches of 2 x 2 pixels; text is which of five kinds (Python's
documentation and sources, C++ headers, Unicode names, licences) 32 bytes come from, or with --data which .txt file of a
folder. Each comparison takes one to two minutes on one thread; expected accuracies (docs/results.md): 97 % of the
digits with head graphs and 95 % without, 78 % of the texts with either.

The run folder holds config.json, log.csv, curves.png, checkpoints, the model, confusion.png, result.json and of a head
graph heads.png. Ctrl-C stops it; the same command with --resume goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gohgraph import Classifier, ClassifierConfig, TransformerConfig, draw, draw_confusion, record
from gohgraph.common.command_line import ArgumentParser, run
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
from gohgraph.learning.cli.graph_flags import add_graph_flags, graph_from_flags
from gohgraph.learning.contests.contest import Contest, add_rate_flags, results_table, verdict
from gohgraph.learning.contests.matching import count_parameters, with_plain
from gohgraph.learning.data.classification import (
    LabelledData,
    classification_output,
    classify,
    confusion_matrix,
    load_digits,
    load_text_classes,
)
from gohgraph.learning.loop import Training
from gohgraph.learning.run_folder import step_seconds, write_text

SIZES = ("d_model", "num_heads", "num_layers", "d_ff", "length", "batch_size", "steps")
FULL = dict(zip(SIZES, (48, 8, 2, 96, 32, 64, 600), strict=True))
SMOKE = dict(zip(SIZES, (8, 4, 1, 8, 8, 5, 12), strict=True))
COLUMNS = {
    "validation loss": ("validation_loss", 4, 1),
    "accuracy [%]": ("accuracy", 2, 100),
    "step [ms]": ("step_seconds", 1, 1000),
    "time [s]": ("seconds", 1, 1),
}
PATCH = 2


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    return run(_parser(), partial(_main, argv), argv)


def _main(argv: list[str], flags: argparse.Namespace) -> None:
    fill_sizes(flags, FULL, SMOKE)
    if flags.data is not None and flags.task != "text":
        raise ValueError("Expected no --data with --task digits (got one). Do add --task text.")
    if flags.batch_size < 1:
        raise ValueError(f"Expected --batch-size of at least 1 (got {flags.batch_size}). Do raise it.")
    folder = open_folder(flags, f"classifier-{flags.task}")
    with resumable("train_classifier", argv, folder):
        data = _data(flags)
        build = partial(_classifier, data)
        start, finish = partial(_training, data, flags), partial(_finish, data)
        contest = Contest(_configs(build, data, flags), flags.seeds, flags.learning_rates, folder)
        trained = contest.run(start, finish, resume=flags.resume)
    if trained:
        _report(trained, folder, flags)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--task", choices=("digits", "text"), default="digits", help="default %(default)s")
    add("--data", metavar="FOLDER", help="of texts, one .txt file for every class (default: five kinds of text)")
    add_run_flags(parser, "classifier-TASK")
    add("--compare", action="store_true", help="also train plain attention of as many parameters, in turns")
    add_size_flags(parser, FULL)
    add("--dropout", type=float, default=0.1, help="default %(default)s")
    add_graph_flags(parser)
    add_rate_flags(parser, learning_rate=2e-3)
    add_training_flags(parser)
    return parser


def _data(flags: argparse.Namespace) -> LabelledData:
    if flags.task == "digits":
        return load_digits()
    return load_text_classes(flags.data, length=flags.length, per_class=40 if flags.smoke else 4000)


def _classifier(data: LabelledData, config: TransformerConfig) -> Classifier:
    image = {"patch_size": PATCH, "channels": 1} if data.name == "digits" else {}
    return Classifier(ClassifierConfig(config, num_classes=len(data.classes), **image))


def _configs(build: Any, data: LabelledData, flags: argparse.Namespace) -> dict[str, TransformerConfig]:
    names = ("d_model", "num_heads", "num_layers", "d_ff", "dropout")
    graph, images = graph_from_flags(flags, flags.num_heads), data.name == "digits"
    config = TransformerConfig(
        1 if images else 256,
        **{name: getattr(flags, name) for name in names},
        max_length=16 if images else flags.length,
        positions="learned",
        head_graph=graph,
    )
    return with_plain(build, config) if flags.compare else {"plain" if graph is None else "goh": config}


def _training(
    data: LabelledData, flags: argparse.Namespace, config: TransformerConfig, seed: int, rate: float, leaf: Path
) -> Training:
    torch.manual_seed(seed)
    model = _classifier(data, config)

    def evaluate(model: Classifier) -> dict[str, float]:
        losses, found = classify(model, *data.validation)
        accuracy = (found == data.validation[1]).double().mean().item()
        return {"validation_loss": losses.mean().item(), "accuracy": accuracy}

    inputs = {"name": data.name, "crc32": zlib.crc32(data.train[0].numpy().tobytes()), "batch_size": flags.batch_size}
    anneal = flags.anneal_top_k if config.head_graph is not None and flags.anneal_top_k else 0
    return Training(
        model,
        partial(data.batch, batch_size=flags.batch_size, seed=seed),
        classification_output,
        train_config(flags, seed, rate, anneal_top_k=anneal),
        leaf,
        evaluate=evaluate,
        resume=can_resume(leaf, flags),
        settings={"model": model.config.to_dict(), "data": inputs, "flags": vars(flags)},
        description=leaf.name,
    )


def _finish(data: LabelledData, training: Training, leaf: Path) -> dict[str, Any]:
    """Measures and draws the model as it was saved; writes result.json and returns more of the same."""
    training.accelerator.unwrap_model(training.model).save_pretrained(leaf / "model")
    model = Classifier.from_pretrained(leaf / "model").eval().to(training.accelerator.device)
    inputs, targets = data.validation
    losses, found = classify(model, inputs, targets)
    matrix = confusion_matrix(targets, found, len(data.classes))
    result = {
        "parameters": count_parameters(model),
        "validation_loss": losses.mean().item(),
        "accuracy": (found == targets).double().mean().item(),
        "confusion": matrix.tolist(),
        "classes": data.classes,
        "seconds": training.seconds,
        "step_seconds": statistics.median(step_seconds(training.folder.rows)),
    }
    write_text(leaf / "result.json", json.dumps(result, indent=2))
    draw_confusion(matrix, data.classes, leaf / "confusion.png")
    graph = model.config.transformer.head_graph
    if graph is not None and (graph.outputs is not None or graph.scores is not None):
        with record(model) as heads:
            classify(model, inputs, targets)
        draw(heads, leaf / "heads.png", title="mean edge weights over validation examples")
    return {**result, "losses": losses, "log": training.folder.rows}


def _report(trained: dict[tuple[int, str], dict[str, Any]], folder: Path, flags: argparse.Namespace) -> None:
    """Prints the table, which is better, and where the pictures are."""
    table = results_table(trained, COLUMNS) + "\n"
    write_text(folder / "table.md", table)
    print(f"\n{table}")
    if flags.compare:
        print(verdict(trained))
    if len(trained) > 1:
        draw_curves({one["leaf"]: one["log"] for one in trained.values()}, folder / "curves.png")
    pictures = [folder / "curves.png", *sorted(folder.rglob("heads.png")), *sorted(folder.rglob("confusion.png"))]
    print("pictures: " + ", ".join(str(path) for path in pictures))


if __name__ == "__main__":
    sys.exit(main())
