"""In-context composition: what one hop finds is where the next one starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.tasks.base import (
    HELD_OUT_EPISODES,
    HELD_OUT_SEEDS,
    Task,
    check_stack_alone,
    distinct,
    generator_of,
)
from gohgraph.models.config import TransformerConfig
from gohgraph.models.init import initialize
from gohgraph.models.stacks import Stack


@dataclass(frozen=True)
class TwoHops(Task):
    """Pairs x -> y and pairs y -> z are listed in any order; every x asks for its z.

    A position holds a whole pair, the sum of its embeddings: nothing has to be learned about neighbours. No pair alone
    tells an answer, heads have to follow one with the other. One who guesses among the N symbols that chains end in is
    wrong in 1 - 1/N of the cases.

    Args:
        num_chains: N chains x -> y -> z of different symbols.
        num_symbols: V symbols to choose from.

    Example:
        >>> pairs, answers = TwoHops(num_chains=3, num_symbols=11).draw(2, torch.Generator())
        >>> pairs.shape, answers.shape
        (torch.Size([2, 9, 2]), torch.Size([2, 3]))
    """

    d_model: int = 64
    num_heads: int = 8
    num_layers: int = 2
    batch_size: int = 64
    steps: int = 2000
    learning_rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    num_chains: int = 4
    num_symbols: int = 24
    measure: ClassVar[str] = "error"
    summary: ClassVar[str] = "in-context composition (x -> y -> z in two hops): share of wrong answers"

    def config(self) -> TransformerConfig:
        """Returns the transformer's configuration without head graphs."""
        return TransformerConfig(1 + self.num_symbols, **self.shape(), positions="none")

    def model(self, config: TransformerConfig) -> HopModel:
        """Builds a model of pairs."""
        return HopModel(config)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws episodes: pairs `[count, 3*N, 2]`, the last N with the unknown 0 in place of `to`, and answers."""
        chains = distinct(3 * self.num_chains, 1, 1 + self.num_symbols, count, generator).unflatten(1, (-1, 3))
        pairs = torch.cat((chains[..., :2], chains[..., 1:]), dim=1)  # [count, 2*N, 2]
        order = torch.rand(pairs.shape[:2], generator=generator).argsort(dim=1).unsqueeze(-1)
        queries = torch.stack((chains[..., 0], torch.zeros_like(chains[..., 0])), dim=-1)  # [count, N, 2]
        return torch.cat((pairs.gather(1, order.expand_as(pairs)), queries), dim=1), chains[..., 2]

    def batch(self, index: int, seed: int) -> tuple[Tensor, Tensor]:
        """Returns pairs and answers of a training batch."""
        return self.draw(self.batch_size, generator_of(seed, index))

    def output(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Returns the cross entropy of the answers."""
        pairs, answers = batch
        return F.cross_entropy(model(pairs)[:, -answers.shape[1] :].flatten(0, 1), answers.flatten())

    def measures(self, model: nn.Module, part: str) -> dict[str, float]:
        """Returns loss and error on held-out episodes."""
        pairs, answers = self.draw(HELD_OUT_EPISODES, generator_of(HELD_OUT_SEEDS[part], 0))
        with torch.no_grad():
            logits = model(pairs)[:, -answers.shape[1] :]  # [B, N, V+1]
        wrong = (logits.argmax(dim=-1) != answers).double().mean().item()
        return {"loss": F.cross_entropy(logits.flatten(0, 1), answers.flatten()).item(), "error": wrong}


class HopModel(nn.Module):
    """An encoder over a set of pairs of symbols.

    Args:
        config: the transformer; its `vocab_size` is that of the symbols and the unknown.

    Shape:
        pairs `[B, T, 2]` -> logits `[B, T, V+1]`.

    Example:
        >>> HopModel(TwoHops().config())(torch.zeros(2, 5, 2, dtype=torch.long)).shape
        torch.Size([2, 5, 25])
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        check_stack_alone(config)
        self.config = config
        self.embedding = nn.Embedding(2 * config.vocab_size, config.d_model)
        self.encoder = Stack(config, "encoder")
        self.head = nn.Linear(config.d_model, config.vocab_size)
        # Under the old recipe layers start as torch has them.
        if config.init != "normal":
            initialize(self, config)

    def forward(self, pairs: Tensor) -> Tensor:
        """Returns logits at every position."""
        # Symbols one comes from and symbols one comes to have embeddings of their own.
        tokens = pairs + torch.tensor([0, self.config.vocab_size], device=pairs.device)  # [B, T, 2]
        return self.head(self.encoder(self.embedding(tokens).sum(dim=-2)).x)
