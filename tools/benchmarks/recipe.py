"""What each part of the training recipe is worth for plain attention: one change at a time, on text.

Every arm trains a byte-level language model of plain attention with the base recipe but for one change, at the same
number of parameters (the feed-forward is widened), on the same batches. The first arms are the rates of the base, so
that the others are judged beside a tuned one. Differences are taken seed by seed.

An interrupted benchmark goes on where it stopped when it is called again with the same --run.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.statistics import interval
from benchmarks.tasks.text import Text
from gohgraph.common.checks import check_int
from gohgraph.common.command_line import fill_in
from gohgraph.common.files import write_text_whole
from gohgraph.common.tables import markdown_table
from gohgraph.learning.contests.matching import count_parameters, match_parameters
from gohgraph.learning.contests.sweep import sweep
from gohgraph.learning.loop import TrainConfig, train

MODEL = {"qk_norm": True, "activation": "gelu", "norm": "layer", "embedding_norm": False, "logit_cap": None}
MODEL |= {"init": "fan-in-zero", "bias": True, "tie_embeddings": True}
TRAINING = {"optimizer": "muon", "learning_rate": 4e-3, "matrix_learning_rate": 0.02, "schedule": "cosine"}
TRAINING |= {"min_lr_ratio": 0.1, "weight_decay": 0.1, "betas": (0.9, 0.95)}
OLD = {"qk_norm": False, "init": "normal", "optimizer": "adamw"}
BASE = "base"
ARMS: dict[str, dict[str, Any]] = {
    BASE: {},
    **{f"matrices-{rate:g}": {"matrix_learning_rate": rate} for rate in (0.01, 0.04)},
    **{f"rest-{rate:g}": {"learning_rate": rate} for rate in (1e-3, 2e-3, 8e-3, 16e-3)},
    **{f"old-{rate:g}": {**OLD, "learning_rate": rate} for rate in (2e-3, 4e-3)},
    "normal-init": {"init": "normal"},
    "open-read-outs": {"init": "fan-in"},
    "no-qk-norm": {"qk_norm": False},
    "adamw-2e-3": {"optimizer": "adamw", "learning_rate": 2e-3},
    "adamw-4e-3": {"optimizer": "adamw"},
    "relu2": {"activation": "relu2"},
    "swiglu": {"activation": "swiglu"},
    "rms": {"norm": "rms"},
    "unweighted-rms": {"norm": "unweighted-rms"},
    "no-bias": {"bias": False},
    "embedding-norm": {"embedding_norm": True},
    "logit-cap": {"logit_cap": 15.0},
    "untied": {"tie_embeddings": False},
    "end-at-0": {"min_lr_ratio": 0.0},
    "warmdown": {"schedule": "warmdown", "min_lr_ratio": 0.0},
    "decay-0": {"weight_decay": 0.0},
    "decay-0.3": {"weight_decay": 0.3},
    "betas-0.98": {"betas": (0.9, 0.98)},
}
# Of flags that the command line does not give: in full, and to see that it runs.
FULL = {"arms": list(ARMS), "steps": 500, "seeds": [0, 1, 2]}
SMOKE = {"arms": [BASE, "relu2"], "steps": 3, "seeds": [0, 1]}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    add = parser.add_argument
    add("--run", type=Path, default=Path("runs/recipe"), help="folder, continued if it is there (%(default)s)")
    add("--arms", nargs="+", choices=ARMS, metavar="NAME", help=f"of {' '.join(ARMS)}")
    add("--with", dest="given", nargs="+", choices=ARMS, default=[], metavar="NAME", help="arms that the base includes")
    add("--seeds", nargs="+", type=int, help="(default: 0 1 2)")
    add("--steps", type=int, help=f"(default: {FULL['steps']})")
    add("--parameters", type=int, default=925_000, help="of every model (default: %(default)s)")
    add("--jobs", type=int, default=1, help="processes of one thread each (default: %(default)s)")
    add("--smoke", action="store_true", help="a few steps, to see that it runs, where no flag says otherwise")


def run(flags: argparse.Namespace) -> None:
    """Trains what is missing and prints the table."""
    fill_in(flags, SMOKE if flags.smoke else FULL)
    for name, low in (("steps", 2), ("parameters", 100_000), ("jobs", 1)):
        check_int(f"--{name}", getattr(flags, name), low=low)
    given = {name: value for arm in flags.given for name, value in ARMS[arm].items()}
    names = {(arm, seed): "_".join([*flags.given, arm, str(flags.steps), str(seed)])
             for seed in flags.seeds for arm in dict.fromkeys([BASE, *flags.arms])}  # fmt: skip
    common = {"steps": flags.steps, "parameters": flags.parameters}
    runs = {name: {"name": name, "changes": {**given, **ARMS[arm]}, "seed": seed, **common}
            for (arm, seed), name in names.items()}  # fmt: skip
    done = sweep(partial(run_arm, str(flags.run / "runs")), runs, flags.run / "results", jobs=flags.jobs,
                 may_diverge=True)  # fmt: skip
    table = recipe_table({key: done[name] for key, name in names.items()})
    write_text_whole(flags.run / f"table-{'-'.join([*flags.given, str(flags.steps)])}.md", table + "\n")
    print(f"\n{table}")


def run_arm(folder: str, name: str, changes: dict[str, Any], seed: int, steps: int, parameters: int) -> dict[str, Any]:
    """Trains one model on one thread; an interrupted run goes on from its checkpoint.

    Returns its last `validation_loss`, `parameters`, and seconds of a step.
    """
    torch.set_num_threads(1)
    task, path = Text(num_layers=4, batch_size=16), Path(folder) / name
    model = {field: changes.get(field, value) for field, value in MODEL.items()}
    training = {field: changes.get(field, value) for field, value in TRAINING.items()}
    config = match_parameters(task.model, dataclasses.replace(task.config(), d_ff=64, **model), parameters)
    torch.manual_seed(seed)
    built, every = task.model(config), max(1, steps // 4)
    often: dict[str, Any] = {"eval_every": every, "checkpoint_every": every, "log_every": every, "keep_checkpoints": 1}
    rows = train(
        built, partial(task.batch, seed=seed), task.output,
        TrainConfig(steps=steps, warmup=steps // 20, seed=seed, device="cpu", **often, **training), path,
        evaluate=task.evaluate, resume=(path / "config.json").exists(), description=name,
    )  # fmt: skip
    shutil.rmtree(path / "checkpoints", ignore_errors=True)
    seconds = rows[-1]["seconds"] / steps
    found = {"loss": rows[-1][task.choosing], "parameters": count_parameters(built), "seconds": seconds}
    return found | {"curve": [row["validation_loss"] for row in rows]}


def recipe_table(results: dict[tuple[str, int], dict[str, Any] | None]) -> str:
    """Returns a row for every arm: mean loss, its difference to the base seed by seed, and time of a step.

    Example:
        >>> found = {"loss": 1.5, "parameters": 900, "seconds": 0.2}
        >>> print(recipe_table({("base", 0): found, ("relu2", 0): {**found, "loss": 1.4}, ("rms", 0): None}))
        | change |   loss | to base, nats | step, ms |
        | ------ | -----: | ------------: | -------: |
        | base   | 1.5000 |               |      200 |
        | relu2  | 1.4000 |       -0.1000 |      200 |
        | rms    |    inf |               |          |
    """
    rows = [["change", "loss", "to base, nats", "step, ms"]]
    seeds = [seed for arm, seed in results if arm == BASE]
    bases = [found for (arm, _), found in results.items() if arm == BASE and found is not None]
    for arm in dict.fromkeys(arm for arm, _ in results):
        of_seeds = [found for seed in seeds if (found := results[arm, seed]) is not None]
        if len(of_seeds) < len(seeds):
            rows.append([arm, "inf", "", ""])
            continue
        gains = [one["loss"] - base["loss"] for one, base in zip(of_seeds, bases, strict=True)]
        told = "" if arm == BASE else f"{fmean(gains):+.4f}"
        if told and len(seeds) > 1:
            told += f" ± {interval(gains)[1]:.4f}"
        time = 1000 * fmean(one["seconds"] for one in of_seeds)
        rows.append([arm, f"{fmean(one['loss'] for one in of_seeds):.4f}", told, f"{time:.0f}"])
    return markdown_table(rows)
