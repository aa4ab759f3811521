"""Learns four kinds of text one after another: adapters for each task over frozen heads, and what they have to beat.

    python examples/continual_learning.py
    python examples/continual_learning.py --methods graph lora both --seeds 0 1 2 --learning-rates 5e-3 1e-2 2e-2

A small language model is trained on Python's documentation, and then learns Python sources, C++ headers, Unicode names
and licences, each only once. Fine-tuning, EWC and replay change the whole model; "graph", "lora" and "both" leave it
frozen and give each task a head graph, low-rank updates of all linear layers (LoRA), or half of each, of about equal
size. The table shows the average loss after the last task, backward transfer and forgetting, and for the adapters
also what is lost when the task is not told but inferred from a quarter of each window. The first command takes
four minutes on one thread. Expected (docs/regimes.md): adapters forget nothing; average losses of 2.34 with LoRA,
2.44 with a head graph of its size and 2.09 with replay, from 3.26 of the base.

The run folder holds the base, a folder for every method with its tasks, results/ with the losses of every run, and
table.md. Ctrl-C stops it; the same command with --resume goes on.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
from functools import partial
from operator import itemgetter
from statistics import mean
from typing import Any

import torch

from gohgraph import HeadGraphConfig, LanguageModel, SiteConfig, TransformerConfig
from gohgraph.common.tables import markdown_table, mean_and_deviation
from gohgraph.learning.cli.script import Script
from gohgraph.learning.contests.contest import Contest, Run
from gohgraph.learning.contests.grid import Grid
from gohgraph.learning.contests.in_processes import InProcesses
from gohgraph.learning.contests.matching import count_parameters
from gohgraph.learning.data.corpus import Corpus
from gohgraph.learning.data.domains import load_domain
from gohgraph.learning.loop import train_together
from gohgraph.learning.regimes.adapters import TaskAdapters
from gohgraph.learning.regimes.continual import (
    ElasticWeights,
    Learner,
    PerTask,
    Replay,
    Windows,
    average_loss,
    backward_transfer,
    forgetting,
    learn_in_sequence,
)
from gohgraph.learning.regimes.language import VOCAB_SIZE
from gohgraph.learning.regimes.low_rank import ALL_LINEAR, add_low_rank, matching_rank
from gohgraph.learning.train_config import FREE_ON_RESUME

BASE, TASKS = "documentation", ("python", "cpp", "names", "licences")
WHOLE, ADAPTERS = ("fine-tuning", "ewc", "replay"), ("graph", "lora", "both")
METHODS = (*WHOLE, *ADAPTERS)
# Learning rates where no grid is given.
DEFAULT_RATES = {ADAPTERS: [1e-2], WHOLE: [2e-3]}
# What does not change the result of a run.
FREE_FLAGS = {"run", "resume", "methods", "seeds", "learning_rates", "threads", *FREE_ON_RESUME}
# Of the table, by what a run returns.
COLUMNS = {
    "average_loss": "average loss",
    "backward_transfer": "backward transfer",
    "forgetting": "forgetting",
    "inferred_loss": "loss, task inferred",
    "inferred": "task found",
}


class ContinualLearning(Script):
    """The base, what every method makes of it task by task, and how much each forgets."""

    name, runs = "continual_learning", "continual"
    full = dict(
        d_model=64, num_heads=8, num_layers=3, d_ff=256, length=64, batch_size=8, steps=150, base_steps=600, windows=64
    )  # fmt: skip
    smoke = dict(
        d_model=16, num_heads=4, num_layers=1, d_ff=8, length=16, batch_size=4, steps=4, base_steps=6, windows=4
    )  # fmt: skip

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser) -> None:
        add, ((adapters,), (whole,)) = parser.add_argument, DEFAULT_RATES.values()
        add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
        add("--in-degree", type=int, default=4, help="of the head graph, a ring (default %(default)s)")
        add("--learning-rates", type=float, nargs="+", metavar="RATE", help="of several, each method takes its best on "
            f"the first seed (default: {adapters:g} for adapters, {whole:g} for the whole model)")
        add("--base-learning-rate", type=float, default=2e-3, help="of the model they begin with (default %(default)s)")
        add("--ewc-strength", type=float, default=1e4, help="lambda of EWC (default %(default)s)")
        add("--replay-share", type=float, default=0.5, help="of a batch from earlier tasks (default %(default)s)")
        add("--replay-memory", type=int, default=50_000, help="bytes kept of each earlier task (default %(default)s)")

    def check(self) -> None:
        degree, heads = self.flags.in_degree, self.flags.num_heads
        if degree < 2 or degree > heads or degree % 2:
            raise ValueError(
                f"Expected an even --in-degree of 2..{heads} (got {degree}). Do change it: 'both' takes half of it."
            )

    def train(self) -> None:
        contests = self.contests()
        results: dict[Run, dict[str, Any]] = {}
        limit = 20_000 if self.flags.smoke else 500_000
        text, *self.tasks = (load_domain(name, limit=limit) for name in (BASE, *TASKS))
        self.bases = {seed: self.train_base(text, seed) for seed in self.flags.seeds}
        runner = InProcesses(self.learn, self.arguments, self.folder / "results", loss=itemgetter("average_loss"))
        for contest in contests:
            results |= contest.hold(runner)
        self.report(results)

    def contests(self) -> list[Contest]:
        """One over the grid; without one, adapters and whole models have a learning rate each."""
        contests, flags = [], self.flags
        for group, rates in ({METHODS: flags.learning_rates} if flags.learning_rates else DEFAULT_RATES).items():
            if names := [name for name in flags.methods if name in group]:
                contests.append(Contest(dict.fromkeys(names), flags.seeds, Grid.of_rates(rates), self.folder))
        return contests

    def train_base(self, text: Corpus, seed: int) -> LanguageModel:
        """Trains the model that all methods begin with, as the only task of a learner."""
        torch.manual_seed(seed)
        model = LanguageModel(TransformerConfig(VOCAB_SIZE, **self.values()))
        learner = Learner(model, [text], self.windows(seed))
        training = self.training(
            model,
            partial(learner.batch, 0),
            learner.loss,
            self.config(seed, self.flags.base_learning_rate, steps=self.flags.base_steps),
            self.seed_folder(seed) / "base",
            evaluate=lambda model: {"validation_loss": learner.measure(0).mean().item()},
            settings={"model": model.config.to_dict()},
            description=f"base: {text.name}",
        )
        train_together([training])
        return model.cpu()

    def windows(self, seed: int) -> Windows:
        return Windows(self.flags.batch_size, self.flags.length, limit=self.flags.windows, seed=seed)

    def arguments(self, run: Run) -> dict[str, Any]:
        """What the result of a run depends on."""
        settings = {name: value for name, value in vars(self.flags).items() if name not in FREE_FLAGS}
        return {"method": run.name, "seed": run.seed, "rate": run.rate, "settings": settings}

    def learn(self, *, method: str, seed: int, rate: float, settings: dict[str, Any]) -> dict[str, Any]:
        """Takes a method through all tasks at a learning rate; returns its losses, and how much is forgotten."""
        flags, tasks, adapts = self.flags, range(len(self.tasks)), method in ADAPTERS
        place = self.seed_folder(seed) / method
        if flags.learning_rates and len(flags.learning_rates) > 1:
            place = place / f"rate-{rate:g}"
        torch.manual_seed(seed)
        learner = self.learner(method, seed)
        before = [learner.measure(task).mean().item() for task in tasks]
        # Adapters decay towards the shared model by nothing, as PEFT's do, and take the whole of their grid's rates.
        whole_rate = {"graph_lr_factor": 1.0} if flags.graph_lr_factor is None else {}
        config = self.config(seed, rate, **({"weight_decay": 0.0, **whole_rate} if adapts else {}))
        about = {"method": method, "model": self.bases[seed].config.to_dict(), "flags": settings}
        losses = learn_in_sequence(learner, config, place, resume=flags.resume, settings=about)
        result = {
            "losses": losses.tolist(),
            "before": before,
            "parameters": learner.model.size() if isinstance(learner, PerTask) else count_parameters(learner.model),
            "average_loss": average_loss(losses),
            "backward_transfer": backward_transfer(losses),
            "forgetting": forgetting(losses),
        }
        if isinstance(learner, PerTask):
            inferred = [learner.measure_inferred(task, prefix=max(2, flags.length // 4)) for task in tasks]
            result["inferred_loss"] = mean(values.mean().item() for values, _ in inferred)
            result["inferred"] = mean(share for _, share in inferred)
        return result

    def learner(self, method: str, seed: int) -> Learner:
        """The base with what keeps it from forgetting."""
        flags, base, tasks, windows = self.flags, self.bases[seed], self.tasks, self.windows(seed)
        if method in ADAPTERS:
            return PerTask(TaskAdapters(adapted(base, method, flags.in_degree), len(tasks)), tasks, windows)
        model = copy.deepcopy(base)
        if method == "ewc":
            return ElasticWeights(model, tasks, windows, strength=flags.ewc_strength)
        if method == "replay":
            return Replay(model, tasks, windows, memory=flags.replay_memory, share=flags.replay_share)
        return Learner(model, tasks, windows)

    def report(self, results: dict[Run, dict[str, Any]]) -> None:
        """Prints and writes the table: means over seeds, with their standard deviations."""
        flags, points = self.flags, {run.name: run.point for run in results}
        by_method = {name: [results[Run(name, points[name], seed)] for seed in flags.seeds] for name in flags.methods}
        untrained = mean_and_deviation([mean(result["before"]) for result in by_method[flags.methods[0]]])
        rows = [["base, untouched", "", "0", untrained, *[""] * (len(COLUMNS) - 1)]]
        for name, seeds in by_method.items():
            # Whole models have no task to infer.
            values = (mean_and_deviation([one[key] for one in seeds]) if key in seeds[0] else "" for key in COLUMNS)
            rows.append([name, str(points[name]), f"{seeds[0]['parameters']:,}", *values])
        self.write_table(markdown_table([["method", "learning rate", "trained per task", *COLUMNS.values()], *rows]))
        print(f"losses in nats per byte over {', '.join(TASKS)}; written: {self.folder / 'table.md'}")


def adapted(base: LanguageModel, method: str, in_degree: int) -> LanguageModel:
    """The base with neutral adapters: as many parameters in each method as whole edges and ranks allow."""
    model = with_ring(base, {"graph": in_degree, "lora": 0, "both": in_degree // 2}[method])
    if method != "graph":
        with torch.random.fork_rng(devices=[]):
            size = count_parameters(with_ring(base, in_degree))
        rank = matching_rank(base, size - count_parameters(model), ALL_LINEAR)
        add_low_rank(model, rank, targets=ALL_LINEAR)
    return model


def with_ring(base: LanguageModel, in_degree: int) -> LanguageModel:
    """The base with a neutral head graph, a ring; without one at an in-degree of 0."""
    graph = HeadGraphConfig(SiteConfig.ring(in_degree)) if in_degree else None
    model = LanguageModel(dataclasses.replace(base.config, head_graph=graph))
    missing, unexpected = model.load_state_dict(base.state_dict(), strict=False)
    if unexpected or any("output_graph" not in name for name in missing):
        raise RuntimeError(f"the base does not fit the model with adapters: {missing}, {unexpected}")
    return model


main = ContinualLearning.main

if __name__ == "__main__":
    sys.exit(main())
