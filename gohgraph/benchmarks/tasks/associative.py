"""Associative recall with many queries, and recall in two hops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gohgraph.benchmarks.tasks.base import EpisodeTask, distinct
from gohgraph.inputs import IGNORED_TARGET


@dataclass(frozen=True)
class ManyQueries(EpisodeTask):
    """MQAR: a list of key-value pairs, then the keys again at power-law distances; each asks for its value.

    Source: Zoology (Arora et al. 2023, arXiv 2312.04927) and its generator: keys and values without replacement from
    the two halves of the vocabulary, key j again at `2 N + 2 g_j`, gaps g without replacement by p(g) ~ (g+1)^(a-1),
    a = 0.01, zeros between.

    Args:
        num_pairs: N.
        num_keys: keys to choose from, and as many values.

    Example:
        >>> inputs, targets = ManyQueries(num_pairs=3, num_keys=7).draw(2, torch.Generator())
        >>> inputs.shape, (targets != -100).sum(dim=1).tolist()
        (torch.Size([2, 24]), [3, 3])
    """

    d_model: int = 64
    num_heads: int = 8
    num_layers: int = 2
    batch_size: int = 32
    steps: int = 1000
    learning_rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    num_pairs: int = 16
    num_keys: int = 512
    summary: ClassVar[str] = "associative recall with many queries (MQAR): share of wrong answers"

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


@dataclass(frozen=True)
class TwoHops(EpisodeTask):
    """In-context composition: pairs x -> y and pairs y -> z in one shuffled list, then every x asks for its z.

    Neither list alone tells an answer: the second hop starts from what the first one found.

    Args:
        num_chains: N chains x -> y -> z.
        num_symbols: symbols to choose from, for all three places.

    Example:
        >>> inputs, targets = TwoHops(num_chains=3, num_symbols=11).draw(2, torch.Generator())
        >>> inputs.shape, (targets != -100).sum(dim=1).tolist()
        (torch.Size([2, 16]), [3, 3])
    """

    d_model: int = 64
    num_heads: int = 8
    num_layers: int = 3
    batch_size: int = 64
    steps: int = 2000
    learning_rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    num_chains: int = 5
    num_symbols: int = 32
    summary: ClassVar[str] = "in-context composition (x -> y -> z in two hops): share of wrong answers"

    @property
    def vocab_size(self) -> int:
        """The separator and the symbols."""
        return 1 + self.num_symbols

    @property
    def length(self) -> int:
        """T = 4 N + 1 + N: two lists of pairs, a separator, the queries."""
        return 5 * self.num_chains + 1

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws episodes: inputs and targets `[count, T]`."""
        chains = distinct(3 * self.num_chains, 1, self.vocab_size, count, generator).unflatten(1, (-1, 3))
        pairs = torch.cat((chains[..., :2], chains[..., 1:]), dim=1)  # [count, 2*N, 2]
        order = torch.rand(count, 2 * self.num_chains, 1, generator=generator).argsort(dim=1)
        listed = pairs.gather(1, order.expand(-1, -1, 2)).flatten(1)  # [count, 4*N]
        separator = listed.new_zeros(count, 1)
        asked = torch.rand(count, self.num_chains, 1, generator=generator).argsort(dim=1).expand(-1, -1, 3)
        queries = chains.gather(1, asked)  # [count, N, 3]
        inputs = torch.cat((listed, separator, queries[..., 0]), dim=1)  # [count, T]
        targets = torch.full_like(inputs, IGNORED_TARGET)
        targets[:, -self.num_chains :] = queries[..., 2]
        return inputs, targets
