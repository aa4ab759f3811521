"""Loss against compute: power laws over sizes, and how much more compute plain attention needs for the same loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import linear_regression

from benchmarks.statistics import interval


@dataclass(frozen=True)
class Curve:
    """Losses of one variant at several sizes.

    Args:
        compute: C of each size, 6 N D floating point operations of N parameters and D tokens, rising.
        losses: of each seed, one for each size.

    Example:
        >>> curve = Curve([1e12, 1e13, 1e14], [[2.0, 1.0, 0.5], [4.0, 2.0, 1.0]])
        >>> [round(exponent, 4) for exponent in curve.exponents]
        [0.301, 0.301]
    """

    compute: Sequence[float]
    losses: Sequence[Sequence[float]]

    @property
    def exponents(self) -> list[float]:
        r"""b of the law :math:`L = a\, C^{-b}`, fitted for each seed by least squares in logarithms.

        No irreducible loss is subtracted: three or four sizes do not tell it.
        """
        logs = [math.log(compute) for compute in self.compute]
        return [-linear_regression(logs, [math.log(loss) for loss in own]).slope for own in self.losses]


def compute_ratios(plain: Curve, other: Curve) -> list[list[float]]:
    r"""Returns how many times as much compute plain attention needs for the other's loss, by seed and size.

    .. math:: r = (L_{plain} / L_{other})^{1 / b}

    with plain attention's exponent b of that seed: its law is moved through its own loss at that size, so that what the
    fit leaves over does not count.

    Example:
        >>> plain, other = Curve([1.0, 10.0], [[2.0, 1.0]]), Curve([1.0, 10.0], [[1.0, 0.5]])
        >>> [round(ratio, 6) for ratio in compute_ratios(plain, other)[0]]
        [10.0, 10.0]
    """
    return [
        [(its / own) ** (1 / exponent) for its, own in zip(losses_of_plain, losses, strict=True)]
        for exponent, losses_of_plain, losses in zip(plain.exponents, plain.losses, other.losses, strict=True)
    ]


def geometric(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the geometric mean and its 95 % interval (Student's t of the logarithms); NaN wide for one value.

    Example:
        >>> [round(value, 2) for value in geometric([1.0, 1.1, 1.21])]
        [1.1, 0.87, 1.39]
    """
    centre, half = interval([math.log(value) for value in values])
    return math.exp(centre), math.exp(centre - half), math.exp(centre + half)


def trend(compute: Sequence[float], ratios: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Returns by what the ratio is multiplied when compute grows tenfold, with its 95 % interval over the seeds.

    Example:
        >>> [round(value, 6) for value in trend([1.0, 10.0, 100.0], [[1.1, 1.2, 1.4], [1.1, 1.2, 1.4]])]
        [1.128152, 1.128152, 1.128152]
    """
    logs = [math.log10(value) for value in compute]
    slopes = [linear_regression(logs, [math.log(ratio) for ratio in own]).slope for own in ratios]
    return geometric([math.exp(slope) for slope in slopes])
