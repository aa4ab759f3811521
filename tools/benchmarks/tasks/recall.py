"""Associative recall by a conjunction of two cues: the task, its episodes, and the model that answers them."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.tasks.base import check_stack_alone
from gohgraph.common.checks import check_int
from gohgraph.models.config import TransformerConfig
from gohgraph.models.init import initialize
from gohgraph.models.stacks import Stack


@dataclass(frozen=True)
class RecallTask:
    """The size of the task: recall the value of the only item that has both cues of the query.

    An episode picks `side` cues of either kind and lists `num_items` different pairs of them, each with a value of
    its own; `side` is the smallest number whose square holds the items. The query is the pair of one item, chosen so
    that either of its cues is another item's too: no single cue tells the answer.

    Attention can find the item by adding up two matches, cue a and cue b. To tell all cues apart, the scores of one
    head would need about as many dimensions as there are cues: at a head_dim several times below `num_cues` the heads
    have to work together.

    Args:
        num_cues: cues of either kind, at least `side`.
        num_values: values to choose from, at least 2.
        num_items: N >= 3.
        batch_size: episodes per batch B, at least 1.


    Example:
        >>> RecallTask(num_cues=32).side
        4
    """

    num_cues: int = 32
    num_values: int = 16
    num_items: int = 16
    batch_size: int = 64

    def __post_init__(self) -> None:
        for name, low in (("num_items", 3), ("num_cues", 1), ("num_values", 2), ("batch_size", 1)):
            check_int(name, getattr(self, name), low=low)
        if self.num_cues < self.side:
            raise ValueError(
                f"Expected num_cues >= {self.side}, whose pairs make {self.num_items} items (got {self.num_cues}). "
                "Do raise it, or lower num_items."
            )

    @property
    def side(self) -> int:
        """Cues of either kind in one episode."""
        return math.isqrt(self.num_items - 1) + 1

    @property
    def length(self) -> int:
        """T = N + 1, positions of an episode: the items, then the query."""
        return self.num_items + 1

    @property
    def unknown(self) -> int:
        """The value id at the query, one past the values."""
        return self.num_values

    @property
    def vocab_size(self) -> int:
        """Token ids of the model: cues a, cues b, values, and the unknown value."""
        return 2 * self.num_cues + self.num_values + 1


def recall_batch(task: RecallTask, step: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draws the episodes of one training step; equal arguments give equal episodes.

    Returns:
        cues `[B, T, 2]` (cue a, cue b), values `[B, T]` and answers `[B]`, all int64. The last position is the query,
        its value `task.unknown`.

    Example:
        >>> cues, values, answers = recall_batch(RecallTask(num_cues=7, num_items=5, batch_size=3), step=0, seed=0)
        >>> cues.shape, values.shape, answers.shape
        (torch.Size([3, 6, 2]), torch.Size([3, 6]), torch.Size([3]))
        >>> asked = (cues[:, :-1] == cues[:, -1:]).all(dim=-1)
        >>> bool((values[:, :-1][asked] == answers).all())
        True
    """
    # torch's CPU generator keeps 32 bits of a seed, so (seed, step) is hashed and not packed.
    generator = torch.Generator().manual_seed(random.Random(f"{seed} {step}").getrandbits(32))
    batch, side = task.batch_size, task.side
    cells = _shuffled(side * side, batch, generator)[:, : task.num_items]  # [B, N]
    places = torch.stack((cells // side, cells % side), dim=-1)  # [B, N, 2]
    names = [_shuffled(task.num_cues, batch, generator)[:, :side] for _ in range(2)]  # [B, side] each
    cues = torch.stack(names, dim=-1).gather(1, places)  # [B, N, 2]
    values = torch.randint(task.num_values, cells.shape, generator=generator)  # [B, N]
    # More than (side - 1)^2 cells of a square always hold one that shares its row and its column.
    sharing = (cues.unsqueeze(1) == cues.unsqueeze(2)).sum(dim=2)  # [B, N, 2], the item itself included
    asked = torch.multinomial((sharing > 1).all(dim=-1).float(), 1, generator=generator)  # [B, 1]
    query = cues.gather(1, asked.unsqueeze(-1).expand(-1, -1, 2))  # [B, 1, 2]
    unknown = values.new_full((batch, 1), task.unknown)  # [B, 1]
    return torch.cat((cues, query), 1), torch.cat((values, unknown), 1), values.gather(1, asked).squeeze(1)


class RecallModel(nn.Module):
    """An encoder that reads an episode and names the value of the query.

    The embedding of a position is the sum of its cue a, its cue b and its value; the answer is read off the query's
    position by a linear layer. Items are a set, so no positions are encoded (`positions="none"`). Plain attention and
    head graphs differ in `config.head_graph` and, for equal parameters, in `config.d_ff`: in nothing else.

    Args:
        task: the sizes of the task.
        config: the transformer; its `vocab_size` is the task's.

    Shape:
        cues `[B, T, 2]`, values `[B, T]` -> logits over the values `[B, num_values]`.

    Example:
        >>> task = RecallTask(num_cues=7, num_values=5, num_items=11, batch_size=3)
        >>> config = TransformerConfig(task.vocab_size, d_model=8, num_heads=2, num_layers=1, positions="none")
        >>> cues, values, answers = recall_batch(task, step=0, seed=0)
        >>> RecallModel(task, config)(cues, values).shape
        torch.Size([3, 5])
    """

    def __init__(self, task: RecallTask, config: TransformerConfig) -> None:
        super().__init__()
        check_stack_alone(config)
        if config.vocab_size != task.vocab_size:
            raise ValueError(
                f"Expected vocab_size = {task.vocab_size}, the task's (got {config.vocab_size}). Do pass "
                "task.vocab_size."
            )
        if config.positions != "none":
            raise ValueError(
                f"Expected positions='none', since items are a set (got {config.positions!r}). Do switch them off."
            )
        self.task, self.config = task, config
        self.embedding = nn.Embedding(task.vocab_size, config.d_model)
        self.encoder = Stack(config, "encoder")
        self.head = nn.Linear(config.d_model, task.num_values)
        # Under the old recipe layers start as torch has them.
        if config.init != "normal":
            initialize(self, config)
        # Cues b come after cues a in the vocabulary, values after both.
        offsets = torch.tensor([0, task.num_cues, 2 * task.num_cues])
        self.offsets: Tensor
        self.register_buffer("offsets", offsets, persistent=False)

    def forward(self, cues: Tensor, values: Tensor) -> Tensor:
        """Returns the logits of the query's value."""
        tokens = torch.cat((cues, values.unsqueeze(-1)), dim=-1) + self.offsets  # [B, T, 3]
        x = self.encoder(self.embedding(tokens).sum(dim=-2)).x  # [B, T, M]
        return self.head(x[:, -1])


def _shuffled(count: int, batch: int, generator: torch.Generator) -> Tensor:
    return torch.rand(batch, count, generator=generator).argsort(dim=1)  # [B, count]
