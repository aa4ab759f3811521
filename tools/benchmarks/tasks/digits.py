"""Handwritten digits, the images that scikit-learn ships."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from benchmarks.tasks.base import CHOOSING, Task, generator_of
from gohgraph.learning.data.classification import load_digits
from gohgraph.models.config import ClassifierConfig, TransformerConfig
from gohgraph.models.model_output import ModelOutput
from gohgraph.models.models import Classifier


@dataclass(frozen=True)
class Digits(Task):
    """Which digit an image of 8 x 8 pixels shows, read as 16 patches.

    1,797 images, a fifth of them held out, the same for all seeds: rates are chosen on the first half of those (179),
    results reported on the second (180).

    Raises:
        ImportError: scikit-learn is not installed.

    Example:
        >>> Digits().config().max_length
        16
    """

    d_model: int = 48
    num_heads: int = 8
    num_layers: int = 2
    batch_size: int = 64
    steps: int = 600
    learning_rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    measure: ClassVar[str] = "validation_loss"
    summary: ClassVar[str] = "digits of 8 x 8 pixels: validation loss, nats per image"

    @cached_property
    def images(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images `[N, 1, 8, 8]` in [0, 1] and digits `[N]` to train on, and the same held out."""
        data = load_digits()
        return *data.train, *data.validation

    def config(self) -> TransformerConfig:
        """Returns the transformer's configuration without head graphs."""
        return TransformerConfig(1, **self.shape(), max_length=16, positions="learned")

    def model(self, config: TransformerConfig) -> Classifier:
        """Builds a classifier of patches of 2 x 2 pixels."""
        return Classifier(ClassifierConfig(config, num_classes=10, patch_size=2, channels=1))

    def batch(self, index: int, seed: int) -> tuple[Tensor, Tensor]:
        """Returns random images and their digits."""
        images, digits, _, _ = self.images
        rows = torch.randint(len(digits), (self.batch_size,), generator=generator_of(seed, index))
        return images[rows], digits[rows]

    def output(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> ModelOutput:
        """Returns the model's output with its loss."""
        return model(batch[0], targets=batch[1])

    def measures(self, model: nn.Module, part: str) -> dict[str, float]:
        """Returns loss and error on half of the held-out images."""
        _, _, images, digits = self.images
        half = len(digits) // 2
        images, digits = (x[:half] if part == CHOOSING else x[half:] for x in (images, digits))
        output = model(images, targets=digits)
        wrong = (output.logits.argmax(dim=-1) != digits).double().mean().item()
        return {"loss": output.cross_entropy.item(), "error": wrong}

    def epochs(self, steps: int) -> float:
        """Returns how often so many steps see each image."""
        return steps * self.batch_size / len(self.images[1])
