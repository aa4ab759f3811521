"""Fair learning rates: every model takes the best of a grid on the first seed, and is trained at it on the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gohgraph.learning.contests.sweep import sweep

# A model's name, its learning rate, and the seed.
Run = tuple[str, float, int]


def check_rates(rates: Sequence[float]) -> None:
    """Raises ValueError where a learning rate is repeated or not above 0."""
    if len(set(rates)) < len(rates) or not all(0 < rate < float("inf") for rate in rates):
        raise ValueError(f"Expected different --learning-rates above 0 (got {list(rates)}). Do change them.")


def best_rates(losses: Mapping[tuple[str, float], float]) -> dict[str, float]:
    """Returns the learning rate at which each model's loss is the lowest; a loss that is not finite is the worst.

    Args:
        losses: by name and rate.

    Raises:
        ValueError: a model has no finite loss.

    Example:
        >>> best_rates({("goh", 0.1): 2.0, ("goh", 0.2): float("nan"), ("plain", 0.1): 3.0, ("plain", 0.2): 2.5})
        {'goh': 0.1, 'plain': 0.2}
    """
    finite: dict[str, dict[float, float]] = {name: {} for name, _ in losses}
    for (name, rate), loss in losses.items():
        if math.isfinite(loss):
            finite[name][rate] = loss
    if lost := [name for name, found in finite.items() if not found]:
        raise ValueError(
            f"Expected a finite loss at one of the learning rates {sorted({rate for _, rate in losses})} (got none for "
            f"{', '.join(lost)}). Do add a lower one."
        )
    return {name: min(found, key=found.__getitem__) for name, found in finite.items()}


def run_name(name: str, rate: float, seed: int) -> str:
    """Returns the file name of a run.

    Example:
        >>> run_name("plain", 0.002, 0)
        'plain-0.002-0'
    """
    return f"{name}-{rate:g}-{seed}"


def tuned_sweep(
    function: Callable[..., Any],
    runs: Mapping[Run, dict[str, Any]],
    folder: str | Path,
    *,
    loss: Callable[[Any], float],
    jobs: int = 1,
    key: Callable[[str, float, int], str] = run_name,
) -> tuple[dict[str, float], dict[tuple[str, int], Any]]:
    """Runs a `sweep` over all rates of the first seed, then over the other seeds at each model's best rate.

    Args:
        function, folder, jobs: of `sweep`.
        runs: keyword arguments by name, learning rate and seed, of all rates and seeds; the first seed comes first.
        loss: of a result, what is to be lowest.
        key: name of a run in the sweep.

    Returns:
        The best rate by name, and the results at it by name and seed.

    Raises:
        ValueError: a model's loss is finite at no rate.
        FloatingPointError: a loss does not stay finite on a later seed.

    Example:
        >>> import tempfile
        >>> runs = {("cube", rate, seed): {"base": rate + seed, "exp": 3} for seed in (0, 1) for rate in (2.0, 1.0)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tuned_sweep(pow, runs, folder, loss=lambda result: result)
        ({'cube': 1.0}, {('cube', 0): 1.0, ('cube', 1): 8.0})
    """
    first = next(iter(runs))[2]

    def train(chosen: list[Run], *, may_diverge: bool) -> dict[Run, Any]:
        named = {key(*run): runs[run] for run in chosen}
        results = sweep(function, named, folder, jobs=jobs, may_diverge=may_diverge)
        return {run: results[key(*run)] for run in chosen}

    tried = train([run for run in runs if run[2] == first], may_diverge=True)
    losses = {run[:2]: math.inf if result is None else loss(result) for run, result in tried.items()}
    rates = best_rates(losses)
    kept = train([run for run in runs if run[1] == rates[run[0]]], may_diverge=False)
    # Another choice of the first seed may have left such a run behind.
    if lost := [key(*run) for run, result in kept.items() if result is None]:
        raise FloatingPointError(
            f"Expected finite losses at the best learning rates (got others in {lost}). Do leave those rates out."
        )
    return rates, {(name, seed): result for (name, _, seed), result in kept.items()}
