"""Trains a byte-level language model with head graphs, or beside plain attention of equal parameter count (--compare).

    python examples/train_language_model.py --compare
    python examples/train_language_model.py --data book.txt --sites both --score-in-degree 4 --run runs/book
    python examples/train_language_model.py --sites none --router --compare --run runs/mixture-of-heads
    python examples/train_language_model.py --experts --rounds 3 --router --top-k 3 --run runs/experts

The run folder holds config.json, log.csv, curves.png, checkpoints, the model, sample.txt and result.json, of a head
graph heads.png, and of a router load.png. Ctrl-C stops it; the same command with --resume goes on. Where TensorBoard is
installed, its logs of head graphs are in tensorboard/: tensorboard --logdir runs
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import statistics
import sys
import zlib
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from gohgraph import LanguageModel, TransformerConfig, draw, draw_load, log_head_graphs, record
from gohgraph.command_line import ArgumentParser, run
from gohgraph.config import FEED_FORWARD_ACTIVATIONS, POSITIONS
from gohgraph.drawing import draw_curves
from gohgraph.graph_flags import add_graph_flags, graph_from_flags
from gohgraph.learning.corpus import PYTHON_DOCS, Corpus, evaluation_batches, load_corpus, sample_batch
from gohgraph.learning.language import (
    VOCAB_SIZE,
    head_loads,
    next_token_output,
    sample_text,
    standard_error,
    window_losses,
)
from gohgraph.learning.loop import TrainConfig, Training, TrainingInterrupted, train_together
from gohgraph.learning.matching import count_parameters, match_parameters
from gohgraph.learning.run_folder import last_folder, new_folder, step_seconds, write_text
from gohgraph.load import load_cv, load_entropy

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
    for name, value in (SMOKE if flags.smoke else FULL).items():
        if getattr(flags, name) is None:
            setattr(flags, name, value)
    _check(flags)
    torch.set_num_threads(flags.threads)
    configs = _configs(flags)
    corpus = load_corpus(flags.data)
    _check_length(corpus, flags)
    folder = _run_folder(flags)
    # Each run's name is also its place in the run folder.
    runs = {seed: {_name(seed, model, flags): config for model, config in configs.items()} for seed in flags.seeds}
    _check_folder(folder, [folder / name for seed in runs for name in runs[seed]], flags.resume)
    trained: dict[str, dict[str, Any]] = {}
    try:
        for seed in flags.seeds:
            trainings = {name: _training(one, corpus, seed, folder / name, flags) for name, one in runs[seed].items()}
            train_together(list(trainings.values()))
            for name, training in trainings.items():
                if training.accelerator.is_main_process:
                    trained[name] = _finish(training, corpus, folder / name, flags)
    except TrainingInterrupted as stop:
        command = [argument for argument in argv if argument != "--resume"]
        where = [] if any(argument.split("=")[0] == "--run" for argument in argv) else ["--run", str(folder)]
        again = shlex.join(["python", "examples/train_language_model.py", *command, *where, "--resume"])
        raise KeyboardInterrupt(f"{stop}; to go on: {again}") from stop
    # A loss that runs away, and a missing extra, are for the user to mend as well.
    except (FloatingPointError, ImportError) as error:
        raise ValueError(str(error)) from error
    if trained:
        _report(trained, folder, flags)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--data", default=PYTHON_DOCS, metavar="TEXT", help=f"{PYTHON_DOCS} (default), tiny-shakespeare, or a file")
    add("--run", metavar="FOLDER", help="run folder (default: runs/demo or runs/language-model, numbered when taken)")
    add("--resume", action="store_true", help="go on with the run in --run")
    add("--smoke", action="store_true", help="a tiny model and a few steps, to see that it works")
    add("--compare", action="store_true", help="also train plain attention of as many parameters, in turns")
    add("--match-parameters", action="store_true", help="train only that plain model")
    size = parser.add_argument_group("model").add_argument
    for name in ("d-model", "num-heads", "num-layers", "d-ff"):
        size(f"--{name}", type=int, help=f"default {FULL[name.replace('-', '_')]}")
    size("--num-kv-heads", type=int, help="key/value heads (default: --num-heads)")
    size("--length", type=int, help=f"tokens in a window (default {FULL['length']})")
    size("--dropout", type=float, default=0.0)
    size("--activation", choices=FEED_FORWARD_ACTIVATIONS, default="gelu")
    size("--positions", choices=POSITIONS, default="rotary")
    add_graph_flags(parser)
    train = parser.add_argument_group("training").add_argument
    train("--batch-size", type=int, help=f"windows in a batch (default {FULL['batch_size']})")
    train("--steps", type=int, help=f"default {FULL['steps']}")
    train("--learning-rate", type=float, default=2e-3)
    train("--warmup", type=int, help="steps of linear warm-up (default: a tenth of the steps, at most 100)")
    train("--weight-decay", type=float, default=0.1)
    train("--graph-lr-factor", type=float, default=1.0, help="learning rate of head graphs over the others'")
    train("--seeds", type=int, nargs="+", default=[0], help="one run each, in sub-folders when there are several")
    train("--eval-every", type=int, help="steps (default: a tenth of them)")
    train("--checkpoint-every", type=int, help="steps (default: a fifth of them)")
    train("--keep-checkpoints", type=int, default=2, help="the last so many; all of them make a film (default 2)")
    train("--device", choices=("cpu", "cuda", "mps", "xpu"), help="default: the accelerator when there is one")
    train("--precision", choices=("no", "bf16", "fp16"), default="no", help="mixed precision")
    train("--compile", action="store_true", help="use torch.compile")
    train("--threads", type=int, default=1, help="CPU threads; models this small run fastest on one (default 1)")
    return parser


def _check(flags: argparse.Namespace) -> None:
    if flags.threads < 1:
        raise ValueError(f"Expected --threads of at least 1 (got {flags.threads}). Do pass a positive number.")
    if len(set(flags.seeds)) < len(flags.seeds) or min(flags.seeds) < 0:
        raise ValueError(f"Expected different seeds of at least 0 (got {flags.seeds}). Do change them.")
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


def _run_folder(flags: argparse.Namespace) -> Path:
    if flags.run is not None:
        return Path(flags.run)
    default = Path("runs", "demo" if flags.compare else "language-model")
    return last_folder(default) if flags.resume else new_folder(default)


def _name(seed: int, model: str, flags: argparse.Namespace) -> str:
    parts = [f"seed-{seed}"] * (len(flags.seeds) > 1) + [model] * flags.compare
    return "/".join(parts) or "."


def _check_folder(folder: Path, leaves: list[Path], resume: bool) -> None:
    found = [path.parent for depth in ("", "*/", "*/*/") for path in folder.glob(f"{depth}config.json")]
    runs = [path for path in found if path.name != "model"]
    if resume and not runs:
        raise ValueError(f"Expected a run to resume (got none in {folder}). Do drop --resume, or change --run.")
    if resume and not set(runs) <= set(leaves):
        raise ValueError(f"Expected the --compare and --seeds of the run in {folder} (got others). Do repeat them.")
    if not resume and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"Expected a new or empty run folder (got {folder}). Do choose another --run, or --resume.")


def _training(config: TransformerConfig, corpus: Corpus, seed: int, leaf: Path, flags: argparse.Namespace) -> Training:
    windows = {"batch_size": flags.batch_size, "length": flags.length}
    torch.manual_seed(seed)
    model = LanguageModel(config)
    data = {"name": corpus.name, "crc32": zlib.crc32(corpus.train.numpy().tobytes()), **windows}
    same = ("steps", "learning_rate", "weight_decay", "graph_lr_factor", "precision", "compile", "device")

    def evaluate(model: LanguageModel) -> dict[str, float]:
        losses = window_losses(model, corpus.validation, **windows, limit=WINDOWS[flags.smoke])
        return {"validation_loss": losses.mean().item()}

    def log(row: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(leaf / "tensorboard") as writer:
            writer.add_scalar("validation loss", row["validation_loss"], row["step"])
            log_head_graphs(writer, model, row["step"])

    return Training(
        model,
        partial(sample_batch, corpus.train, seed=seed, **windows),
        next_token_output,
        TrainConfig(
            **{name: getattr(flags, name) for name in same},
            warmup=min(100, flags.steps // 10) if flags.warmup is None else flags.warmup,
            eval_every=max(1, flags.steps // 10) if flags.eval_every is None else flags.eval_every,
            checkpoint_every=max(1, flags.steps // 5) if flags.checkpoint_every is None else flags.checkpoint_every,
            keep_checkpoints=flags.keep_checkpoints,
            log_every=1 if flags.smoke else 10,
            # The plain side of a comparison has no heads to leave out.
            anneal_top_k=(flags.anneal_top_k or 0) if _is_routed(config) else 0,
            seed=seed,
        ),
        leaf,
        evaluate=evaluate,
        on_evaluate=log if _has_graphs(config) and find_spec("tensorboard") is not None else None,
        resume=flags.resume and (leaf / "config.json").exists(),
        settings={"model": config.to_dict(), "data": data, "flags": vars(flags)},
        description=leaf.name,
    )


def _finish(training: Training, corpus: Corpus, leaf: Path, flags: argparse.Namespace) -> dict[str, Any]:
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


def _report(trained: dict[str, dict[str, Any]], folder: Path, flags: argparse.Namespace) -> None:
    """Prints the table, which is better, and where the pictures are."""
    head = f"{'model':<16} {'parameters':>10} {'validation loss':>17} {'step [ms]':>10} {'ratio':>6} {'time [s]':>8}"
    print(f"\n{head}\n{'-' * len(head)}")
    for name, result in trained.items():
        beside = trained[name.replace(_kind(flags)[0], "plain")] if flags.compare else None
        pairs = zip(result["steps"], beside["steps"], strict=True) if beside else ()
        ratio = f"{statistics.median(own / other for own, other in pairs):.3f}" if beside else "-"
        loss = f"{result['validation_loss']:.4f} ± {result['standard_error']:.4f}"
        step = f"{result['step_seconds'] * 1e3:.1f}"
        name = folder.name if name == "." else name
        print(f"{name:<16} {result['parameters']:>10,} {loss:>17} {step:>10} {ratio:>6} {result['seconds']:>8.1f}")
    kinds = dict([_kind(flags), KINDS[False, False]])
    legend = "; ".join(f"{name}: {meaning}" for name, meaning in kinds.items())
    print(f"{legend}; ± standard error over the validation text")
    for name, result in trained.items():
        if "load" in result:
            name, load = folder.name if name == "." else name, f"load CV {result['load_cv']:.3f}"
            print(f"routing of {name}: {load}, load entropy {result['load_entropy']:.3f} (balanced: 0 and 1)")
    if flags.compare:
        print(_verdict(trained))
    if len(trained) > 1:
        draw_curves({name: result["log"] for name, result in trained.items()}, folder / "curves.png")
    pictures = [folder / "curves.png", *sorted(folder.rglob("heads.png")), *sorted(folder.rglob("load.png"))]
    print("pictures: " + ", ".join(str(path) for path in pictures))


def _verdict(trained: dict[str, dict[str, Any]]) -> str:
    """Which is better: by the same windows of the validation text, or by the same seeds when there are several."""
    kind = next(name.split("/")[-1] for name in trained if not name.endswith("plain"))
    graphs = [result for name, result in trained.items() if name.endswith(kind)]
    plains = [result for name, result in trained.items() if name.endswith("plain")]
    gains = [plain["losses"] - graph["losses"] for graph, plain in zip(graphs, plains, strict=True)]
    values = torch.stack([gain.mean() for gain in gains]) if len(gains) > 1 else gains[0]
    gain, error = values.mean().item(), standard_error(values)
    basis = f"{len(gains)} seeds" if len(gains) > 1 else "one seed; another one may say otherwise: --seeds 0 1 2"
    if not abs(gain) > 2 * error:
        return f"no difference beyond noise: {kind} is ahead by {gain:+.4f} ± {error:.4f} nats ({basis})"
    return f"better: {kind if gain > 0 else 'plain'}, by {abs(gain):.4f} ± {error:.4f} nats ({basis})"


if __name__ == "__main__":
    sys.exit(main())
