"""Steps to 90 % of associative recall by two cues: plain attention against head graphs on scores and on outputs.

    python examples/associative_recall.py --run runs/recall --jobs 2

The model is the same at all sizes of the task; what grows is the number of cues over head_dim. Where they are several
times as many, the scores of one head cannot hold the match of both cues (rank-limited). All variants see the same
episodes in the same order and are widened in the feed-forward to the heaviest one's parameter count; every learning
rate of the grid is run with every seed, and each variant is shown at its own best. An interrupted experiment goes on
where it stopped when called again.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from gohgraph import HeadGraphConfig, SiteConfig, TransformerConfig
from gohgraph.common.command_line import ArgumentParser, run
from gohgraph.drawing.curves import CURVES
from gohgraph.drawing.figures import INK, WIDTH, new_figure, save_figure
from gohgraph.learning.contests.matching import count_parameters, match_parameters
from gohgraph.learning.contests.sweep import sweep
from gohgraph.learning.data.recall import RecallModel, RecallTask, recall_batch

GOAL = 0.9
EVALUATION_SEED, EVALUATION_EPISODES = -1, 512
D_MODEL, NUM_HEADS, NUM_LAYERS, D_FF = 64, 8, 1, 128
PLAIN = "plain"
VARIANTS = {
    PLAIN: None,
    "score-ring-2": HeadGraphConfig(outputs=None, scores=SiteConfig.ring(2)),
    "score-ring-4": HeadGraphConfig(outputs=None, scores=SiteConfig.ring(4)),
    "score-complete": HeadGraphConfig(outputs=None, scores=SiteConfig()),
    "output-complete": HeadGraphConfig(outputs=SiteConfig()),
}
FULL = {
    "run": "runs/recall",
    "sizes": [8, 32, 64],
    "seeds": [0, 1, 2],
    "learning_rates": [2.5e-3, 5e-3, 1e-2, 2e-2],
    "steps": 300,
}
SMOKE = {"run": "runs/recall-smoke", "sizes": [8], "seeds": [0], "learning_rates": [1e-2], "steps": 20}


class Trial(NamedTuple):
    """One training run: which cell of the table it belongs to."""

    num_cues: int
    variant: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """The name of its result."""
        return f"{self.num_cues}-cues_{self.variant}_{self.rate:g}_seed-{self.seed}"


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table: one variant at one size, at its best learning rate.

    Args:
        steps: steps to the goal of every seed; `None` where the cap came first.
        cap: steps of every run.
        accuracy: mean over seeds at the last step.
    """

    num_cues: int
    variant: str
    parameters: int
    d_ff: int
    rate: float
    steps: tuple[int | None, ...]
    cap: int
    accuracy: float

    @property
    def censored(self) -> bool:
        """True when a seed did not reach the goal; the mean is then a lower bound."""
        return None in self.steps

    @property
    def mean_steps(self) -> float:
        """Mean over seeds, the cap in place of what was not reached."""
        return mean(self.cap if step is None else step for step in self.steps)

    def show_steps(self) -> str:
        """Mean and standard deviation, or the bound and how many seeds reached the goal."""
        if self.censored:
            reached = sum(step is not None for step in self.steps)
            return f"> {self.mean_steps:.0f} ({reached} of {len(self.steps)} seeds)"
        return f"{self.mean_steps:.0f}" + (f" ± {stdev(self.steps):.0f}" if len(self.steps) > 1 else "")

    def show_ratio(self, plain: Row) -> str:
        """Mean steps over plain attention's, as a bound where one of them is one."""
        if self is plain or (self.censored and plain.censored):
            return "1" if self is plain else "–"
        bound = ">" if self.censored else "<" if plain.censored else ""
        return f"{bound} {self.mean_steps / plain.mean_steps:.2f}".strip()


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    return run(_parser(), compare, argv)


def compare(flags: argparse.Namespace) -> None:
    """Trains what is missing, then writes and prints the table."""
    for name, value in (SMOKE if flags.smoke else FULL).items():
        if getattr(flags, name) is None:
            setattr(flags, name, value)
    _check(flags)
    folder = Path(flags.run)
    configs = {num_cues: equal_configs(_task(num_cues)) for num_cues in flags.sizes}
    trials = [
        Trial(num_cues, variant, rate, seed)
        for seed in flags.seeds
        for num_cues in flags.sizes
        for rate in flags.learning_rates
        for variant in VARIANTS
    ]
    common = {"steps": flags.steps, "every": flags.every, "threads": flags.threads}
    runs = {
        trial.name: {
            "task": dataclasses.asdict(_task(trial.num_cues)),
            "config": configs[trial.num_cues][trial.variant].to_dict(),
            "rate": trial.rate,
            "seed": trial.seed,
            **common,
        }
        for trial in trials
    }
    results = sweep(train, runs, folder / "runs", jobs=flags.jobs)
    curves = {trial: results[trial.name] for trial in trials}
    rows = [
        _best_row(num_cues, variant, config, curves)
        for num_cues in flags.sizes
        for variant, config in configs[num_cues].items()
    ]
    _write(folder, rows, curves, flags)


def equal_configs(task: RecallTask) -> dict[str, TransformerConfig]:
    """Returns all variants by name, their d_ff widened to the parameter count of the heaviest."""
    shape = TransformerConfig(
        task.vocab_size, D_MODEL, NUM_HEADS, num_layers=NUM_LAYERS, d_ff=D_FF, positions="none"
    )
    configs = {name: dataclasses.replace(shape, head_graph=graph) for name, graph in VARIANTS.items()}
    build = partial(RecallModel, task)
    heaviest = max(count_parameters(build(config)) for config in configs.values())
    return {name: match_parameters(build, config, heaviest) for name, config in configs.items()}


def train(
    task: dict[str, int], config: dict[str, Any], rate: float, seed: int, steps: int, every: int, threads: int
) -> list[tuple[int, float]]:
    """Trains one model and returns its accuracy on held-out episodes as (step, accuracy)."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    episodes = RecallTask(**task)
    model = RecallModel(episodes, TransformerConfig.from_dict(config))
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    held_out = recall_batch(dataclasses.replace(episodes, batch_size=EVALUATION_EPISODES), 0, EVALUATION_SEED)
    curve = []
    for step in range(1, steps + 1):
        cues, values, answers = recall_batch(episodes, step, seed)
        loss = F.cross_entropy(model(cues, values), answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % every == 0 or step == steps:
            curve.append((step, _accuracy(model, *held_out)))
    return curve


@torch.no_grad()
def _accuracy(model: RecallModel, cues: torch.Tensor, values: torch.Tensor, answers: torch.Tensor) -> float:
    return (model(cues, values).argmax(dim=-1) == answers).float().mean().item()


def _task(num_cues: int) -> RecallTask:
    return RecallTask(num_cues=num_cues)


def _best_row(
    num_cues: int, variant: str, config: TransformerConfig, curves: dict[Trial, list[tuple[int, float]]]
) -> Row:
    """The row of the learning rate with the fewest mean steps; where none reaches the goal, of the best accuracy."""
    grid: dict[float, list[list[tuple[int, float]]]] = {}
    for trial, curve in curves.items():
        if (trial.num_cues, trial.variant) == (num_cues, variant):
            grid.setdefault(trial.rate, []).append(curve)
    rows = [
        Row(
            num_cues,
            variant,
            count_parameters(RecallModel(_task(num_cues), config)),
            config.d_ff,
            rate,
            tuple(map(_steps_to_goal, seeds)),
            seeds[0][-1][0],
            mean(curve[-1][1] for curve in seeds),
        )
        for rate, seeds in grid.items()
    ]
    return min(rows, key=lambda row: (row.mean_steps, -row.accuracy))


def _steps_to_goal(curve: Sequence[tuple[int, float]]) -> int | None:
    return next((step for step, accuracy in curve if accuracy >= GOAL), None)


def table(rows: Sequence[Row]) -> str:
    """Returns the Markdown table of every size."""
    lines = []
    for num_cues in dict.fromkeys(row.num_cues for row in rows):
        own = [row for row in rows if row.num_cues == num_cues]
        plain = next(row for row in own if row.variant == PLAIN)
        limited = "rank-limited" if num_cues > D_MODEL // NUM_HEADS else "not rank-limited"
        lines += [
            f"{num_cues} cues of either kind, {num_cues * NUM_HEADS / D_MODEL:g} x head_dim ({limited}):",
            "",
            f"| attention | parameters | d_ff | steps to {100 * GOAL:g} % | of plain's | learning rate "
            "| accuracy at the end |",
            "|" + " --- |" * 7,
        ]
        lines += [
            f"| {row.variant} | {row.parameters:,} | {row.d_ff} | {row.show_steps()} | {row.show_ratio(plain)} "
            f"| {row.rate:g} | {row.accuracy:.3f} |"
            for row in own
        ]
        lines.append("")
    count, cap = len(rows[0].steps), rows[0].cap
    lines.append(
        f"Mean ± standard deviation over {count} seed{'s' if count > 1 else ''}; a seed that needs more than {cap} "
        f"steps counts as {cap}, and the mean is then a lower bound (>)."
    )
    return "\n".join(lines) + "\n"


def _write(
    folder: Path, rows: Sequence[Row], curves: dict[Trial, list[tuple[int, float]]], flags: argparse.Namespace
) -> None:
    text = table(rows)
    (folder / "table.md").write_text(text, encoding="utf-8")
    saved = {"flags": vars(flags), "rows": [dataclasses.asdict(row) for row in rows]}
    (folder / "results.json").write_text(json.dumps(saved, indent=1), encoding="utf-8")
    with open(folder / "results.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*Trial._fields, "steps_to_goal", "accuracy"])
        writer.writerows([*trial, _steps_to_goal(curve), curve[-1][1]] for trial, curve in curves.items())
    _draw(folder / "accuracy.png", rows, curves)
    print(text)
    print(f"accuracy over steps: {folder / 'accuracy.png'}; every run: {folder / 'results.csv'}")


def _draw(path: Path, rows: Sequence[Row], curves: dict[Trial, list[tuple[int, float]]]) -> None:
    """One panel per size: the mean over seeds of every variant at its best learning rate, the seeds faint."""
    sizes = list(dict.fromkeys(row.num_cues for row in rows))
    figure = new_figure(max(WIDTH, 3 * len(sizes)), 3.4)
    panels = dict(zip(sizes, figure.subplots(1, len(sizes), squeeze=False, sharey=True)[0], strict=True))
    colours = dict(zip(VARIANTS, CURVES, strict=False))
    for row in rows:
        axis = panels[row.num_cues]
        own = [curve for trial, curve in curves.items() if trial[:3] == (row.num_cues, row.variant, row.rate)]
        for curve in own:
            axis.plot(*zip(*curve, strict=True), color=colours[row.variant], alpha=0.25, linewidth=0.8)
        points = [(step[0][0], mean(accuracy for _, accuracy in step)) for step in zip(*own, strict=True)]
        axis.plot(*zip(*points, strict=True), color=colours[row.variant], linewidth=1.8, label=row.variant)
    for num_cues, axis in panels.items():
        axis.set_title(f"{num_cues} cues, {num_cues * NUM_HEADS / D_MODEL:g} x head_dim", fontsize=10, color=INK)
        axis.axhline(GOAL, color="#999999", linewidth=0.8, linestyle="--")
        axis.set_xlabel("step", color=INK)
        axis.spines[["top", "right"]].set_visible(False)
    panels[sizes[0]].set_ylabel("accuracy on held-out episodes", color=INK)
    panels[sizes[-1]].legend(frameon=False, fontsize=8, labelcolor=INK, loc="lower right")
    save_figure(figure, path)


def _check(flags: argparse.Namespace) -> None:
    for name, low in (("steps", 1), ("every", 1), ("threads", 1), ("jobs", 1)):
        if getattr(flags, name) < low:
            raise ValueError(f"Expected --{name} >= {low} (got {getattr(flags, name)}). Do raise it.")
    for name, low in (("sizes", 1), ("seeds", 0)):
        values = getattr(flags, name)
        if min(values) < low or len(set(values)) < len(values):
            raise ValueError(f"Expected different --{name} of at least {low} (got {values}). Do name each once.")
    rates = flags.learning_rates
    if not all(0 < rate < float("inf") for rate in rates) or len({f"{rate:g}" for rate in rates}) < len(rates):
        raise ValueError(f"Expected different --learning-rates above 0 (got {rates}). Do pass e.g. 0.01.")


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--run", help=f"folder of results, continued if it is there (default: {FULL['run']})")
    add("--sizes", nargs="+", type=int, help="cues of either kind, for head_dim 8 (default: 8 32 64)")
    add("--seeds", nargs="+", type=int, help="(default: 0 1 2)")
    add("--learning-rates", nargs="+", type=float, help="the grid, the same for all (default: 0.0025 0.005 0.01 0.02)")
    add("--steps", type=int, help=f"of every run, the cap (default: {FULL['steps']})")
    add("--every", type=int, default=10, help="steps between evaluations (default: %(default)s)")
    add("--threads", type=int, default=1, help="of every process (default: %(default)s)")
    add("--jobs", type=int, default=2, help="processes side by side (default: %(default)s)")
    add("--smoke", action="store_true", help="a tiny experiment, to see that it runs; flags given still count")
    return parser


if __name__ == "__main__":
    sys.exit(main())
