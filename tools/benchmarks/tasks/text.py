"""Byte-level language modelling."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from benchmarks.tasks.base import CHOOSING, REPORTED, Task, named_by_part
from gohgraph.attention.head_load import load_cv
from gohgraph.common.checks import there
from gohgraph.learning.data.corpus import PYTHON_DOCS, Corpus, evaluation_batches, load_corpus, sample_batch
from gohgraph.learning.regimes.language import VOCAB_SIZE, next_token_output, window_losses
from gohgraph.models.config import TransformerConfig
from gohgraph.models.model_output import ModelOutput
from gohgraph.models.models import LanguageModel

LOAD_WINDOWS = 64


@dataclass(frozen=True)
class Text(Task):
    """The next byte of a text.

    The corpus holds out whole documents, or its end. Rates are chosen on the first half of what is held out, results
    reported on the second.

    Args:
        data: a corpus by name, or the path of a text.
        length: bytes of a window.
        windows: that are measured in either part on the way, spread evenly.
        final_windows: that are measured in either part in the end.

    Example:
        >>> Text().config().vocab_size
        256
    """

    d_model: int = 128
    num_heads: int = 8
    num_layers: int = 5
    batch_size: int = 4
    steps: int = 4000
    learning_rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    data: str = PYTHON_DOCS
    length: int = 128
    windows: int = 128
    final_windows: int = 1024
    summary: ClassVar[str] = "next byte of a text: validation loss, nats per byte"

    @cached_property
    def corpus(self) -> Corpus:
        """The text, read once."""
        return load_corpus(self.data)

    def config(self) -> TransformerConfig:
        """Returns the transformer's configuration without head graphs."""
        return TransformerConfig(VOCAB_SIZE, **self.shape(), max_length=self.length)

    def model(self, config: TransformerConfig) -> LanguageModel:
        """Builds a language model."""
        return LanguageModel(config)

    def batch(self, index: int, seed: int) -> tuple[Tensor, Tensor]:
        """Returns random windows of the training text and the bytes that follow."""
        return sample_batch(self.corpus.train, index, batch_size=self.batch_size, length=self.length, seed=seed)

    def output(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> ModelOutput:
        """Returns the model's output with its loss."""
        return next_token_output(model, batch)

    def measures(self, model: nn.Module, part: str) -> dict[str, float]:
        """Returns the loss over half of the held-out text."""
        return self._measures(model, part, self.windows)

    def final(self, model: nn.Module) -> dict[str, float]:
        """Returns the loss of both parts over more windows."""
        return named_by_part(*(self._measures(model, part, self.final_windows) for part in (CHOOSING, REPORTED)))

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Returns the loss of both parts; of routed heads also the load's variation in the most uneven layer."""
        text, length = self.corpus.validation, self.length
        found = super().evaluate(model)
        inputs, _ = next(evaluation_batches(text, batch_size=LOAD_WINDOWS, length=length, limit=LOAD_WINDOWS))
        if loads := [layer.load for layer in model(inputs).routing]:
            assert isinstance(model, LanguageModel)
            num_shared = there(there(model.config.head_graph).routing).num_shared
            # Not the mean over layers: one that routes all tokens alike should not hide behind the others.
            found["worst_load_cv"] = load_cv(torch.stack(loads), num_shared).max().item()
        return found

    def epochs(self, steps: int) -> float:
        """Returns how often so many steps see each byte, on average."""
        return steps * self.batch_size * self.length / len(self.corpus.train)

    def _measures(self, model: nn.Module, part: str, windows: int) -> dict[str, float]:
        text = self.corpus.validation
        half = text[: len(text) // 2] if part == CHOOSING else text[len(text) // 2 :]
        losses = window_losses(model, half, batch_size=16, length=self.length, limit=windows)
        return {"loss": losses.mean().item()}
