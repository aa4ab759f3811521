"""Learning rates: the grid, the best of it for every model, and the table of what all of it led to."""

import math
from collections.abc import Mapping, Sequence

from gohgraph.common.tables import markdown_table


def check_rates(rates: Sequence[float]) -> None:
    """Raises ValueError where there is no learning rate, or one is repeated or not above 0."""
    # Two rates that read alike would share the name of a run.
    read = {f"{rate:g}" for rate in rates}
    if not rates or len(read) < len(rates) or not all(0 < rate < math.inf for rate in rates):
        raise ValueError(f"Expected different --learning-rates above 0 (got {list(rates)}). Do change them.")


def best_rates(losses: Mapping[tuple[str, float], float]) -> dict[str, float]:
    """Returns the learning rate at which each model's loss is the lowest; a loss that is not finite is the worst.

    Args:
        losses: by name and rate.

    Example:
        >>> best_rates({("goh", 0.1): 2.0, ("goh", 0.2): float("nan"), ("plain", 0.1): 3.0, ("plain", 0.2): 2.5})
        {'goh': 0.1, 'plain': 0.2}
    """
    finite: dict[str, dict[float, float]] = {name: {} for name, _ in losses}
    for (name, rate), loss in losses.items():
        if math.isfinite(loss):
            finite[name][rate] = loss
    if lost := [name for name, by_rate in finite.items() if not by_rate]:
        raise ValueError(
            f"Expected a finite loss at one of the learning rates {sorted({rate for _, rate in losses})} (got none for "
            f"{', '.join(lost)}). Do add a lower one."
        )
    return {name: min(by_rate, key=by_rate.__getitem__) for name, by_rate in finite.items()}


def rates_table(losses: Mapping[tuple[str, float], float]) -> str:
    """Returns a row for every model: its loss at every rate, or that it diverged."""
    names, rates = (list(dict.fromkeys(part)) for part in zip(*losses, strict=True))
    rows = [["loss or error at a rate of", *(f"{rate:g}" for rate in rates)]]
    for name in names:
        by_rate = (losses[name, rate] for rate in rates)
        rows.append([name, *(f"{loss:.4f}" if math.isfinite(loss) else "diverged" for loss in by_rate)])
    return markdown_table(rows)
