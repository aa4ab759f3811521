"""What encoders are given that predict nothing: what is looked at is the embedding of the text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gohgraph.analysis.metrics import embedding_share
from gohgraph.learning.readers.reader import BATCH, Batch, Inputs, Reader, Task


class Embedding(Reader):
    """An encoder without a task; its embedding of a text is the mean over tokens.

    Its loss is how much of the embedding is gone, 0 for the whole model.
    """

    what = "an encoder without a task"
    unit: ClassVar[str] = "as a share of the embedding"

    def batches(self, text: bytes | None, length: int, limit: int) -> list[Batch]:
        ids = torch.stack(self.pieces(text, length)[:limit])  # [N, T]
        return [(self.given(part), self._embedded(part)) for part in ids.split(BATCH)]

    def given(self, ids: Tensor) -> Inputs:
        return {"input_ids": ids if ids.dim() == 2 else ids[None]}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        inputs, own = batch
        return 1 - self._share(own)(model(**inputs)).mean()

    def task(self, text: bytes | None, length: int, target: str | None) -> Task:
        if target is not None:
            raise ValueError(f"Expected no --target for {self.what} (got {target!r}). Do drop it.")
        ids, words, notes = self.sequence(text, length)
        metric = self._share(self._embedded(ids))
        return Task(self.given(ids), metric, "the embedding, mean over tokens", notes, words)

    def metric_beside(self, task: Task, other: Inputs) -> Callable[[Any], Tensor]:
        """Returns how far the embedding has come from the other text's to this one's."""
        own, its = (self._embedded(inputs["input_ids"]) for inputs in (task.inputs, other))  # [1, M]
        return embedding_share(own, its, self._mean)

    @torch.no_grad()
    def _embedded(self, ids: Tensor) -> Tensor:
        """The embeddings of sequences, `[B, M]`."""
        return self._mean(self.model(**self.given(ids)))

    def _share(self, own: Tensor) -> Callable[[Any], Tensor]:
        return embedding_share(own, torch.zeros_like(own), self._mean)

    @staticmethod
    def _mean(output: Any) -> Tensor:
        return output.last_hidden_state.mean(dim=1)  # [B, M]
