"""All training runs of one task of the quality benchmark, and the times of its steps."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Collection
from datetime import datetime
from functools import cached_property, partial
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.quality_report import Entry
from benchmarks.recipes import Recipe, recipe
from benchmarks.tasks import TASKS, Task
from benchmarks.timing import interleaved, ratios
from benchmarks.trials import TrainingStep, Trial, first_model, run_trial
from gohgraph.common.files import make_folder, read_json, write_text_whole
from gohgraph.graphs.baselines.presets import fields_of
from gohgraph.learning.contests.contest import Contest, Run
from gohgraph.learning.contests.grid import Grid, Point
from gohgraph.learning.contests.in_processes import InProcesses
from gohgraph.learning.contests.matching import count_parameters, match_parameters
from gohgraph.learning.contests.sweep import sweep
from gohgraph.learning.optim import GRAPH_MATRICES, GRAPHS, parameter_groups
from gohgraph.learning.train_config import TrainConfig
from gohgraph.models.config import TransformerConfig

PLAIN, OLD = "plain", recipe("old")
# Settings that may be searched and are of models, not of their training.
OF_MODELS = ("qk_norm",)


class TaskRuns:
    """All runs of one task: made trains what is missing.

    Args:
        name: of the task.
        options: fields of the task that are not its defaults.
        flags: of the command line.
    """

    def __init__(self, name: str, options: dict[str, Any], flags: argparse.Namespace) -> None:
        self.name, self.options, self.flags = name, options, flags
        self.task: Task = TASKS[name](**options)
        self.recipe = recipe(flags.recipe)
        self.configs = equal_configs(self.task, flags.variants, self.recipe, flags.parameters)
        self.folder, self.function = flags.run / "results", partial(run_trial, str(flags.run / "runs"))
        runner = InProcesses(
            self.function,
            lambda run: self._arguments(Trial(name, *run)),
            self.folder,
            loss=lambda log: log[-1][self.task.choosing],
            jobs=flags.jobs,
            file_name=lambda run: Trial(name, *run).name,
            upgrade=_upgraded,
            on_result=self._tell,
        )
        contest = Contest(self.configs, flags.seeds, self.grids, flags.run / name)
        self.results: dict[Run, list[dict[str, Any]]] = contest.hold(runner)
        self.points = {run.name: run.point for run in self.results}

    @cached_property
    def grids(self) -> dict[str, Grid]:
        """What is searched for each variant."""
        given = dict(self.task.grid if self.recipe.grid else {})
        if self.flags.rates is not None:
            given["learning_rate"] = tuple(self.flags.rates)
        given |= dict(self.flags.grid)
        return {
            variant: self.recipe.search(self.task.learning_rates, given, unused=_unused(self.task, config, given))
            for variant, config in self.configs.items()
        }

    def entries(self) -> dict[str, Entry]:
        """Returns what was found of every variant, plain attention first."""
        times, equal_time = self._times(), self._equal_time_logs() if self.flags.equal_time else {}
        entries = {}
        for variant, config in self.configs.items():
            entries[variant] = Entry(
                parameters=count_parameters(self.task.model(config)),
                d_ff=config.d_ff,
                point=self.points[variant].to_dict(),
                border=self.grids[variant].border_of(self.points[variant]),
                logs=[log for run, log in self.results.items() if run.name == variant],
                times=times[variant]["ratios"],
                tokens_per_second=times[variant]["tokens_per_second"],
                tokens=self.task.steps * self._tokens_per_step,
                equal_time_logs=equal_time.get(variant),
            )
        return entries

    def plain_curve(self) -> dict[float, float]:
        """Returns plain attention's mean measure by budget, from runs of their own, over the first three seeds."""
        trials = {
            budget: [Trial(self.name, PLAIN, self.points[PLAIN], seed, budget) for seed in self.flags.seeds[:3]]
            for budget in sorted({1.0, *self.flags.budgets})
        }
        logs = self._sweep([trial for of_budget in trials.values() for trial in of_budget])
        ends = {trial: log[-1][self.task.measure] for trial, log in logs.items()}
        return {budget: fmean(ends[trial] for trial in of_budget) for budget, of_budget in trials.items()}

    def _equal_time_logs(self) -> dict[str, list[list[dict[str, Any]]]]:
        """Every variant's runs of as many steps as fit into the time of plain attention's, at its best point."""
        times = self._times()
        shares = {variant: round(1 / times[variant]["ratios"][1], 2) for variant in self.configs if variant != PLAIN}
        trials = {
            variant: [Trial(self.name, variant, self.points[variant], seed, share) for seed in self.flags.seeds]
            for variant, share in shares.items()
        }
        logs = self._sweep([trial for of_variant in trials.values() for trial in of_variant])
        return {variant: [logs[trial] for trial in of_variant] for variant, of_variant in trials.items()}

    def _sweep(self, trials: list[Trial]) -> dict[Trial, list[dict[str, Any]]]:
        runs = {trial.name: self._arguments(trial) for trial in trials}
        logs = sweep(self.function, runs, self.folder, jobs=self.flags.jobs, upgrade=_upgraded, on_result=self._tell)
        return {trial: logs[trial.name] for trial in trials}

    def _arguments(self, trial: Trial) -> dict[str, Any]:
        return {
            "name": trial.name,
            "task": self.name,
            "options": self.options,
            "config": self._config(trial.variant, trial.point).to_dict(),
            "plain": self._config(PLAIN, trial.point).to_dict(),
            "training": self._training(trial.point, max(2, round(self.task.steps * trial.budget))),
            "seed": trial.seed,
            "threads": self.flags.threads,
        }

    def _config(self, variant: str, point: Point) -> TransformerConfig:
        own: dict[str, Any] = {name: value for name, value in point.to_dict().items() if name in OF_MODELS}
        return dataclasses.replace(self.configs[variant], **own)

    def _training(self, point: Point, steps: int) -> dict[str, Any]:
        own: dict[str, Any] = {"steps": steps, "graph_lr_factor": self.flags.graph_lr_factor}
        own |= {name: value for name, value in point.to_dict().items() if name not in OF_MODELS}
        return {**self.recipe.trained(steps, self.task.training(steps)), **own}

    def _times(self) -> dict[str, dict[str, Any]]:
        """Ratios of a training step's seconds to plain attention's (quartiles) and tokens a second, measured once."""
        file = self.flags.run / self.name / "times.json"
        saved = read_json(file, "delete it") if file.exists() else {}
        known = {variant: TransformerConfig.from_dict(found["config"]) for variant, found in saved.items()}
        if missing := [variant for variant, config in self.configs.items() if known.get(variant) != config]:
            seconds = self._seconds(missing)
            for variant in missing:
                middle = sorted(seconds[variant])[len(seconds[variant]) // 2]
                saved[variant] = {
                    "ratios": ratios(seconds[variant], seconds[PLAIN]),
                    "tokens_per_second": self._tokens_per_step / middle,
                    "config": self.configs[variant].to_dict(),
                }
            make_folder(file.parent)
            write_text_whole(file, json.dumps(saved, indent=1))
        return saved

    @cached_property
    def _tokens_per_step(self) -> int:
        # [B, T], or images [B, 1].
        return next(iter(self.task.batch(0, 0))).shape[:2].numel()

    def _seconds(self, variants: list[str]) -> dict[str, list[float]]:
        threads = torch.get_num_threads()
        torch.set_num_threads(self.flags.threads)
        training = self._training(self.grids[PLAIN].centre, 2) | {"warmup": 1}
        calls = {}
        for variant in dict.fromkeys([PLAIN, *variants]):
            model = first_model(self.task, self.configs[variant], self.configs[PLAIN], 0)
            calls[variant] = TrainingStep(self.task, model, training)
        try:
            with tqdm(total=len(calls) * (self.flags.rounds + 2), unit="step", desc=f"time of {self.name}") as bar:
                return interleaved(calls, self.flags.rounds, bar)
        finally:
            torch.set_num_threads(threads)

    def _tell(self, name: str, log: list[dict[str, Any]] | None) -> None:
        """Says on a line of its own what a run has led to, on the screen and in log.txt."""
        about = "diverged"
        if log is not None:
            last, measure = log[-1], self.task.measure
            about = f"{measure} {last[measure]:.4f}, {self.task.choosing} {last[self.task.choosing]:.4f}"
            about += f", {last.get('step', 0):,} steps in {last.get('seconds', 0.0):.0f} s"
        line = f"{datetime.now():%Y-%m-%d %H:%M:%S} {name}: {about}"
        tqdm.write(line)
        with open(self.flags.run / "log.txt", "a", encoding="utf-8") as file:
            file.write(line + "\n")


def equal_configs(
    task: Task, variants: list[str], recipe: Recipe = OLD, parameters: int | None = None
) -> dict[str, TransformerConfig]:
    """Returns the variants' configurations by name, plain attention first, all widened to as many parameters.

    Args:
        task: what is learned.
        variants: names of presets.
        recipe: what it changes of the task's own configuration.
        parameters: how many; `None` for those of the heaviest variant.

    Raises:
        ValueError: a variant has more parameters than asked for.

    Example:
        >>> task = TASKS["two-cues"]()
        >>> configs = equal_configs(task, ["plain", "outputs"])
        >>> [configs[name].d_ff for name in configs]
        [160, 128]
    """
    names = [PLAIN, *(name for name in variants if name != PLAIN)]
    bare = dataclasses.replace(task.config(), **recipe.model)
    configs = {name: dataclasses.replace(bare, **fields_of(name, task.num_heads)) for name in names}
    wanted = parameters or max(count_parameters(task.model(config)) for config in configs.values())
    return {name: match_parameters(task.model, config, wanted) for name, config in configs.items()}


def _unused(task: Task, config: TransformerConfig, searched: Collection[str]) -> list[str]:
    """Rates of graphs by which the optimizer trains nothing of a model: XSA stands at a site and has no parameters."""
    own_rate = 1.0 if "graph_matrix_lr_factor" in searched else None
    groups = parameter_groups(task.model(config), TrainConfig(steps=1, graph_matrix_lr_factor=own_rate))
    names = {group["name"] for group in groups}
    kinds = {"graph_lr_factor": GRAPHS, "graph_matrix_lr_factor": GRAPH_MATRICES}
    return [setting for setting, groups_of_it in kinds.items() if names.isdisjoint(groups_of_it)]


def _upgraded(arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns a run's saved arguments, their configurations with the fields that later versions added."""
    configs = {key: TransformerConfig.from_dict(arguments[key]).to_dict() for key in ("config", "plain")}
    return {**arguments, **configs}
