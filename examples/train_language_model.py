"""Trains a byte-level language model with head graphs, or beside plain attention of equal parameter count (--compare).

    python examples/train_language_model.py --compare
    python examples/train_language_model.py --data book.txt --sites both --score-in-degree 4 --run runs/book
    python examples/train_language_model.py --sites none --router --compare --run runs/mixture-of-heads
    python examples/train_language_model.py --experts --rounds 3 --router --top-k 3 --run runs/experts
    torchrun --nproc-per-node 4 -- examples/train_language_model.py --parallel tp fsdp --run runs/sharded

The run folder holds config.json, log.csv, curves.png, checkpoints, the model, sample.txt and result.json, of a head
graph heads.png, and of a router load.png. Ctrl-C stops it; the same command with --resume goes on. Where TensorBoard is
installed, losses and head graphs are in tensorboard/: tensorboard --logdir runs
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import zlib
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from gohgraph import LanguageModel, TransformerConfig, draw, draw_load, log_head_graphs, record
from gohgraph.attention.head_load import load_cv, load_entropy
from gohgraph.common.command_line import ArgumentParser, run
from gohgraph.drawing import draw_curves
from gohgraph.learning.cli.experiment import (
    add_parallel_flags,
    add_run_flags,
    add_size_flags,
    add_training_flags,
    can_resume,
    fill_sizes,
    open_folder,
    parallel_config,
    resumable,
    train_config,
)
from gohgraph.learning.cli.graph_flags import add_graph_flags, graph_from_flags
from gohgraph.learning.contests.contest import Contest, add_rate_flags, verdict
from gohgraph.learning.contests.matching import count_parameters, match_parameters
from gohgraph.learning.data.corpus import PYTHON_DOCS, Corpus, evaluation_batches, load_corpus, sample_batch
from gohgraph.learning.loop import Training
from gohgraph.learning.regimes.language import (
    VOCAB_SIZE,
    head_loads,
    next_token_output,
    sample_text,
    standard_error,
    window_losses,
)
from gohgraph.learning.run_folder import step_seconds, write_text
from gohgraph.learning.tracking import TensorBoard
from gohgraph.models.config import FEED_FORWARD_ACTIVATIONS, POSITIONS
from gohgraph.parallel import ParallelConfig, process_group

# Two models of this size, trained for this long, take about two and a half minutes on one thread.
FULL = {"d_model": 128, "num_heads": 8, "num_layers": 4, "d_ff": 512, "length": 128, "batch_size": 8, "steps": 500}
SMOKE = {"d_model": 32, "num_heads": 4, "num_layers": 2, "d_ff": 64, "length": 32, "batch_size": 4, "steps": 20}
WINDOWS = {False: 256, True: 16}
# What a model is called and what it means: with messages, with routing.
KINDS = {
    (True, False): ("goh", "heads as a graph"),
    (True, True): ("goh", "heads as a graph, routed by token"),
    (False, True): ("moh", "heads routed by token"),
    (False, False): ("plain", "plain attention"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    return run(_parser(), partial(_main, argv), argv)


def _main(argv: list[str], flags: argparse.Namespace) -> None:
    fill_sizes(flags, FULL, SMOKE)
    _check(flags)
    configs = _configs(flags)
    corpus = load_corpus(flags.data)
    _check_length(corpus, flags)
    parallel = parallel_config(flags)
    with process_group(flags.device):
        folder = open_folder(flags, "demo" if flags.compare else "language-model")
        start, finish = partial(_training, corpus, flags, parallel), partial(_finish, corpus, flags)
        with resumable("train_language_model", argv, folder):
            contest = Contest(configs, flags.seeds, flags.learning_rates, folder)
            trained = contest.run(start, finish, resume=flags.resume)
        if trained:
            _report(trained, folder, flags)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--data", default=PYTHON_DOCS, metavar="TEXT", help=f"{PYTHON_DOCS} (default), tiny-shakespeare, or a file")
    add_run_flags(parser, "demo or runs/language-model")
    add("--compare", action="store_true", help="also train plain attention of as many parameters, in turns")
    add("--match-parameters", action="store_true", help="train only that plain model")
    add_size_flags(parser, FULL)
    size = parser.add_argument_group("model").add_argument
    size("--num-kv-heads", type=int, help="key/value heads (default: --num-heads)")
    size("--dropout", type=float, default=0.0)
    size("--activation", choices=FEED_FORWARD_ACTIVATIONS, default="gelu")
    size("--positions", choices=POSITIONS, default="rotary")
    add_graph_flags(parser)
    add_rate_flags(parser, learning_rate=2e-3)
    add_training_flags(parser)
    add_parallel_flags(parser)
    return parser


def _check(flags: argparse.Namespace) -> None:
    if flags.sites == "none" and not flags.router and (flags.compare or flags.match_parameters):
        raise ValueError("Expected a head graph to compare with (got --sites none). Do add --sites or --router.")
    if flags.compare and flags.match_parameters:
        raise ValueError("Expected --compare or --match-parameters (got both). Do drop one: --compare trains both.")


def _configs(flags: argparse.Namespace) -> dict[str, TransformerConfig]:
    """The models to train by name; building each checks what its configuration cannot."""
    graph = graph_from_flags(flags, flags.num_heads)
    names = ("d_model", "num_heads", "num_kv_heads", "num_layers", "d_ff", "dropout", "activation", "positions")
    shape = {name: getattr(flags, name) for name in names}
    config = TransformerConfig(VOCAB_SIZE, **shape, max_length=flags.length + 1, head_graph=graph)
    parameters = count_parameters(LanguageModel(config))
    if graph is None:
        return {"plain": config}
    plain = match_parameters(LanguageModel, dataclasses.replace(config, head_graph=None), parameters)
    if flags.match_parameters:
        return {"plain": plain}
    return {_kind(flags)[0]: config} | ({"plain": plain} if flags.compare else {})


def _kind(flags: argparse.Namespace) -> tuple[str, str]:
    return KINDS[flags.sites != "none", flags.router]


def _check_length(corpus: Corpus, flags: argparse.Namespace) -> None:
    sample_batch(corpus.train, 0, batch_size=flags.batch_size, length=flags.length, seed=0)
    evaluation_batches(corpus.validation, batch_size=flags.batch_size, length=flags.length)


def _training(
    corpus: Corpus,
    flags: argparse.Namespace,
    parallel: ParallelConfig | None,
    config: TransformerConfig,
    seed: int,
    rate: float,
    leaf: Path,
) -> Training:
    windows = {"batch_size": flags.batch_size, "length": flags.length}
    torch.manual_seed(seed)
    model = LanguageModel(config)
    data = {"name": corpus.name, "crc32": zlib.crc32(corpus.train.numpy().tobytes()), **windows}

    def evaluate(model: LanguageModel) -> dict[str, float]:
        losses = window_losses(model, corpus.validation, **windows, limit=WINDOWS[flags.smoke])
        return {"validation_loss": losses.mean().item()}

    def log(row: dict[str, Any]) -> None:
        log_head_graphs(tracker.writer(row["step"]), model, row["step"])

    tracker = TensorBoard(leaf / "tensorboard") if find_spec("tensorboard") is not None else None
    # One rank alone cannot log a model that lies on several.
    can_log = _has_graphs(config) and tracker is not None and not (parallel and parallel.is_sharded)
    return Training(
        model,
        partial(sample_batch, corpus.train, seed=seed, **windows),
        next_token_output,
        # The plain side of a comparison has no heads to leave out.
        train_config(flags, seed, rate, anneal_top_k=(flags.anneal_top_k or 0) if _is_routed(config) else 0),
        leaf,
        evaluate=evaluate,
        on_evaluate=log if can_log else None,
        tracker=tracker,
        resume=can_resume(leaf, flags),
        settings={"model": config.to_dict(), "data": data, "flags": vars(flags)},
        description=leaf.name,
        parallel=parallel,
    )


def _finish(corpus: Corpus, flags: argparse.Namespace, training: Training, leaf: Path) -> dict[str, Any]:
    """Measures, samples and draws the model as it was saved; writes result.json and returns more of the same."""
    training.accelerator.unwrap_model(training.model).save_pretrained(leaf / "model")
    model = LanguageModel.from_pretrained(leaf / "model").eval().to(training.accelerator.device)
    windows = {"batch_size": flags.batch_size, "length": flags.length}
    losses = window_losses(model, corpus.validation, **windows, limit=WINDOWS[True] if flags.smoke else None)
    steps = step_seconds(training.folder.rows)
    result = {
        "parameters": count_parameters(model),
        "validation_loss": losses.mean().item(),
        "standard_error": standard_error(losses),
        "seconds": training.seconds,
        "step_seconds": statistics.median(steps),
    }
    graph = model.config.head_graph
    if _is_routed(model.config):
        load = head_loads(model, corpus.validation, **windows, limit=WINDOWS[flags.smoke])  # [L, H]
        shared = graph.routing.num_shared
        cv, entropy = load_cv(load, shared).mean().item(), load_entropy(load, shared).mean().item()
        result |= {"load": load.tolist(), "load_cv": cv, "load_entropy": entropy}
        draw_load(load, leaf / "load.png", num_shared=shared, title="load of heads over validation text")
    write_text(leaf / "result.json", json.dumps(result, indent=2))
    write_text(leaf / "sample.txt", sample_text(model, corpus.validation, length=flags.length))
    if _has_graphs(model.config):
        with record(model) as heads:
            window_losses(model, corpus.validation, **windows, limit=WINDOWS[flags.smoke])
        draw(heads, leaf / "heads.png", title="mean edge weights over validation text")
    return {**result, "losses": losses, "steps": steps, "log": training.folder.rows}


def _has_graphs(config: TransformerConfig) -> bool:
    graph = config.head_graph
    return graph is not None and (graph.outputs is not None or graph.scores is not None)


def _is_routed(config: TransformerConfig) -> bool:
    return config.head_graph is not None and config.head_graph.routing is not None


def _report(trained: dict[tuple[int, str], dict[str, Any]], folder: Path, flags: argparse.Namespace) -> None:
    """Prints the table, which is better, and where the pictures are."""
    named = {result["leaf"] if result["leaf"] != "." else folder.name: result for result in trained.values()}
    width = max(16, *map(len, named))
    titles = f"{'parameters':>10} {'validation loss':>17} {'step [ms]':>10} {'ratio':>6} {'time [s]':>8}"
    head = f"{'model':<{width}} {titles}"
    print(f"\n{head}\n{'-' * len(head)}")
    for (seed, _), (name, result) in zip(trained, named.items(), strict=True):
        beside = trained[seed, "plain"] if flags.compare else None
        pairs = zip(result["steps"], beside["steps"], strict=True) if beside else ()
        ratio = f"{statistics.median(own / other for own, other in pairs):.3f}" if beside else "-"
        loss = f"{result['validation_loss']:.4f} ± {result['standard_error']:.4f}"
        step = f"{result['step_seconds'] * 1e3:.1f}"
        print(f"{name:<{width}} {result['parameters']:>10,} {loss:>17} {step:>10} {ratio:>6} {result['seconds']:>8.1f}")
    kinds = dict([_kind(flags), KINDS[False, False]])
    legend = "; ".join(f"{name}: {meaning}" for name, meaning in kinds.items())
    print(f"{legend}; ± standard error over the validation text")
    for name, result in named.items():
        if "load" in result:
            load = f"load CV {result['load_cv']:.3f}"
            print(f"routing of {name}: {load}, load entropy {result['load_entropy']:.3f} (balanced: 0 and 1)")
    if flags.compare:
        print(verdict(trained))
    if len(trained) > 1:
        draw_curves({name: result["log"] for name, result in named.items()}, folder / "curves.png")
    pictures = [folder / "curves.png", *sorted(folder.rglob("heads.png")), *sorted(folder.rglob("load.png"))]
    print("pictures: " + ", ".join(str(path) for path in pictures))


if __name__ == "__main__":
    sys.exit(main())
