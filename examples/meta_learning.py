"""Meta-learns to tell digits apart after a few examples: which part of the model should adapt to a task?

    python examples/meta_learning.py
    python examples/meta_learning.py --methods maml graph lora --shots 1 --seeds 0 1 2

Tasks are drawn from scikit-learn's handwritten digits: 0 to 5 in four rotations for learning, 6 to 9 only for the test.
In the inner loop "maml" adapts all parameters, "first-order" too but without second derivatives, "reptile" all with its
own outer step, "read-out" the last layer (ANIL), "graph" the head graphs alone, "lora" low-rank updates of the
attention's weights of about as many parameters, "graph+read-out" and "lora+read-out" both. The first command takes
ten minutes on one thread. Expected (docs/regimes.md): 74 % with "read-out", 66 % with "maml", 58 % with "graph" and
45 % with "lora" alone, where chance is 33 %.

The run folder holds a folder for every method with its log and result.json, curves.png and table.md. Ctrl-C stops it;
the same command with --resume goes on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gohgraph import Classifier, ClassifierConfig, HeadGraphConfig, HeadGraphConv, TransformerConfig
from gohgraph.common.tables import markdown_table, mean_and_deviation
from gohgraph.learning.cli.contest_script import ContestScript
from gohgraph.learning.contests.contest import Result, by_model
from gohgraph.learning.contests.matching import count_parameters
from gohgraph.learning.data.classification import load_digits
from gohgraph.learning.data.episodes import EpisodeSampler, few_shot_classes
from gohgraph.learning.loop import Training
from gohgraph.learning.regimes.language import standard_error
from gohgraph.learning.regimes.low_rank import ATTENTION, LowRankUpdate, add_low_rank, matching_rank
from gohgraph.learning.regimes.meta import MetaLearner, few_shot_accuracy, maml_loss, parameters_of, reptile_loss

# What adapts in the inner loop: types and names of modules, all of them without either.
ADAPTED: dict[str, dict[str, Any]] = {
    "maml": {},
    "first-order": {},
    "reptile": {},
    "read-out": {"names": ["head"]},
    "graph": {"types": (HeadGraphConv,)},
    "lora": {"types": (LowRankUpdate,)},
    "graph+read-out": {"types": (HeadGraphConv,), "names": ["head"]},
    "lora+read-out": {"types": (LowRankUpdate,), "names": ["head"]},
}
HELD_OUT = 4
TEST_SEED = 1_000_003


class MetaLearning(ContestScript):
    """The tasks, the inner loops, and how well each learns classes it has never seen."""

    name, runs = "meta_learning", "meta"
    full = dict(
        d_model=32, num_heads=4, num_layers=2, d_ff=64, tasks=4, ways=3, shots=5, queries=10, steps=250, test_batches=25
    )  # fmt: skip
    smoke = dict(
        d_model=8, num_heads=2, num_layers=1, d_ff=8, tasks=2, ways=2, shots=1, queries=2, steps=4, test_batches=2
    )  # fmt: skip
    learning_rate, weight_decay = 3e-3, 0.0

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--methods", nargs="+", choices=ADAPTED, default=list(ADAPTED), help="default: all")
        add("--inner-steps", type=int, default=3, help="gradient steps on a task (default %(default)s)")
        add("--inner-learning-rate", type=float, default=0.1, help="to begin with, then learned (default %(default)s)")

    def check(self) -> None:
        super().check()
        if self.flags.test_batches < 1:
            raise ValueError(f"Expected --test-batches of at least 1 (got {self.flags.test_batches}). Do raise it.")

    def models(self) -> dict[str, str]:
        self.known, new = few_shot_classes(load_digits(), held_out=HELD_OUT)
        self.test = self.sampler(new, TEST_SEED)
        return {method: method for method in self.flags.methods}

    def sampler(self, classes: list[Tensor], seed: int) -> EpisodeSampler:
        return EpisodeSampler(classes, **self.values("tasks", "ways", "shots", "queries"), seed=seed)

    def start(self, method: str, seed: int, rate: float, leaf: Path) -> Training:
        return self.training(
            self.learner(method),
            self.sampler(self.known, seed),
            reptile_loss if method == "reptile" else maml_loss,
            self.config(seed, rate),
            leaf,
            evaluate=lambda learner: self.measure(learner, min(5, self.flags.test_batches)),
            settings={"method": method},
            description=f"{seed}: {method}" if len(self.flags.seeds) > 1 else method,
        )

    def learner(self, method: str) -> MetaLearner:
        """A classifier with head graphs, or with low-rank updates of as many parameters, and its inner loop."""
        if method.startswith("lora"):
            with torch.random.fork_rng(devices=[]):
                whole = count_parameters(self.classifier(HeadGraphConfig()))
            model = self.classifier(None)
            add_low_rank(model, matching_rank(model, whole - count_parameters(model), ATTENTION), targets=ATTENTION)
        else:
            model = self.classifier(HeadGraphConfig())
        return MetaLearner(
            model,
            parameters_of(model, **ADAPTED[method]),
            steps=self.flags.inner_steps,
            learning_rate=self.flags.inner_learning_rate,
            second_order=method not in ("first-order", "reptile"),
        )

    def classifier(self, graph: HeadGraphConfig | None) -> Classifier:
        encoder = TransformerConfig(1, **self.values(), max_length=16, positions="learned", head_graph=graph)
        return Classifier(ClassifierConfig(encoder, num_classes=self.flags.ways, patch_size=2, channels=1))

    def measure(self, learner: MetaLearner, batches: int) -> dict[str, float]:
        """Loss and accuracy on tasks of classes never learned from."""
        device = learner.log_rate.device
        episodes = (type(one)(*(x.to(device) for x in one)) for one in map(self.test, range(batches)))
        found = [few_shot_accuracy(learner, one) for one in episodes]
        losses, accuracies = (torch.cat(side) for side in zip(*found, strict=True))
        return {
            "validation_loss": losses.mean().item(),
            "accuracy": accuracies.mean().item(),
            "standard_error": standard_error(accuracies),
        }

    def finish(self, training: Training, leaf: Path) -> Result:
        learner = training.accelerator.unwrap_model(training.model).eval()
        return {
            "method": training.folder.settings["method"],
            "seed": training.config.seed,
            "parameters": count_parameters(learner),
            "bytes_adapted": learner.bytes_adapted(),
            **self.measure(learner, self.flags.test_batches),
            "seconds": training.seconds,
        }

    def report(self, results: dict[tuple[int, str], Result]) -> None:
        """Prints and writes the table: over seeds, or with the standard error over tasks of the only one."""
        rows = []
        for method, seeds in by_model(results).items():
            accuracy = mean_and_deviation([100 * one["accuracy"] for one in seeds], digits=1)
            if len(seeds) == 1:
                accuracy += f" ± {100 * seeds[0]['standard_error']:.1f}"
            loss = mean_and_deviation([one["validation_loss"] for one in seeds])
            seconds = mean_and_deviation([one["seconds"] for one in seeds], digits=0)
            sizes = [f"{seeds[0]['parameters']:,}", f"{seeds[0]['bytes_adapted']:,}"]
            rows.append([method, f"{seeds[0]['learning_rate']:g}", *sizes, accuracy, loss, seconds])
        header = ["inner loop", "learning rate", "parameters", "bytes adapted", "accuracy [%]", "loss", "time [s]"]
        self.write_table(markdown_table([header, *rows]))
        basis = "standard deviation over seeds" if len(self.flags.seeds) > 1 else "standard error over tasks"
        print(f"{self.flags.ways} ways, {self.flags.shots} shots, ± {basis}; written: {self.folder / 'table.md'}")


main = MetaLearning.main

if __name__ == "__main__":
    sys.exit(main())
