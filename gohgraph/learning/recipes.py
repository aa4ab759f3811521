"""Recipes of training by name: what a model is made of beside its sizes, and how it is trained."""

from __future__ import annotations

from typing import Any, NamedTuple

from gohgraph.learning.train_config import BEFORE as TRAININGS_BEFORE
from gohgraph.models.config import BEFORE as MODELS_BEFORE


class Recipe(NamedTuple):
    """What goes over the defaults of a model and of its training.

    Args:
        model: fields of `TransformerConfig`.
        training: fields of `TrainConfig`.
    """

    model: dict[str, Any]
    training: dict[str, Any]


# "modern" is what the defaults are; "old" is what they were, for results that were measured with it.
RECIPES = {"modern": Recipe({}, {}), "old": Recipe(MODELS_BEFORE, TRAININGS_BEFORE)}
