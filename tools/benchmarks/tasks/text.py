"""Byte-level language modelling."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from benchmarks.tasks.base import Task
from gohgraph.attention.head_load import load_cv
from gohgraph.learning.data.corpus import PYTHON_DOCS, Corpus, evaluation_batches, load_corpus, sample_batch
from gohgraph.learning.regimes.language import VOCAB_SIZE, next_token_output, window_losses
from gohgraph.models.config import TransformerConfig
from gohgraph.models.model_output import ModelOutput
from gohgraph.models.models import LanguageModel

LOAD_WINDOWS = 64


@dataclass(frozen=True)
class Text(Task):
    """The next byte of a text.

    Args:
        data: a corpus by name, or the path of a text.
        length: bytes of a window.
        windows: of the validation text that are measured.

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
    windows: int = 256
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

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Returns the loss over fixed windows; of routed heads also the load's variation in the most uneven layer."""
        text, length = self.corpus.validation, self.length
        losses = window_losses(model, text, batch_size=16, length=length, limit=self.windows)
        inputs, _ = next(evaluation_batches(text, batch_size=LOAD_WINDOWS, length=length, limit=LOAD_WINDOWS))
        found, loads = {"validation_loss": losses.mean().item()}, [layer.load for layer in model(inputs).routing]
        if loads:
            num_shared = model.config.head_graph.routing.num_shared
            # Not the mean over layers: one that routes all tokens alike should not hide behind the others.
            found["worst_load_cv"] = load_cv(torch.stack(loads), num_shared).max().item()
        return found
