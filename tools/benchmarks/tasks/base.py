"""What a quality task is: a model to build, batches to train it on, and a measure of how well it does."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gohgraph.models.boundary import IGNORED_TARGET
from gohgraph.models.config import TransformerConfig
from gohgraph.models.model_output import ModelOutput
from gohgraph.models.models import LanguageModel

# What is never trained on, in two parts: rates are chosen on one and results are reported on the other.
CHOOSING, REPORTED = "choosing", "reported"
HELD_OUT_SEEDS, HELD_OUT_EPISODES = {CHOOSING: -2, REPORTED: -1}, 512


@dataclass(frozen=True)
class Task(ABC):
    """A task on which attention variants are compared; a subclass says what is learned.

    Its data has three parts: what is trained on, what learning rates are chosen on, and what is reported on.

    Args:
        d_model, num_heads, num_layers: M, H and L of the models.
        batch_size: B.
        steps: of a full run.
        learning_rates: the grid, the same for all variants.
        num_kv_heads: key/value heads, a divisor of H; `None` for H.
        d_ff: inner width of the feed-forward, the least of any variant; `None` for `widening` times M.

    Attributes:
        summary: what is measured, in one line of the table's caption.
        measure: the entry of `evaluate` that is reported, lower is better.
        chosen_by: the entry that learning rates are chosen by; `None` for the measure's of the choosing part.
        widening: d_ff over M where `d_ff` is `None`.
        grid: values of settings that go over the grid of a recipe that has one, where the task asks for others.
    """

    d_model: int
    num_heads: int
    num_layers: int
    batch_size: int
    steps: int
    learning_rates: tuple[float, ...]
    num_kv_heads: int | None = None
    d_ff: int | None = None
    summary: ClassVar[str]
    measure: ClassVar[str] = "validation_loss"
    chosen_by: ClassVar[str | None] = None
    widening: ClassVar[int] = 4
    grid: ClassVar[Mapping[str, tuple[float, ...]]] = {}

    @property
    def choosing(self) -> str:
        """The entry of `evaluate` that learning rates are chosen by, lower is better."""
        return self.chosen_by or f"choosing_{self.measure.removeprefix('validation_')}"

    @abstractmethod
    def config(self) -> TransformerConfig:
        """Returns the transformer's configuration without head graphs."""

    @abstractmethod
    def model(self, config: TransformerConfig) -> nn.Module:
        """Builds a model for the task."""

    @abstractmethod
    def batch(self, index: int, seed: int) -> Any:
        """Returns the tensors of a training batch, a pure function of its number and the seed."""

    @abstractmethod
    def output(self, model: nn.Module, batch: Any) -> ModelOutput | Tensor:
        """Returns the training loss, or an output that holds it."""

    @abstractmethod
    def measures(self, model: nn.Module, part: str) -> dict[str, float]:
        """Measures a model on one of the two parts that are never trained on: `loss` and perhaps `error`."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Measures a model on both: `choosing_loss`, `validation_loss` of the part that is reported, and more."""
        chosen, reported = (self.measures(model, part) for part in (CHOOSING, REPORTED))
        return named_by_part(chosen, reported)

    def final(self, model: nn.Module) -> dict[str, float]:
        """Measures a trained model once more, by what takes too long to be measured on the way."""
        return {}

    def training(self, steps: int) -> dict[str, Any]:
        """Returns changes of `TrainConfig` that are the task's own under any recipe."""
        return {"warmup": steps // 20}

    def epochs(self, steps: int) -> float | None:
        """Returns how often so many steps see each training example; `None` where all of them are fresh."""
        return None

    def shape(self) -> dict[str, Any]:
        """Returns the sizes of the transformer."""
        sizes = {name: getattr(self, name) for name in ("d_model", "num_heads", "num_kv_heads", "num_layers")}
        return {**sizes, "d_ff": self.widening * self.d_model if self.d_ff is None else self.d_ff}


@dataclass(frozen=True)
class EpisodeTask(Task):
    """A task of random token sequences of which only some positions are to be predicted, by a language model."""

    measure: ClassVar[str] = "error"
    # Where the scores of small heads start decides whether plain attention learns to look up in so many steps.
    grid: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "learning_rate": (1e-2, 2e-2),
        "matrix_learning_rate": (0.02, 0.04),
        "qk_norm": (1.0, 1.7, 3.0),
    }

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Token ids of the task."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens of an episode."""

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws episodes: inputs and targets `[count, length]`, -100 where nothing is asked."""

    def config(self) -> TransformerConfig:
        """Returns the transformer's configuration without head graphs."""
        return TransformerConfig(self.vocab_size, **self.shape(), max_length=self.length)

    def model(self, config: TransformerConfig) -> LanguageModel:
        """Builds a language model."""
        return LanguageModel(config)

    def batch(self, index: int, seed: int) -> tuple[Tensor, Tensor]:
        """Returns inputs and targets of a training batch."""
        return self.draw(self.batch_size, generator_of(seed, index))

    def output(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> ModelOutput:
        """Returns the model's output with its loss."""
        return model(batch[0], targets=batch[1])

    def measures(self, model: nn.Module, part: str) -> dict[str, float]:
        """Returns the loss, and the error: the share of held-out answers whose most likely token is wrong."""
        inputs, targets = self.draw(HELD_OUT_EPISODES, generator_of(HELD_OUT_SEEDS[part], 0))
        losses, wrong, asked = 0.0, 0, 0
        for x, y in zip(inputs.split(self.batch_size), targets.split(self.batch_size), strict=True):
            output, is_asked = model(x, targets=y), y != IGNORED_TARGET
            losses += output.cross_entropy.item() * is_asked.sum().item()
            wrong += ((output.logits.argmax(dim=-1) != y) & is_asked).sum().item()
            asked += is_asked.sum().item()
        return {"loss": losses / asked, "error": wrong / asked}


def named_by_part(chosen: dict[str, float], reported: dict[str, float]) -> dict[str, float]:
    """Returns the measures of both held-out parts under the names they have in a log.

    Example:
        >>> named_by_part({"loss": 2.0, "error": 0.5}, {"loss": 3.0, "error": 0.6})
        {'choosing_loss': 2.0, 'choosing_error': 0.5, 'validation_loss': 3.0, 'error': 0.6}
    """
    named = {"validation_loss" if name == "loss" else name: value for name, value in reported.items()}
    return {f"choosing_{name}": value for name, value in chosen.items()} | named


def generator_of(seed: int, index: int) -> torch.Generator:
    """Returns a generator for batch `index` of `seed`: hashed, torch's CPU generator keeps 32 bits of a seed."""
    return torch.Generator().manual_seed(random.Random(f"{seed} {index}").getrandbits(32))


def distinct(count: int, low: int, high: int, batch: int, generator: torch.Generator) -> Tensor:
    """Draws `count` different numbers of low..high-1 for each row, `[batch, count]`."""
    return low + torch.rand(batch, high - low, generator=generator).argsort(dim=1)[:, :count]


def check_stack_alone(config: TransformerConfig) -> None:
    """Raises `ValueError` for what a model with embeddings and a head of its own around a stack would leave out."""
    for name in ("embedding_norm", "logit_cap"):
        if getattr(config, name):
            raise ValueError(f"Expected no {name} in this task's model (got {getattr(config, name)}). Do leave it out.")
