"""What is said of a few seeds: means, 95 % intervals, p values, and how much more of something plain needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and the half width of its 95 % interval (Student's t); NaN wide for one value.

    Raises:
        ImportError: scipy is not installed.

    Example:
        >>> centre, half = interval([1.0, 2.0, 3.0])
        >>> centre, round(half, 3)
        (2.0, 2.484)
    """
    if len(values) < 2:
        return mean(values), math.nan
    return mean(values), float(_student().ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5


def paired_p(differences: Sequence[float]) -> float:
    """Returns the two-sided p value of a paired t-test: how likely differences as large are when the mean is 0.

    NaN for one difference; 1 where all are 0, and 0 where all are the same otherwise.

    Example:
        >>> round(paired_p([0.1, 0.2, 0.4, 0.3]), 4)
        0.0305
    """
    if len(differences) < 2:
        return math.nan
    error = stdev(differences) / len(differences) ** 0.5
    if error == 0:
        return float(mean(differences) == 0)
    return 2 * float(_student().sf(abs(mean(differences)) / error, len(differences) - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p values corrected for their number (Holm 1979): below 0.05, the chance of any false one is below 0.05.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    corrected, highest = [math.nan] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = highest
    return corrected


def _student() -> Any:
    try:
        from scipy.stats import t
    except ImportError as error:
        raise ImportError(
            "Expected scipy for intervals and tests (got none). Do pip install 'gohgraph[benchmark]'."
        ) from error
    return t


def at_budget(curve: dict[float, float], budget: float) -> float | None:
    """Returns the value of a curve `{budget: value}` at a budget, linear between its points in log(budget).

    Outside the curve there is nothing to say: `None`.

    Example:
        >>> round(at_budget({1.0: 2.0, 4.0: 1.0}, 2.0), 9), at_budget({1.0: 2.0, 4.0: 1.0}, 5.0)
        (1.5, None)
    """
    points = sorted(curve.items())
    for (low, high), (next_budget, next_value) in zip(points, points[1:], strict=False):
        if low <= budget <= next_budget:
            share = math.log(budget / low) / math.log(next_budget / low)
            return high + share * (next_value - high)
    return curve.get(budget)


def needed_budget(curve: dict[float, float], value: float) -> str:
    """Returns the budget at which a falling curve reaches `value`, as text: bounded where it lies outside the curve.

    Example:
        >>> curve = {0.5: 2.0, 1.0: 1.5, 2.0: 1.0}
        >>> needed_budget(curve, 1.25), needed_budget(curve, 0.9), needed_budget(curve, 2.1)
        ('1.41', '> 2', '< 0.5')
    """
    points = sorted(curve.items())
    if value > points[0][1]:
        return f"< {points[0][0]:g}"
    for (low, high), (next_budget, next_value) in zip(points, points[1:], strict=False):
        if next_value <= value <= high:
            share = 0.0 if high == next_value else (high - value) / (high - next_value)
            return f"{low * (next_budget / low) ** share:.2f}"
    return f"> {points[-1][0]:g}"
