"""Finding the block of letters that holds all letters of the question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.tasks.base import EpisodeTask
from gohgraph.models.boundary import IGNORED_TARGET

LETTERS = 26
DOT, HASH = LETTERS, LETTERS + 1


@dataclass(frozen=True)
class FindBlock(EpisodeTask):
    """The motivating task of multi-token attention: `hjnvt.qfjgt.whftb#th` -> `whftb`, the only block with both.

    One head can match one letter of the question; the block is where several matches meet.

    Source: Multi-Token Attention (Golovneva et al. 2025, arXiv 2504.00927, section 4.1): blocks of 5 or 8 different
    letters, a question of 2, the whole block as the answer. Smaller here: fewer blocks, a smaller model, fewer steps.

    One who looks the block up makes no error. One who copies a block picked blindly errs in 1 - 1/num_blocks of the
    first letters; after those the answer is known from its beginning, which is given.

    Args:
        num_blocks: blocks of an episode.
        block_length: N, different letters of a block.
        num_asked: letters of the question.

    Example:
        >>> task = FindBlock(num_blocks=3, block_length=5)
        >>> inputs, targets = task.draw(2, torch.Generator())
        >>> inputs.shape, (targets != -100).sum(dim=1).tolist()
        (torch.Size([2, 24]), [5, 5])
    """

    d_model: int = 64
    num_heads: int = 4
    num_layers: int = 3
    batch_size: int = 64
    steps: int = 1500
    learning_rates: tuple[float, ...] = (2.5e-4, 5e-4, 1e-3)
    num_blocks: int = 4
    block_length: int = 5
    num_asked: int = 2
    summary: ClassVar[str] = "finding the block with both letters: share of wrong letters"

    @property
    def vocab_size(self) -> int:
        """Letters, the dot and the hash."""
        return LETTERS + 2

    @property
    def length(self) -> int:
        """Blocks with a dot or hash after each, the question, and the answer but for its last letter."""
        return self.num_blocks * (self.block_length + 1) + self.num_asked + self.block_length - 1

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws episodes: inputs and targets `[count, T]`; targets are the letters of the block that is asked for."""
        blocks = self._blocks(count * self.num_blocks, generator).unflatten(0, (count, -1))  # [count, K, N]
        picked = torch.rand(count, self.block_length, generator=generator).argsort(dim=1)[:, : self.num_asked]
        question = blocks[:, 0].gather(1, picked)  # [count, num_asked]
        while (clash := self._also_hold(blocks, question)).any():
            blocks[clash] = self._blocks(int(clash.sum()), generator)
        order = torch.rand(count, self.num_blocks, 1, generator=generator).argsort(dim=1)
        shuffled = blocks.gather(1, order.expand_as(blocks))
        dots = torch.full((count, self.num_blocks, 1), DOT)
        dots[:, -1] = HASH
        text = torch.cat((shuffled, dots), dim=2).flatten(1)  # [count, K * (N + 1)]
        answer = blocks[:, 0]  # [count, N]
        inputs = torch.cat((text, question, answer[:, :-1]), dim=1)  # [count, T]
        targets = torch.full_like(inputs, IGNORED_TARGET)
        targets[:, -self.block_length :] = answer
        return inputs, targets

    def _blocks(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.rand(count, LETTERS, generator=generator).argsort(dim=1)[:, : self.block_length]

    def _also_hold(self, blocks: Tensor, question: Tensor) -> Tensor:
        """Which blocks besides the first hold the whole question, `[count, K]`."""
        holds = (blocks[:, :, :, None] == question[:, None, None, :]).any(dim=2).all(dim=2)  # [count, K]
        return holds & (torch.arange(self.num_blocks) > 0)
