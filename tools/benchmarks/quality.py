"""What head graphs and their opponents learn: equal parameters, equal data, tuned rates, several seeds.

On every task the lighter models' feed-forward is widened to the heaviest one's parameter count, all variants start from
the same base weights and see the same batches in the same order. Each variant is trained at every learning rate of one
grid on the first seed, and at the best of them on all others. Plain attention is also trained for fewer and for more
steps: where its losses meet a variant's tells how many steps it needs for the same, and where they stand after the same
time tells what the variant is worth at equal time. Differences are taken seed by seed; +- is a 95 % interval (Student's
t over the seeds). Step times are medians of interleaved rounds on one thread, when nothing else is run.

An interrupted benchmark goes on where it stopped when it is called again with the same --run.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm

from benchmarks.quality_report import Entry, draw_quality, quality_table
from benchmarks.tasks import TASKS, Task
from benchmarks.timing import interleaved, machine, ratios
from benchmarks.trials import TrainingStep, Trial, first_model, run_trial
from gohgraph.common.checks import check_int, check_number
from gohgraph.common.files import write_text_whole
from gohgraph.graphs.baselines.presets import PRESETS, preset
from gohgraph.learning.contests.contest import Contest, Run
from gohgraph.learning.contests.in_processes import InProcesses
from gohgraph.learning.contests.matching import count_parameters, match_parameters
from gohgraph.learning.contests.sweep import sweep
from gohgraph.models.config import TransformerConfig

PLAIN = "plain"
# Every opponent that is not another one's smaller form, then head graphs at every site.
BASIC = ["plain", "head-gate", "element-gate", "head-norm", "norm-element-gate", "talking-heads", "dcmha"]
BASIC += ["knocking-heads", "mea", "moh-75", "static-graph", "frozen-graph"]
BASIC += ["outputs", "norm-outputs", "scores", "values", "both", "outputs-values"]
BUDGETS = (0.5, 2.0, 4.0)
SIZES = ("d_model", "num_heads", "num_layers")
TIMED_ROUNDS = 20
SMOKE = {"steps": 4, "seeds": [0, 1], "rates": [4e-3], "budgets": [2.0], "tasks": ["two-cues"], "rounds": 2}
SMOKE |= {"variants": ["plain", "outputs"]}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    add = parser.add_argument
    add("--run", type=Path, default=Path("runs/quality"), help="folder, continued if it is there (%(default)s)")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="(default: all)")
    add("--variants", nargs="+", choices=PRESETS, default=BASIC, metavar="NAME", help=f"of {' '.join(PRESETS)}")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="(default: 0 1 2 3 4)")
    add("--rates", nargs="+", type=float, help="the grid of learning rates (default: each task's own)")
    add("--graph-lr-factor", type=float, default=1.0, help="learning rate of head graphs, times the rate (%(default)s)")
    add("--steps", type=int, help="of a full run (default: each task's own)")
    for size in SIZES:
        add(f"--{size.replace('_', '-')}", type=int, help="of the models (default: each task's own)")
    add("--budgets", nargs="*", type=float, default=list(BUDGETS), help="of plain attention, times the steps")
    add("--data", help="text of the task 'text': a corpus by name, or a file")
    add("--rounds", type=int, default=TIMED_ROUNDS, help="of timing (default: %(default)s)")
    add("--jobs", type=int, default=2, help="processes of one thread each (default: %(default)s)")
    add("--smoke", action="store_true", help="a tiny benchmark, to see that it runs")


def run(flags: argparse.Namespace) -> None:
    """Trains what is missing, then times, writes and prints the tables."""
    if flags.smoke:
        vars(flags).update(SMOKE)
    _check(flags)
    print(machine("cpu", "float32", 1, flags.rounds))
    texts, entries = [], {}
    for name in flags.tasks:
        runs = TaskRuns(name, flags)
        entries[name] = runs.entries()
        texts.append(quality_table(name, runs.task, flags.seeds, entries[name], runs.plain_curve()))
        print("\n" + texts[-1])
    _write(flags, texts, entries)


class TaskRuns:
    """All runs of one task.

    Args:
        name: of the task.
        flags: of the command line.
    """

    def __init__(self, name: str, flags: argparse.Namespace) -> None:
        self.name, self.flags = name, flags
        self.options = _options(name, flags)
        self.task: Task = TASKS[name](**self.options)
        self.configs = equal_configs(self.task, flags.variants)
        self.folder, self.function = flags.run / "results", partial(run_trial, str(flags.run / "runs"))
        runner = InProcesses(
            self.function,
            lambda run: self._arguments(Trial(name, *run)),
            self.folder,
            loss=lambda log: log[-1][self.task.choosing],
            jobs=flags.jobs,
            file_name=lambda run: Trial(name, *run).name,
        )
        contest = Contest(self.configs, flags.seeds, self.task.learning_rates, flags.run / name)
        self.results: dict[Run, list[dict[str, Any]]] = contest.hold(runner)
        self.rates = {run.name: run.rate for run in self.results}

    def entries(self) -> dict[str, Entry]:
        """Returns what was found of every variant, plain attention first."""
        times = self._times()
        found = {}
        for variant, config in self.configs.items():
            logs = [log for run, log in self.results.items() if run.name == variant]
            parameters = count_parameters(self.task.model(config))
            found[variant] = Entry(parameters, config.d_ff, self.rates[variant], logs, times[variant])
        return found

    def plain_curve(self) -> dict[float, float]:
        """Returns plain attention's mean measure by budget, from runs of their own, over the first three seeds."""
        trials = {
            budget: [Trial(self.name, PLAIN, self.rates[PLAIN], seed, budget) for seed in self.flags.seeds[:3]]
            for budget in sorted({1.0, *self.flags.budgets})
        }
        runs = {trial.name: self._arguments(trial) for own in trials.values() for trial in own}
        logs = sweep(self.function, runs, self.folder, jobs=self.flags.jobs)
        return {budget: fmean(self._end(logs[trial.name]) for trial in own) for budget, own in trials.items()}

    def _arguments(self, trial: Trial) -> dict[str, Any]:
        return {
            "name": trial.name,
            "task": self.name,
            "options": self.options,
            "config": self.configs[trial.variant].to_dict(),
            "plain": self.configs[PLAIN].to_dict(),
            "rate": trial.rate,
            "seed": trial.seed,
            "steps": max(2, round(self.task.steps * trial.budget)),
            "graph_lr_factor": self.flags.graph_lr_factor,
        }

    def _times(self) -> dict[str, list[float]]:
        """Seconds of a training step as ratios to plain attention: lower quartile, median and upper quartile."""
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        calls = {
            variant: TrainingStep(self.task, first_model(self.task, config, self.configs[PLAIN], 0))
            for variant, config in self.configs.items()
        }
        try:
            with tqdm(total=len(calls) * (self.flags.rounds + 2), unit="step", desc=f"time of {self.name}") as bar:
                seconds = interleaved(calls, self.flags.rounds, bar)
        finally:
            torch.set_num_threads(threads)
        return {variant: ratios(own, seconds[PLAIN]) for variant, own in seconds.items()}

    def _end(self, log: list[dict[str, Any]]) -> float:
        return log[-1][self.task.measure]


def equal_configs(task: Task, variants: list[str]) -> dict[str, TransformerConfig]:
    """Returns the variants' configurations by name, plain attention first, widened to the heaviest one's parameters.

    Example:
        >>> task = TASKS["two-cues"]()
        >>> configs = equal_configs(task, ["plain", "outputs"])
        >>> [configs[name].d_ff for name in configs]
        [160, 128]
    """
    names = [PLAIN, *(name for name in variants if name != PLAIN)]
    bare = task.config()
    configs = {name: dataclasses.replace(bare, head_graph=preset(name, task.num_heads)) for name in names}
    heaviest = max(count_parameters(task.model(config)) for config in configs.values())
    return {name: match_parameters(task.model, config, heaviest) for name, config in configs.items()}


def _options(name: str, flags: argparse.Namespace) -> dict[str, Any]:
    given = {size: getattr(flags, size) for size in (*SIZES, "steps")}
    options: dict[str, Any] = {size: value for size, value in given.items() if value is not None}
    if flags.rates is not None:
        options["learning_rates"] = list(flags.rates)
    if name == "text" and flags.data is not None:
        options["data"] = flags.data
    return options


def _write(flags: argparse.Namespace, texts: list[str], entries: dict[str, dict[str, Entry]]) -> None:
    write_text_whole(flags.run / "tables.md", "\n\n".join(texts) + "\n")
    measures = {name: TASKS[name].measure for name in entries}
    with open(flags.run / "results.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "variant", "parameters", "d_ff", "rate", "time_ratio", "seed", "measure", "value"])
        for name, found in entries.items():
            for variant, entry in found.items():
                for seed, value in zip(flags.seeds, entry.ends(measures[name]), strict=True):
                    about = (entry.parameters, entry.d_ff, entry.rate, round(entry.time_ratio, 4))
                    writer.writerow([name, variant, *about, seed, measures[name], value])
    saved = {name: {v: dataclasses.asdict(entry) for v, entry in found.items()} for name, found in entries.items()}
    write_text_whole(flags.run / "results.json", json.dumps(saved, indent=1))
    draw_quality(entries, measures, flags.run / "quality.png")
    print(f"\npicture: {flags.run / 'quality.png'}; every run: {flags.run / 'results.csv'}")


def _check(flags: argparse.Namespace) -> None:
    for name, low in (("jobs", 1), ("rounds", 2)):
        check_int(f"--{name}", getattr(flags, name), low=low)
    for name, low in (("steps", 2), *((size, 1) for size in SIZES)):
        if getattr(flags, name) is not None:
            check_int("--" + name.replace("_", "-"), getattr(flags, name), low=low)
    for name in ("seeds", "variants", "tasks"):
        values = getattr(flags, name)
        if len(set(values)) < len(values):
            raise ValueError(f"Expected different --{name} (got {values}). Do name each once.")
    positive = {"rates": flags.rates or (), "budgets": flags.budgets, "graph-lr-factor": [flags.graph_lr_factor]}
    for name, values in positive.items():
        for value in values:
            check_number(f"--{name}", value, above=0)
