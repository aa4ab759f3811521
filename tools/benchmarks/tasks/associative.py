"""Associative recall with many queries."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.tasks.base import EpisodeTask, distinct
from gohgraph.models.boundary import IGNORED_TARGET
from gohgraph.models.config import TransformerConfig


@dataclass(frozen=True)
class ManyQueries(EpisodeTask):
    """MQAR: a list of key-value pairs, then the keys again at power-law distances; each asks for its value.

    Source: Zoology (Arora et al. 2023, arXiv 2312.04927) and its generator: keys and values without replacement from
    the two halves of the vocabulary, key j again at `2 N + 2 g_j`, gaps g without replacement by p(g) ~ (g+1)^(a-1),
    a = 0.01, zeros between; learned positions, two layers. Smaller here: fewer keys and pairs, more heads than one.

    One who looks keys up makes no error; one who guesses among the N listed values is wrong in 1 - 1/N of the cases.

    Args:
        num_pairs: N.
        num_keys: keys to choose from, and as many values.

    Example:
        >>> inputs, targets = ManyQueries(num_pairs=3, num_keys=7).draw(2, torch.Generator())
        >>> inputs.shape, (targets != -100).sum(dim=1).tolist()
        (torch.Size([2, 24]), [3, 3])
    """

    d_model: int = 64
    num_heads: int = 4
    num_layers: int = 2
    batch_size: int = 64
    steps: int = 1200
    learning_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    num_pairs: int = 4
    num_keys: int = 8
    summary: ClassVar[str] = "associative recall with many queries (MQAR): share of wrong answers"

    def config(self) -> TransformerConfig:
        """Returns the transformer's configuration without head graphs."""
        return dataclasses.replace(super().config(), positions="learned")

    @property
    def vocab_size(self) -> int:
        """The filler, keys and values."""
        return 1 + 2 * self.num_keys

    @property
    def length(self) -> int:
        """T = 8 N: pairs, then three times as many slots for queries."""
        return 8 * self.num_pairs

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws episodes: inputs and targets `[count, T]`."""
        pairs, slots = self.num_pairs, (self.length - 2 * self.num_pairs) // 2
        keys = distinct(pairs, 1, 1 + self.num_keys, count, generator)  # [count, N]
        values = distinct(pairs, 1 + self.num_keys, self.vocab_size, count, generator)  # [count, N]
        likely = torch.arange(1, slots + 1).double() ** (0.01 - 1)
        gaps = torch.multinomial(likely.expand(count, -1), pairs, generator=generator)  # [count, N]
        inputs = torch.zeros(count, self.length, dtype=torch.long)
        inputs[:, 0 : 2 * pairs : 2], inputs[:, 1 : 2 * pairs : 2] = keys, values
        asked = 2 * pairs + 2 * gaps
        inputs.scatter_(1, asked, keys)
        targets = torch.full_like(inputs, IGNORED_TARGET).scatter_(1, asked, values)
        return inputs, targets
