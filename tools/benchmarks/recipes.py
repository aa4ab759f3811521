"""How models are built and trained: recipes by name, the same for plain attention and every variant."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from gohgraph.learning import recipes as library
from gohgraph.learning.contests.grid import Grid


@dataclass(frozen=True)
class Recipe:
    """What a recipe changes, and what is searched for each variant under it.

    Args:
        model: changes of the task's `TransformerConfig`.
        training: changes of the task's `TrainConfig`.
        grid: values of further settings to choose among, or of `learning_rate` in place of the task's.
        keeps_schedule: whether a task's own schedule and warm-up stay.

    Example:
        >>> recipe("old").search((0.1, 0.2), {"graph_lr_factor": [0.25, 1.0]}, unused=["graph_lr_factor"]).settings
        {'learning_rate': (0.1, 0.2)}
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    keeps_schedule: bool = True

    def trained(self, steps: int, own: Mapping[str, Any]) -> dict[str, Any]:
        """Returns settings of `TrainConfig`: the recipe's, and over them the task's own.

        Without its schedule a task warms up over a twentieth of the steps.

        Example:
            >>> own = {"schedule": "inverse-sqrt", "warmup": 30, "weight_decay": 0.01}
            >>> recipe("modern").trained(100, own), recipe("old").trained(100, own)["schedule"]
            ({'warmup': 5, 'weight_decay': 0.01}, 'inverse-sqrt')
        """
        if self.keeps_schedule:
            return {**self.training, **own}
        kept = {name: value for name, value in own.items() if name != "schedule"}
        return {**self.training, **kept, "warmup": steps // 20}

    def search(self, rates: tuple[float, ...], given: Mapping[str, Any], *, unused: Collection[str]) -> Grid:
        """Returns the grid of a model.

        Args:
            rates: the task's own learning rates.
            given: settings of the command line, which go over the recipe's.
            unused: settings that no parameter of the model learns by: nothing to choose.
        """
        settings = {"learning_rate": tuple(rates)} | dict(self.grid) | {name: tuple(v) for name, v in given.items()}
        return Grid({name: values for name, values in settings.items() if name not in unused})


def recipe(name: str) -> Recipe:
    """Returns a recipe by its name.

    Example:
        >>> recipe("old").training["optimizer"]
        'adamw'
    """
    if name not in RECIPES:
        raise ValueError(f"Expected a recipe of {list(RECIPES)} (got {name!r}). Do choose one of them.")
    return RECIPES[name]


MODERN_GRID = {
    "learning_rate": (2e-3, 4e-3, 8e-3),
    "matrix_learning_rate": (0.01, 0.02, 0.04),
    "graph_lr_factor": (0.25, 1.0),
}
# Those of the library: "old" is what its defaults were, "modern" is what they are. Decay and betas are the task's.
RECIPES = {
    "old": Recipe(*library.RECIPES["old"]),
    "modern": Recipe(*library.RECIPES["modern"], grid=MODERN_GRID, keeps_schedule=False),
}
