"""A contest of models: each at the best learning rate of one grid, over several seeds, and which of them is better."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from gohgraph.common.tables import markdown_table, mean_and_deviation
from gohgraph.learning.contests.tuning import best_rates, check_rates
from gohgraph.learning.loop import Training, train_together
from gohgraph.learning.regimes.language import standard_error
from gohgraph.learning.run_folder import runs_in, write_text
from gohgraph.parallel.ranks import on_first_rank

RATES = "rates.md"
Start = Callable[[Any, int, float, Path], Training]
Result = dict[str, Any]
Finish = Callable[[Training, Path], Result]


def add_rate_flags(parser: argparse.ArgumentParser, *, learning_rate: float) -> None:
    """Adds `--learning-rates`, the grid of `Contest`."""
    parser.add_argument(
        "--learning-rates", type=float, nargs="+", default=[learning_rate], metavar="RATE",
        help=f"of several, each model takes its best on the first seed (default {learning_rate:g})",
    )  # fmt: skip


@dataclass(frozen=True)
class Contest:
    """Models that are trained alike: on the first seed at every learning rate, on the others at the best of each model.

    The best rate has the lowest validation loss at the end of training; one at which the loss does not stay finite is
    the worst. A run lies in `folder/seed-0/rate-0.01/name`, of which only those parts are there that there are
    several of.

    Args:
        models: what to train by name, usually configurations.
        seeds: one run of every model each.
        rates: the grid; with one rate nothing is chosen.
        folder: of the whole.

    Raises:
        ValueError: a rate is repeated or not above 0.
    """

    models: Mapping[str, Any]
    seeds: Sequence[int]
    rates: Sequence[float]
    folder: Path

    def __post_init__(self) -> None:
        check_rates(self.rates)

    def run(self, start: Start, finish: Finish, *, resume: bool = False) -> dict[tuple[int, str], Result]:
        """Trains all models, those of a seed in turns; writes `rates.md` when there are several rates.

        Args:
            start: `(model, seed, rate, leaf)` to the training in that leaf of the folder; it must log a
                `validation_loss`.
            finish: `(training, leaf)` to its results, called in the main process for the best rate of every model.
            resume: the runs in the folder must be among these.

        Returns:
            The results by seed and name, each with its `learning_rate` and `leaf`, its place in the folder.

        Raises:
            ValueError: the folder holds other runs, or a model's loss is finite at no rate.
            FloatingPointError: a loss does not stay finite where nothing is chosen: at one rate, or on a later seed.
        """
        if resume:
            self._check_runs()
        trained: dict[tuple[int, str], Result] = {}
        rates = {name: tuple(self.rates) for name in self.models}
        for seed in self.seeds:
            trainings = {
                (name, rate): start(model, seed, rate, self.folder / self._leaf(seed, rate, name))
                for name, model in self.models.items()
                for rate in rates[name]
            }
            chooses = seed == self.seeds[0] and len(self.rates) > 1
            train_together(list(trainings.values()), may_diverge=chooses)
            if chooses:
                rates = on_first_rank(partial(self._best_rates, trainings))
            for name, (rate,) in rates.items():
                training, leaf = trainings[name, rate], self._leaf(seed, rate, name)
                if training.accelerator.is_main_process:
                    result = finish(training, self.folder / leaf)
                    trained[seed, name] = {**result, "learning_rate": rate, "leaf": leaf}
        return trained

    def _leaf(self, seed: int, rate: float, name: str) -> str:
        parts = [f"seed-{seed}"] * (len(self.seeds) > 1) + [f"rate-{rate:g}"] * (len(self.rates) > 1)
        return "/".join(parts + [name] * (len(self.models) > 1)) or "."

    def _check_runs(self) -> None:
        leaves = {self._leaf(*run) for run in product(self.seeds, self.rates, self.models)}
        if not runs_in(self.folder) <= {self.folder / leaf for leaf in leaves}:
            raise ValueError(
                f"Expected the --compare, --seeds and --learning-rates of the run in {self.folder} (got others). "
                "Do repeat them."
            )

    def _best_rates(self, trainings: Mapping[tuple[str, float], Training]) -> dict[str, tuple[float]]:
        """Writes what all rates have led to and returns the best of every model."""
        ends = {run: _last_loss(training) for run, training in trainings.items()}
        header = ["validation loss at a rate of", *(f"{rate:g}" for rate in self.rates)]
        rows = [[name, *(_in_table(ends[name, rate]) for rate in self.rates)] for name in self.models]
        table = markdown_table([header, *rows]) + "\n"
        write_text(self.folder / RATES, table)
        print(f"\n{table}")
        return {name: (rate,) for name, rate in best_rates(ends).items()}


def by_model(trained: Mapping[tuple[int, str], Result]) -> dict[str, list[Result]]:
    """Returns the results of every model, seed by seed.

    Example:
        >>> by_model({(0, "goh"): {"bleu": 3.0}, (0, "plain"): {"bleu": 2.0}, (1, "goh"): {"bleu": 4.0}})
        {'goh': [{'bleu': 3.0}, {'bleu': 4.0}], 'plain': [{'bleu': 2.0}]}
    """
    names = dict.fromkeys(name for _, name in trained)
    return {name: [result for (_, own), result in trained.items() if own == name] for name in names}


def results_table(trained: Mapping[tuple[int, str], Result], columns: Mapping[str, tuple[str, int, float]]) -> str:
    """Returns a row for every model: rate, parameters, and means over the seeds with their standard deviations.

    Args:
        trained: results that also have `parameters`.
        columns: by heading, which number of the results, with how many digits, times what.

    Example:
        >>> trained = {(0, "plain"): {"learning_rate": 0.01, "parameters": 1200, "accuracy": 0.5}}
        >>> print(results_table(trained, {"accuracy [%]": ("accuracy", 1, 100)}))
        | model | learning rate | parameters | accuracy [%] |
        | ----- | ------------: | ---------: | -----------: |
        | plain |          0.01 |      1,200 |         50.0 |
    """
    rows: list[list[str]] = [["model", "learning rate", "parameters", *columns]]
    for name, own in by_model(trained).items():
        about = [name, f"{own[0]['learning_rate']:g}", f"{own[0]['parameters']:,}"]
        over_seeds = (
            mean_and_deviation([times * one[key] for one in own], digits) for key, digits, times in columns.values()
        )
        rows.append([*about, *over_seeds])
    return markdown_table(rows)


def verdict(trained: Mapping[tuple[int, str], Result]) -> str:
    """Tells which of two models is better: by the same examples, or by the same seeds when there are several.

    Args:
        trained: results with `losses` `[examples]` in nats; the model `"plain"` is the reference of the other one.

    Example:
        >>> losses = {"goh": torch.tensor([1.0, 3.0]), "plain": torch.tensor([1.5, 2.6])}
        >>> verdict({(0, name): {"losses": values} for name, values in losses.items()})
        'no difference beyond noise: goh is ahead by +0.0500 ± 0.4500 nats (one seed; ...: --seeds 0 1 2)'
    """
    losses = {name: [one["losses"] for one in results] for name, results in by_model(trained).items()}
    plain = losses.pop("plain")
    ((kind, own),) = losses.items()
    gains = [other - mine for mine, other in zip(own, plain, strict=True)]
    values = torch.stack([gain.mean() for gain in gains]) if len(gains) > 1 else gains[0]
    gain, error = values.mean().item(), standard_error(values)
    basis = f"{len(gains)} seeds" if len(gains) > 1 else "one seed; another one may say otherwise: --seeds 0 1 2"
    if not abs(gain) > 2 * error:
        return f"no difference beyond noise: {kind} is ahead by {gain:+.4f} ± {error:.4f} nats ({basis})"
    return f"better: {kind if gain > 0 else 'plain'}, by {abs(gain):.4f} ± {error:.4f} nats ({basis})"


def _last_loss(training: Training) -> float:
    """The validation loss at the end of training, infinite where the loss has run away."""
    if training.has_diverged:
        return math.inf
    losses = [row.get("validation_loss") for row in training.folder.rows]
    return next(loss for loss in reversed(losses) if loss is not None)


def _in_table(loss: float) -> str:
    return f"{loss:.4f}" if math.isfinite(loss) else "diverged"
