"""Few-shot episodes: small classification tasks drawn from the classes of labelled images."""

import random
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gohgraph.learning.data.classification import LabelledData


class Episodes(NamedTuple):
    """A batch of N tasks of `ways` classes, with a few examples of each to adapt to and others to be measured on.

    Args:
        support: inputs `[N, ways * shots, ...]`.
        support_targets: classes within the task `[N, ways * shots]`.
        query: inputs `[N, ways * queries, ...]`.
        query_targets: classes within the task `[N, ways * queries]`.
    """

    support: Tensor
    support_targets: Tensor
    query: Tensor
    query_targets: Tensor


@dataclass(frozen=True, eq=False)
class EpisodeSampler:
    """Draws episodes; batch i is a pure function of (seed, i).

    Args:
        classes: examples of each class, `[examples, ...]`.
        tasks: N, episodes in a batch.
        ways: classes of a task.
        shots: examples of each class to adapt to.
        queries: further examples of each class to be measured on.
        seed: names the order.

    Example:
        >>> sampler = EpisodeSampler([torch.rand(9, 1, 8, 8) for _ in range(5)], tasks=2, ways=3, shots=1, queries=4)
        >>> sampler(0).support.shape, sampler(0).query_targets.shape
        (torch.Size([2, 3, 1, 8, 8]), torch.Size([2, 12]))
    """

    classes: list[Tensor]
    tasks: int
    ways: int
    shots: int
    queries: int
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tasks", "ways", "shots", "queries"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected {name} of at least 1 (got {getattr(self, name)}). Do raise it.")
        fewest = min(map(len, self.classes), default=0)
        if len(self.classes) < self.ways or fewest < self.shots + self.queries:
            raise ValueError(
                f"Expected {self.ways} classes or more of {self.shots + self.queries} examples or more (got "
                f"{len(self.classes)} of {fewest}). Do lower ways, shots or queries."
            )

    def __call__(self, index: int) -> Episodes:
        """Returns a batch of episodes; a task's classes are numbered in the random order they were drawn in."""
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed} {index}").getrandbits(32))
        drawn = [self._task(generator) for _ in range(self.tasks)]
        support, query = (torch.stack(side) for side in zip(*drawn, strict=True))  # [N, ways, examples, ...] each
        numbers = torch.arange(self.ways)
        return Episodes(
            support.flatten(1, 2),  # [N, ways*shots, ...]
            numbers.repeat_interleave(self.shots).expand(self.tasks, -1),
            query.flatten(1, 2),  # [N, ways*queries, ...]
            numbers.repeat_interleave(self.queries).expand(self.tasks, -1),
        )

    def _task(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        examples = []
        for number in torch.randperm(len(self.classes), generator=generator)[: self.ways].tolist():
            rows = torch.randperm(len(self.classes[number]), generator=generator)[: self.shots + self.queries]
            examples.append(self.classes[number][rows])
        both = torch.stack(examples)  # [ways, shots + queries, ...]
        return both[:, : self.shots], both[:, self.shots :]


def few_shot_classes(data: LabelledData, *, held_out: int) -> tuple[list[Tensor], list[Tensor]]:
    """Splits images by class: those to learn from, in four rotations, each a class of its own, and the last ones.

    Rotations by 90 degrees as further classes are those of Santoro et al. 2016 (arXiv 1605.06065). The classes held
    out stay as they are.

    Args:
        data: images `[N, channels, side, side]`, of which training and validation part are joined.
        held_out: classes never learned from, the last ones.

    Example:
        >>> from gohgraph.learning.data.classification import load_digits
        >>> [len(classes) for classes in few_shot_classes(load_digits(), held_out=4)]
        [24, 4]
    """
    images = torch.cat((data.train[0], data.validation[0]))  # [N, C, S, S]
    targets = torch.cat((data.train[1], data.validation[1]))  # [N]
    classes = [images[targets == number] for number in range(len(data.classes))]
    known, new = classes[:-held_out], classes[-held_out:]
    return [images.rot90(turns, dims=(-2, -1)) for images in known for turns in range(4)], new
