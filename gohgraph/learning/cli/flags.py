"""Flags that training scripts share, and the training they describe."""

import argparse
from collections.abc import Mapping
from typing import Any

import torch

from gohgraph.common.checks import check_int
from gohgraph.common.command_line import fill_in
from gohgraph.learning.recipes import RECIPES
from gohgraph.learning.train_config import TrainConfig
from gohgraph.parallel.layout import MODES, ParallelConfig
from gohgraph.parallel.ranks import machines, under_torchrun, world_size


def add_run_flags(parser: argparse.ArgumentParser, name: str) -> None:
    """Adds the flags of every run; `runs/name` is its folder by default."""
    add = parser.add_argument
    add("--run", metavar="FOLDER", help=f"run folder (default: runs/{name}, numbered when taken)")
    add("--resume", action="store_true", help="go on with the run in --run, with the flags it was started with")
    add("--smoke", action="store_true", help="a tiny model and a few steps, to see that it works")
    add("--seeds", type=int, nargs="+", default=[0], help="one run each, in sub-folders when there are several")
    add("--device", choices=("cpu", "cuda", "mps", "xpu"), help="default: the accelerator when there is one")
    add("--threads", type=int, default=1, help="CPU threads; models this small run fastest on one (default 1)")


def add_size_flags(parser: argparse.ArgumentParser, full: Mapping[str, Any]) -> None:
    """Adds a flag for every size of a full run, such as `--d-model`; `fill_sizes` gives them their values."""
    add = parser.add_argument_group("sizes").add_argument
    for name, value in full.items():
        add(f"--{name.replace('_', '-')}", type=type(value), help=f"default {value}")


def add_rate_flags(parser: argparse.ArgumentParser, *, learning_rate: float) -> None:
    """Adds `--learning-rates`, the grid of a `Contest`."""
    parser.add_argument(
        "--learning-rates", type=float, nargs="+", default=[learning_rate], metavar="RATE",
        help=f"of several, each model takes its best on the first seed (default {learning_rate:g})",
    )  # fmt: skip


def add_training_flags(parser: argparse.ArgumentParser, *, weight_decay: float = 0.1, title: str = "training") -> None:
    """Adds the flags that `train_config` reads, below a title that says what is trained."""
    add = parser.add_argument_group(title).add_argument
    add("--recipe", choices=RECIPES, help="of model and training (default: modern or, to resume, the run's)")
    add("--warmup", type=int, help="steps of linear warm-up (default: a tenth of the steps, at most 100)")
    add("--matrix-learning-rate", type=float, help="of Muon, whose matrices are those inside layers (default: 0.02)")
    add("--weight-decay", type=float, default=weight_decay, help="default %(default)s")
    add("--graph-lr-factor", type=float, help="learning rate of head graphs over the others' (default: the recipe's)")
    add("--graph-matrix-lr-factor", type=float, help="Muon trains their matrices, too, at so many times its rate")
    add("--patience", type=int, help="evaluations without a better loss after which it stops (default: never)")
    add("--eval-every", type=int, help="steps (default: a tenth of them)")
    add("--checkpoint-every", type=int, help="steps (default: a fifth of them)")
    add("--keep-checkpoints", type=int, default=2, help="the last so many; all of them make a film (default 2)")
    add("--precision", choices=("no", "bf16", "fp16"), default="no", help="mixed precision")
    add("--compile", action="store_true", help="use torch.compile")


def add_parallel_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `parallel_config` reads."""
    add = parser.add_argument_group("several processes (torchrun)").add_argument
    add("--parallel", choices=MODES, nargs="+", help="whole models (ddp), sharded ones (fsdp), sharded heads (tp)")
    add("--tensor-ranks", type=int, help="ranks that share the heads of a model (tp; default: all, beside others 2)")
    add("--sequence-parallel", action="store_true", help="between blocks, ranks of tp hold some of the tokens each")
    add("--recompute", action="store_true", help="keep no activations inside layers, compute them again in backward")


def parallel_config(flags: argparse.Namespace) -> ParallelConfig | None:
    """Returns how the processes share the work; `None` without flags about it, an error for flags that do not fit."""
    modes = flags.parallel or (("ddp",) if flags.recompute else ())
    if not modes:
        if flags.tensor_ranks is not None or flags.sequence_parallel:
            flag = "--sequence-parallel" if flags.tensor_ranks is None else f"--tensor-ranks {flags.tensor_ranks}"
            raise ValueError(f"Expected --parallel tp beside it (got {flag} alone). Do add --parallel tp.")
        return None
    config = ParallelConfig(modes, flags.tensor_ranks, flags.sequence_parallel, flags.recompute)
    if flags.parallel and not under_torchrun():
        raise ValueError(
            "Expected processes started by torchrun for --parallel (got a single process). Do run the script by "
            "torchrun --nproc-per-node 2 -- ..."
        )
    config.sizes(world_size(), machines())
    return config


def fill_sizes(flags: argparse.Namespace, full: Mapping[str, Any], smoke: Mapping[str, Any]) -> None:
    """Gives sizes that no flag gives their values, checks seeds and threads, and sets the number of threads."""
    fill_in(flags, smoke if flags.smoke else full)
    check_int("--threads", flags.threads, low=1)
    if len(set(flags.seeds)) < len(flags.seeds) or min(flags.seeds) < 0:
        raise ValueError(f"Expected different seeds of at least 0 (got {flags.seeds}). Do change them.")
    torch.set_num_threads(flags.threads)


def train_config(flags: argparse.Namespace, seed: int, learning_rate: float, **overrides: Any) -> TrainConfig:
    """Returns the training that flags of `add_training_flags` describe; `overrides` go over them."""
    same = "weight_decay patience precision compile device keep_checkpoints".split()
    steps = overrides["steps"] if "steps" in overrides else flags.steps
    values = RECIPES[flags.recipe].training | {name: getattr(flags, name) for name in same} | {
        "steps": steps,
        "warmup": min(100, steps // 10) if flags.warmup is None else flags.warmup,
        "eval_every": max(1, steps // 10) if flags.eval_every is None else flags.eval_every,
        "checkpoint_every": max(1, steps // 5) if flags.checkpoint_every is None else flags.checkpoint_every,
        "log_every": 1 if flags.smoke else 10,
        "seed": seed,
        "learning_rate": learning_rate,
    }
    for name in ("matrix_learning_rate", "graph_lr_factor", "graph_matrix_lr_factor"):
        if getattr(flags, name) is not None:
            values[name] = getattr(flags, name)
    return TrainConfig(**(values | overrides))
