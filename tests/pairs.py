"""Of a product of options too large to run, a few combinations in which any two options of different kinds meet."""

from __future__ import annotations

import itertools
import os
from collections.abc import Hashable, Iterable
from typing import Any

# Every combination, where the time does not matter.
EXHAUSTIVE = "GOHGRAPH_EXHAUSTIVE" in os.environ


def pairwise(*kinds: Iterable[Hashable], keep: Any = lambda *options: False) -> list[tuple[Any, ...]]:
    """Returns the combinations, the same at every call; those that `keep` names are always among them."""
    every = list(itertools.product(*kinds))
    if EXHAUSTIVE:
        return every
    taken = [options for options in every if keep(*options)]
    left = set().union(*map(_pairs, every)) - set().union(*map(_pairs, taken))
    while left:
        taken.append(max(every, key=lambda options: len(left & _pairs(options))))
        left -= _pairs(taken[-1])
    return taken


def _pairs(options: tuple[Any, ...]) -> set[tuple[Any, Any]]:
    return set(itertools.combinations(enumerate(options), 2))
