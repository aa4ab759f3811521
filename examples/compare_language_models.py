"""Compares plain attention with head graphs and routed heads on text: equal parameters, tuned rates, several seeds.

    python examples/compare_language_models.py --run runs/compare --jobs 2
    python examples/compare_language_models.py --run runs/routing --variants plain moh-75 moh-50 outputs outputs-moh-75

All variants read the same tokens in the same order. The lighter models' feed-forward is widened to the heaviest one's
parameter count. Learning rates are chosen for each variant: the three best of a grid in short pilot runs, on a seed
that is not reported, are trained in full on the first seed, and the best of them on all others. A grid of three or
fewer needs no pilots. An interrupted comparison goes on where it stopped when it is called again.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gohgraph import HeadGraphConfig, LanguageModel, RoutingConfig, SiteConfig, TransformerConfig
from gohgraph.attention.head_load import load_cv
from gohgraph.common.command_line import ArgumentParser, run
from gohgraph.common.tables import mean_and_deviation
from gohgraph.drawing import draw_curves
from gohgraph.learning.contests.matching import count_parameters, match_parameters
from gohgraph.learning.contests.sweep import sweep
from gohgraph.learning.contests.tuning import run_name, tuned_sweep
from gohgraph.learning.data.corpus import evaluation_batches, load_corpus, sample_batch
from gohgraph.learning.loop import TrainConfig, train
from gohgraph.learning.regimes.language import VOCAB_SIZE, next_token_output, window_losses

PILOT_SEED, FINALISTS = 1000, 3
EVALUATIONS = 8
VALIDATION_WINDOWS = 256
LOAD_WINDOWS = 64
RING = SiteConfig.ring(4)
# By the number of heads: a quarter of them are shared, the first kind of graph experts too.
VARIANTS: dict[str, Callable[[int], HeadGraphConfig | None]] = {
    "plain": lambda heads: None,
    "outputs": lambda heads: HeadGraphConfig(),
    "scores": lambda heads: HeadGraphConfig(outputs=None, scores=RING),
    "both": lambda heads: HeadGraphConfig(scores=RING),
    "moh-75": lambda heads: HeadGraphConfig.moh(heads // 4, heads // 2),
    "moh-50": lambda heads: HeadGraphConfig.moh(heads // 4, heads // 4),
    "outputs-moh-75": lambda heads: HeadGraphConfig(routing=RoutingConfig(heads // 4, heads // 2)),
    **{f"experts-{r}": partial(lambda heads, r: HeadGraphConfig.graph_experts(heads // 4, r), r=r) for r in (1, 2, 3)},
}
BASIC = ["plain", "outputs", "scores", "both"]
SMOKE = {"steps": 8, "pilot_steps": 2, "d_model": 16, "num_heads": 4, "num_layers": 1, "length": 16, "batch_size": 2}


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    return run(_parser(), compare, argv)


def compare(flags: argparse.Namespace) -> None:
    """Trains what is missing, then writes and prints the table."""
    if flags.smoke:
        vars(flags).update(SMOKE)
    if min(flags.steps, flags.pilot_steps) < 2:
        raise ValueError("Expected --steps and --pilot-steps of at least 2 (got fewer). Do raise them.")
    if flags.num_heads % 4:
        raise ValueError(f"Expected --num-heads that 4 divides (got {flags.num_heads}). Do change it.")
    folder, configs = Path(flags.run), _configs(flags)
    common = {"data": flags.data, "length": flags.length, "batch_size": flags.batch_size}
    tasks = {name: {"name": name, "config": config.to_dict(), **common} for name, config in configs.items()}
    finalists = _finalists(tasks, flags, folder)
    runs = {
        (name, rate, seed): {**task, "steps": flags.steps, "learning_rate": rate, "seed": seed}
        for seed in flags.seeds
        for name, task in tasks.items()
        for rate in finalists[name]
    }
    function = partial(_train, str(folder / "runs"))
    rates, histories = tuned_sweep(function, runs, folder / "results", loss=_last_loss, jobs=flags.jobs)
    table = _table(configs, rates, histories, flags.seeds)
    (folder / "table.md").write_text(table, encoding="utf-8")
    draw_curves({name: histories[name, flags.seeds[0]] for name in configs}, folder / "curves.png")
    print(f"{table}\ncurves of seed {flags.seeds[0]}: {folder / 'curves.png'}")


def _finalists(
    tasks: dict[str, dict[str, Any]], flags: argparse.Namespace, folder: Path
) -> dict[str, list[float]]:
    """The learning rates of each variant that are trained in full: the best rate of a short run need not be theirs."""
    if len(flags.learning_rates) <= FINALISTS:
        return {name: flags.learning_rates for name in tasks}
    pilots = {
        run_name(name, rate, PILOT_SEED): {
            **task, "steps": flags.pilot_steps, "learning_rate": rate, "seed": PILOT_SEED
        }
        for name, task in tasks.items()
        for rate in flags.learning_rates
    }  # fmt: skip
    function = partial(_train, str(folder / "pilots"))
    tried = sweep(function, pilots, folder / "pilot-results", jobs=flags.jobs, may_diverge=True)

    def loss(name: str, rate: float) -> float:
        history = tried[run_name(name, rate, PILOT_SEED)]
        return math.inf if history is None else _last_loss(history)

    return {name: sorted(flags.learning_rates, key=partial(loss, name))[:FINALISTS] for name in tasks}


def _configs(flags: argparse.Namespace) -> dict[str, TransformerConfig]:
    configs = {
        name: TransformerConfig(
            VOCAB_SIZE,
            d_model=flags.d_model,
            num_heads=flags.num_heads,
            num_layers=flags.num_layers,
            d_ff=4 * flags.d_model,
            max_length=flags.length,
            head_graph=VARIANTS[name](flags.num_heads),
        )
        for name in flags.variants
    }
    heaviest = max(count_parameters(LanguageModel(config)) for config in configs.values())
    return {name: match_parameters(LanguageModel, config, heaviest) for name, config in configs.items()}


def _train(
    folder: str,
    name: str,
    config: dict[str, Any],
    data: str,
    length: int,
    batch_size: int,
    steps: int,
    learning_rate: float,
    seed: int,
) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    corpus = load_corpus(data)
    model = LanguageModel(TransformerConfig.from_dict(config))
    path = Path(folder) / run_name(name, learning_rate, seed)
    every = max(1, steps // EVALUATIONS)
    return train(
        model,
        partial(sample_batch, corpus.train, batch_size=batch_size, length=length, seed=seed),
        next_token_output,
        TrainConfig(
            steps=steps,
            learning_rate=learning_rate,
            warmup=steps // 20,
            eval_every=every,
            checkpoint_every=every,
            keep_checkpoints=1,
            log_every=every,
            seed=seed,
            device="cpu",
        ),
        path,
        evaluate=partial(_evaluate, corpus.validation, length),
        resume=(path / "config.json").exists(),
        settings={"model": config},
        description=path.name,
    )


def _evaluate(validation: torch.Tensor, length: int, model: torch.nn.Module) -> dict[str, float]:
    losses = window_losses(model, validation, batch_size=16, length=length, limit=VALIDATION_WINDOWS)
    inputs, _ = next(evaluation_batches(validation, batch_size=LOAD_WINDOWS, length=length, limit=LOAD_WINDOWS))
    loads = [layer.load for layer in model(inputs).routing]
    measured = {"validation_loss": losses.mean().item()}
    if loads:
        # Not the mean over layers: one that routes all tokens alike should not hide behind the others.
        measured["worst_load_cv"] = load_cv(torch.stack(loads), model.config.head_graph.routing.num_shared).max().item()
    return measured


def _last_loss(history: list[dict[str, Any]]) -> float:
    return history[-1]["validation_loss"]


def _table(
    configs: dict[str, TransformerConfig],
    rates: dict[str, float],
    histories: dict[tuple[str, int], list[dict[str, Any]]],
    seeds: list[int],
) -> str:
    """Validation loss over seeds, on the way and at the end; differences are taken seed by seed."""
    reference = next(iter(configs))
    rows = [row for row in histories[reference, seeds[0]] if row["validation_loss"] is not None]
    shown = [i for i in range(len(rows)) if i in (0, len(rows) // 4 - 1, len(rows) // 2 - 1, len(rows) - 1)]
    steps = " | ".join(f"step {rows[i]['step']:,}" for i in shown)
    lines = [
        f"| attention | parameters | d_ff | learning rate | {steps} | end, minus {reference} |",
        "|" + " --- |" * (5 + len(shown)),
    ]
    for name, config in configs.items():
        losses = [_validated(histories[name, seed]) for seed in seeds]
        base = [_validated(histories[reference, seed]) for seed in seeds]
        cells = " | ".join(mean_and_deviation([run[i] for run in losses], 4) for i in shown)
        ahead = [own[-1] - other[-1] for own, other in zip(losses, base, strict=True)]
        difference = "" if name == reference else mean_and_deviation(ahead, 4, signed=True)
        parameters = count_parameters(LanguageModel(config))
        lines.append(f"| {name} | {parameters:,} | {config.d_ff} | {rates[name]:g} | {cells} | {difference} |")
    lines += _load_lines(list(configs), histories, seeds)
    return "\n".join(lines) + "\n"


def _load_lines(
    names: list[str], histories: dict[tuple[str, int], list[dict[str, Any]]], seeds: list[int]
) -> list[str]:
    """How uneven the load of routed heads is at the end."""
    ends = {name: [histories[name, seed][-1].get("worst_load_cv") for seed in seeds] for name in names}
    worst = [f"{name} {max(values):.2f}" for name, values in ends.items() if None not in values]
    what = "Coefficient of variation of routed heads' load at the end, worst layer of the worst seed: "
    return ["", what + ", ".join(worst) + "."] if worst else []


def _validated(history: list[dict[str, Any]]) -> list[float]:
    return [row["validation_loss"] for row in history if row["validation_loss"] is not None]


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--run", default="runs/compare", help="folder of results, continued if it is there (default: %(default)s)")
    add("--data", default="python-docs", help="a corpus by name, or a text file (default: %(default)s)")
    add("--variants", nargs="+", choices=VARIANTS, default=BASIC, help="the first is the reference")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(default: 0 1 2)")
    add("--steps", type=int, default=4000, help="of every full run (default: %(default)s)")
    add("--pilot-steps", type=int, default=600, help="of the runs that choose the rate (default: %(default)s)")
    add("--learning-rates", nargs="+", type=float, default=[1e-3, 2e-3, 4e-3, 8e-3], help="the grid, the same for all")
    add("--d-model", type=int, default=128, help="(default: %(default)s)")
    add("--num-heads", type=int, default=8, help="(default: %(default)s)")
    add("--num-layers", type=int, default=5, help="(default: %(default)s)")
    add("--length", type=int, default=128, help="bytes per sequence (default: %(default)s)")
    add("--batch-size", type=int, default=4, help="sequences per step (default: %(default)s)")
    add("--jobs", type=int, default=2, help="processes of one thread each (default: %(default)s)")
    add("--smoke", action="store_true", help="a tiny comparison, to see that it runs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
