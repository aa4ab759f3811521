"""Translation by an encoder and a decoder."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor, nn

from benchmarks.tasks.base import CHOOSING, REPORTED, Task
from gohgraph.learning.data.parallel_text import NUMERALS, PairBatches, Subwords, load_parallel_text
from gohgraph.learning.regimes.translation import bleu, sentence_losses, translate, translation_output
from gohgraph.models.config import TransformerConfig
from gohgraph.models.model_output import ModelOutput
from gohgraph.models.models import Transformer

Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class Translation(Task):
    """English into German, such as Multi30k: subwords of both languages, label smoothing, BLEU of a beam search.

    Rates are chosen on pairs that are split from the training pairs, the same for all seeds: those that a shuffle with
    a fixed seed puts first. Results are reported on the validation pairs.

    Args:
        pairs: "numerals" (synthetic), or a folder with train.en, train.de, val.en and val.de, one sentence a line.
        num_choosing: pairs that are split from training.
        vocab_size: the most subwords.
        dropout, label_smoothing: of the training.

    Example:
        >>> task = Translation(num_choosing=500)
        >>> {part: len(pairs) for part, pairs in task.parts.items()}
        {'training': 19500, 'choosing': 500, 'reported': 500}
    """

    d_model: int = 128
    num_heads: int = 8
    num_layers: int = 3
    batch_size: int = 64
    steps: int = 1500
    learning_rates: tuple[float, ...] = (1.5e-3, 3e-3, 6e-3)
    pairs: str = NUMERALS
    num_choosing: int = 1000
    vocab_size: int = 4000
    dropout: float = 0.1
    label_smoothing: float = 0.1
    widening: ClassVar[int] = 2
    summary: ClassVar[str] = "translation, English into German: validation loss, nats per subword"

    @cached_property
    def parts(self) -> dict[str, Pairs]:
        """The sentence pairs of each part of the data."""
        text = load_parallel_text(self.pairs)
        if not 1 <= self.num_choosing < len(text.train):
            raise ValueError(
                f"Expected num_choosing in 1..{len(text.train) - 1}, fewer than the training pairs of {self.pairs} "
                f"(got {self.num_choosing}). Do change it."
            )
        order = list(range(len(text.train)))
        random.Random(0).shuffle(order)
        held_out = set(order[: self.num_choosing])
        rest = [pair for row, pair in enumerate(text.train) if row not in held_out]
        return {"training": rest, CHOOSING: [text.train[row] for row in sorted(held_out)], REPORTED: text.validation}

    @cached_property
    def subwords(self) -> Subwords:
        """The vocabulary, of the training pairs alone."""
        return Subwords.train([sentence for pair in self.parts["training"] for sentence in pair], self.vocab_size)

    @cached_property
    def encoded(self) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
        """Token ids of all sources and of all targets, by part."""
        encode = self.subwords.encode
        sides = {part: zip(*pairs, strict=True) for part, pairs in self.parts.items()}
        return {part: (encode(source), encode(target)) for part, (source, target) in sides.items()}

    def batches(self, part: str, seed: int = 0) -> PairBatches:
        """Returns batches of a part of the data."""
        return PairBatches(*self.encoded[part], batch_size=self.batch_size, seed=seed)

    @cached_property
    def _training_batches(self) -> dict[int, PairBatches]:
        return {}

    def config(self) -> TransformerConfig:
        """Returns the transformer's configuration without head graphs."""
        return TransformerConfig(len(self.subwords), **self.shape(), dropout=self.dropout)

    def model(self, config: TransformerConfig) -> Transformer:
        """Builds an encoder and a decoder."""
        return Transformer(config)

    def batch(self, index: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns source, target and the token after each."""
        # Kept, since it holds the order of its epoch.
        if seed not in self._training_batches:
            self._training_batches[seed] = self.batches("training", seed)
        return self._training_batches[seed](index)

    def output(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> ModelOutput:
        """Returns the model's output with its smoothed loss."""
        return translation_output(model, batch, label_smoothing=self.label_smoothing)

    def measures(self, model: nn.Module, part: str) -> dict[str, float]:
        """Returns the loss per subword, without label smoothing."""
        losses, counts = sentence_losses(model, self.batches(part))
        return {"loss": (losses.sum() / counts.sum()).item()}

    def final(self, model: nn.Module) -> dict[str, float]:
        """Returns BLEU of the reported part (4 beams, length penalty 0.6)."""
        found = list(translate(model, self.subwords, self.batches(REPORTED)))
        return {"bleu": bleu(found, [target for _, target in self.parts[REPORTED]])[0]}

    def training(self, steps: int) -> dict[str, Any]:
        """Returns the schedule of Vaswani et al. 2017, as `examples/train_translation.py` has it."""
        schedule = {"schedule": "inverse-sqrt", "warmup": max(1, steps // 5)}
        return {**schedule, "betas": [0.9, 0.98], "weight_decay": 0.01}

    def epochs(self, steps: int) -> float:
        """Returns how often so many steps see each pair."""
        return steps * self.batch_size / len(self.parts["training"])
