"""Multi-task learning: several sources of data in one training, and adapters that belong to one of them."""

import random
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from gohgraph.learning.regimes.adapters import TaskAdapters
from gohgraph.models.model_output import ModelOutput


class TaskSampler:
    r"""Batches of several tasks, one task a batch, drawn at random.

    .. math:: p_k \propto n_k^{1/\tau}

    With tau = 1 tasks are drawn by their size, with larger ones more evenly (Arivazhagan et al. 2019, arXiv 1907.05019,
    section 4.2, use 5), with `None` all alike.

    Args:
        sources: for each task, the tensors of its batch i, a pure function of i.
        sizes: n_k > 0, e.g. bytes or examples of each task; needed with a temperature.
        temperature: tau > 0, or `None`.
        seed: names the order of tasks.

    Example:
        >>> sampler = TaskSampler([lambda index: (f"a{index}",), lambda index: (f"b{index}",)], seed=1)
        >>> sampler(0), sampler(1)
        (('b0', 1), ('b1', 1))
    """

    def __init__(
        self,
        sources: Sequence[Callable[[int], tuple]],
        *,
        sizes: Sequence[float] | None = None,
        temperature: float | None = None,
        seed: int = 0,
    ) -> None:
        if not sources:
            raise ValueError(f"Expected at least one source (got {sources!r}). Do pass a function for every task.")
        if temperature is not None and (not temperature > 0 or sizes is None):
            raise ValueError(f"Expected a temperature > 0 and sizes (got {temperature}, {sizes}). Do pass both.")
        if sizes is not None and (len(sizes) != len(sources) or not min(sizes) > 0):
            raise ValueError(f"Expected {len(sources)} sizes above 0 (got {list(sizes)}). Do pass one for every task.")
        self.sources, self.seed = sources, seed
        weights = [1.0] * len(sources)
        if temperature is not None:
            weights = [size ** (1 / temperature) for size in sizes or ()]
        self.probabilities = [weight / sum(weights) for weight in weights]

    def task(self, index: int) -> int:
        """Returns the task of batch `index`, a pure function of (seed, index)."""
        # Seeded by text, which Python hashes the same way on every machine.
        generator = random.Random(f"task {self.seed} {index}")
        return generator.choices(range(len(self.sources)), self.probabilities)[0]

    def __call__(self, index: int) -> tuple:
        """Returns the tensors of batch `index`, and the number of its task after them."""
        task = self.task(index)
        return (*self.sources[task](index), task)


def task_output(model: nn.Module, batch: tuple[Any, ...]) -> ModelOutput:
    """Returns the output for `(inputs, targets, task)` under the adapter of the task: a loss for `train`.

    A model without adapters, one for all tasks, is called without the task.
    """
    inputs, targets, task = batch
    # A wrapped or compiled model is told by what is inside it.
    inner = getattr(model, "module", getattr(model, "_orig_mod", model))
    options = {"task": task} if isinstance(inner, TaskAdapters) else {}
    return model(inputs, targets=targets, **options)
