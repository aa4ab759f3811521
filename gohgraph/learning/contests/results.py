"""What a contest led to: its table, and which of two models is better."""

from collections.abc import Mapping
from typing import Any

import torch

from gohgraph.common.tables import markdown_table, mean_and_deviation
from gohgraph.learning.regimes.language import standard_error

Result = dict[str, Any]
# Below this, a run ends within, or soon after, the warm-up of up to 100 steps: models are not told apart yet.
FEWEST_STEPS = 200
# Of Student's t, the half width of a 95 % interval in standard errors by degrees of freedom; beyond, about 2.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228}


def by_model(trained: Mapping[tuple[int, str], Result]) -> dict[str, list[Result]]:
    """Returns the results of every model, seed by seed.

    Example:
        >>> by_model({(0, "goh"): {"bleu": 3.0}, (0, "plain"): {"bleu": 2.0}, (1, "goh"): {"bleu": 4.0}})
        {'goh': [{'bleu': 3.0}, {'bleu': 4.0}], 'plain': [{'bleu': 2.0}]}
    """
    results: dict[str, list[Result]] = {}
    for (_, name), result in trained.items():
        results.setdefault(name, []).append(result)
    return results


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
    rows = [["model", "learning rate", "parameters", *columns]]
    for name, seeds in by_model(trained).items():
        measures = (
            mean_and_deviation([scale * result[key] for result in seeds], digits)
            for key, digits, scale in columns.values()
        )
        rows.append([name, f"{seeds[0]['learning_rate']:g}", f"{seeds[0]['parameters']:,}", *measures])
    return markdown_table(rows)


def about_table(trained: Mapping[tuple[int, str], Result], steps: int) -> str:
    """Returns what a table of `results_table` shows.

    Example:
        >>> about_table({(0, "plain"): {}, (0, "goh"): {}}, steps=600)
        'on validation data after 600 steps, 1 seed; step: median of a training step; time: of training alone'
    """
    seeds = len({seed for seed, _ in trained})
    over = "1 seed" if seeds == 1 else f"means over {seeds} seeds \u00b1 their standard deviation"
    return f"on validation data after {steps:,} steps, {over}; step: median of a training step; time: of training alone"


def too_short(steps: int, fewest: int = FEWEST_STEPS) -> str:
    """Returns the sentence that a run of so few steps tells nothing, "" where it has `fewest` or more.

    Example:
        >>> too_short(20)
        'no verdict: 20 steps show that it runs, not what is better; take 200 or more'
        >>> too_short(260)
        ''
    """
    if steps >= fewest:
        return ""
    return f"no verdict: {steps:,} steps show that it runs, not what is better; take {fewest} or more"


def verdict(trained: Mapping[tuple[int, str], Result]) -> str:
    """Tells which of two models is better by seeds, a 95 % interval around their mean; of one seed, what it gave.

    One seed knows the noise of the examples and not that of training, which is larger: it decides nothing.

    Args:
        trained: results with `losses` `[examples]` in nats; the model `"plain"` is the reference of the other one.

    Example:
        >>> losses = {"goh": torch.tensor([1.0, 3.0]), "plain": torch.tensor([1.5, 2.6])}
        >>> verdict({(0, name): {"losses": values} for name, values in losses.items()})
        'goh is ahead by 0.0500 ± 0.4500 nats over the examples; of one seed, this is no verdict: --seeds 0 1 2'
        >>> verdict({(seed, name): {"losses": losses[name] + seed} for seed in range(3) for name in losses})
        'better: goh, by 0.0500 ± 0.0000 nats (3 seeds)'
    """
    losses = {name: [result["losses"] for result in seeds] for name, seeds in by_model(trained).items()}
    plain = losses.pop("plain")
    ((other, other_losses),) = losses.items()
    gains = [reference - values for reference, values in zip(plain, other_losses, strict=True)]
    if len(gains) == 1:
        gain = gains[0].mean().item()
        told = f"{'ahead' if gain > 0 else 'behind'} by {abs(gain):.4f} ± {standard_error(gains[0]):.4f} nats"
        return f"{other} is {told} over the examples; of one seed, this is no verdict: --seeds 0 1 2"
    means = torch.stack([gain.mean() for gain in gains])
    gain, half = means.mean().item(), STUDENT.get(len(gains) - 1, 2.0) * standard_error(means)
    if not abs(gain) > half:
        return f"no difference beyond noise: {other} is ahead by {gain:+.4f} ± {half:.4f} nats ({len(gains)} seeds)"
    return f"better: {other if gain > 0 else 'plain'}, by {abs(gain):.4f} ± {half:.4f} nats ({len(gains)} seeds)"
