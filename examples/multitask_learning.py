"""Trains on five kinds of text at once: a head graph for each, one for all, and separate models.

    python examples/multitask_learning.py
    python examples/multitask_learning.py --methods graph graph-per-task --temperature 5 --seeds 0 1 2
    python examples/multitask_learning.py --learning-rates 2e-3 4e-3 8e-3 --seeds 0 1 2

The tasks are Python's documentation and sources, C++ headers, Unicode names and licences. "plain" and "graph" are one
model for all tasks, without and with a head graph, widened to as many parameters as "graph-per-task" has; of the
models "...-per-task" all share the heads, and each task owns its head graph, low-rank updates of as many parameters,
or its read-out; "separate" is a model for every task, with a fifth of the steps each. All see as many bytes. The first
command takes five minutes on one thread. Expected (docs/regimes.md): mean losses of 1.55 with a head graph or LoRA
for each task, 1.57 with one head graph for all, 1.59 for plain attention, 1.86 for separate models.

The run folder holds a folder for every model with its log and losses.json, curves.png and table.md. Ctrl-C stops it;
the same command with --resume goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean

import torch
from torch import nn

from gohgraph import HeadGraphConfig, LanguageModel, TransformerConfig
from gohgraph.common.tables import markdown_table, mean_and_deviation
from gohgraph.learning.cli.contest_script import ContestScript
from gohgraph.learning.contests.contest import Result
from gohgraph.learning.contests.matching import count_parameters, match_parameters
from gohgraph.learning.data.corpus import sample_batch
from gohgraph.learning.data.domains import DOMAINS, load_domain
from gohgraph.learning.loop import Training
from gohgraph.learning.regimes.adapters import TaskAdapters
from gohgraph.learning.regimes.language import VOCAB_SIZE, window_losses
from gohgraph.learning.regimes.low_rank import add_low_rank, matching_rank
from gohgraph.learning.regimes.multitask import TaskSampler, task_output

PER_TASK = ("graph-per-task", "lora-per-task", "read-out-per-task")
METHODS = ("plain", "graph", *PER_TASK, "separate")


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A model to train.

    Args:
        method: one of METHODS.
        tasks: numbers of the tasks it learns.
    """

    method: str
    tasks: tuple[int, ...]


class MultitaskLearning(ContestScript):
    """The texts, the models, and the losses on every task in the end."""

    name, runs = "multitask_learning", "multitask"
    full = dict(d_model=64, num_heads=8, num_layers=3, d_ff=256, length=64, batch_size=8, steps=1000, windows=64)
    smoke = dict(d_model=16, num_heads=4, num_layers=1, d_ff=8, length=16, batch_size=3, steps=10, windows=4)
    learning_rate = 8e-3
    result = "losses.json"

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
        add("--temperature", type=float, help="tasks are drawn by size^(1/temperature) (default: all alike)")

    def check(self) -> None:
        super().check()
        if self.flags.steps < len(DOMAINS):
            raise ValueError(f"Expected --steps of at least {len(DOMAINS)} (got {self.flags.steps}). Do raise it.")

    def models(self) -> dict[str, Contestant]:
        self.texts = [load_domain(name, limit=20_000 if self.flags.smoke else 500_000) for name in DOMAINS]
        everything = tuple(range(len(self.texts)))
        made = {method: Contestant(method, everything) for method in self.flags.methods if method != "separate"}
        if "separate" in self.flags.methods:
            made |= {f"separate-{name}": Contestant("separate", (task,)) for task, name in enumerate(DOMAINS)}
        return made

    def start(self, contestant: Contestant, seed: int, rate: float, leaf: Path) -> Training:
        steps = self.flags.steps * len(contestant.tasks) // len(self.texts)
        return self.training(
            self.build(contestant),
            self.sampler(contestant.tasks, seed),
            task_output,
            self.config(seed, rate, steps=steps),
            leaf,
            evaluate=lambda model: {"validation_loss": mean(self.losses(model, contestant).values())},
            settings={"contestant": dataclasses.asdict(contestant)},
            description=f"{seed}: {leaf.name}" if len(self.flags.seeds) > 1 else leaf.name,
        )

    def build(self, contestant: Contestant) -> nn.Module:
        """The model of a method; parameters are matched to those of a graph for each task."""
        plain = TransformerConfig(VOCAB_SIZE, **self.values())
        graph = dataclasses.replace(plain, head_graph=HeadGraphConfig())
        method, num_tasks = contestant.method, len(contestant.tasks)
        with torch.random.fork_rng(devices=[]):
            shared, with_graph = (count_parameters(LanguageModel(config)) for config in (plain, graph))
            whole = shared + len(DOMAINS) * (with_graph - shared)
            wide = {"plain": plain, "graph": graph}
            if method in wide:
                wide[method] = match_parameters(LanguageModel, wide[method], whole)
        if method in wide:
            return LanguageModel(wide[method])
        if method == "graph-per-task":
            return TaskAdapters(LanguageModel(graph), num_tasks, frozen=False)
        if method == "read-out-per-task":
            untied = LanguageModel(dataclasses.replace(plain, tie_embeddings=False))
            return TaskAdapters(untied, num_tasks, types=(), names=["head"], frozen=False)
        model = LanguageModel(plain)
        if method == "lora-per-task":
            add_low_rank(model, matching_rank(model, with_graph - shared))
            return TaskAdapters(model, num_tasks, frozen=False)
        return model

    def sampler(self, tasks: Sequence[int], seed: int) -> TaskSampler:
        windows = {**self.values("batch_size", "length"), "seed": seed}
        texts = [self.texts[task].train for task in tasks]
        sources = [partial(sample_batch, text, **windows) for text in texts]
        sizes = [float(len(text)) for text in texts]
        return TaskSampler(sources, sizes=sizes, temperature=self.flags.temperature, seed=seed)

    def losses(self, model: nn.Module, contestant: Contestant) -> dict[str, float]:
        """Validation loss of every task the model has learned, in nats per byte."""
        windows = {"batch_size": 16, "length": self.flags.length, "limit": self.flags.windows}
        found = {}
        for number, task in enumerate(contestant.tasks):
            view = model.for_task(number) if isinstance(model, TaskAdapters) else model
            found[self.texts[task].name] = window_losses(view, self.texts[task].validation, **windows).mean().item()
        return found

    def finish(self, training: Training, leaf: Path) -> Result:
        model = training.accelerator.unwrap_model(training.model).eval()
        contestant = Contestant(**training.folder.settings["contestant"])
        return {
            "method": contestant.method,
            "seed": training.config.seed,
            "losses": self.losses(model, contestant),
            "parameters": count_parameters(model),
        }

    def report(self, results: dict[tuple[int, str], Result]) -> None:
        """Prints and writes the table: losses of every task and their mean, over seeds."""
        rows = []
        for method in self.flags.methods:
            by_seed = []
            for seed in self.flags.seeds:
                # Of separate models, one for every task.
                models = [one for one in results.values() if (one["method"], one["seed"]) == (method, seed)]
                losses = {task: loss for one in models for task, loss in one["losses"].items()}
                size = sum(one["parameters"] for one in models)
                by_seed.append({**losses, "mean": mean(losses.values()), "parameters": size})
            columns = [mean_and_deviation([one[name] for one in by_seed]) for name in (*DOMAINS, "mean")]
            rates = sorted({one["learning_rate"] for one in models})
            rows.append([method, ", ".join(f"{rate:g}" for rate in rates), f"{by_seed[0]['parameters']:,}", *columns])
        self.write_table(markdown_table([["method", "learning rate", "parameters", *DOMAINS, "mean"], *rows]))
        files = ", ".join(str(self.folder / name) for name in ("table.md", "curves.png"))
        print(f"validation loss in nats per byte; written: {files}")


main = MultitaskLearning.main

if __name__ == "__main__":
    sys.exit(main())
