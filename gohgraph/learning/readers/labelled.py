"""What models are given that predict for a whole input: classifiers of text and images, and translators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from gohgraph.analysis.metrics import log_probability, logit_difference, logits_of
from gohgraph.learning.readers.reader import BATCH, Batch, Inputs, Reader, Task
from gohgraph.learning.readers.tokens import BYTES, Tokens

# Examples that an attribution is a mean over, where a run has its own.
EXAMPLES = 8


class Classes(Reader):
    """A classifier of texts. Texts without a label have the class it predicts itself.

    Args:
        model, tokens, longest: as of `Reader`.
        names: of the classes, in order.
        examples: inputs `[N, T]` and classes `[N]` of the run, `None` where it has none.
    """

    what = "a classifier of texts"
    key: ClassVar[str] = "input_ids"

    def __init__(
        self, model: nn.Module, tokens: Tokens, longest: int | None, names: Sequence[str],
        examples: tuple[Tensor, Tensor] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, tokens, longest)
        self.names, self.examples = list(names), examples

    @property
    def has_data(self) -> bool:
        return self.examples is not None

    def batches(self, text: bytes | None, length: int, limit: int) -> list[Batch]:
        if text is None:
            return self._own(limit)
        ids = torch.stack(self.pieces(text, length)[:limit])  # [N, T]
        return [(self.given(part), self._predicted(self.given(part))) for part in ids.split(BATCH)]

    def given(self, ids: Tensor) -> Inputs:
        return {self.key: ids if ids.dim() == 2 else ids[None]}

    def notes(self, batches: list[Batch]) -> list[str]:
        return [] if self._is_own(batches) else ["importance is of the classes the model predicts itself"]

    def task(self, text: bytes | None, length: int, target: str | None) -> Task:
        if text is None:
            return self._of_examples(target)
        ids, words, notes = self.sequence(text, length)
        inputs = self.given(ids)
        found = int(self._predicted(inputs))
        chosen = [found] if target is None else [self._class(name) for name in target.split("|")]
        if len(chosen) > 2 or len(set(chosen)) < len(chosen):
            raise ValueError(f"Expected --target CLASS or 'RIGHT|WRONG' (got {target!r}). Do name one or two classes.")
        names, notes = [self.names[number] for number in chosen], (*notes, f"the model says {self.names[found]!r}")
        if len(chosen) == 2:
            metric = logit_difference(*(torch.tensor([number]) for number in chosen))
            return Task(inputs, metric, f"logit({names[0]!r}) - logit({names[1]!r})", notes, words)
        return Task(inputs, log_probability(torch.tensor(chosen)), f"log p of class {names[0]!r}", notes, words)

    def _of_examples(self, target: str | None) -> Task:
        if target is not None:
            raise ValueError(f"Expected --text beside --target (got {target!r} alone). Do pass the text it is of.")
        (inputs, labels), *_ = self._own(EXAMPLES)
        return Task(inputs, log_probability(labels), "log p of the right class")

    def _own(self, limit: int) -> list[Batch]:
        if self.examples is None:
            raise ValueError(f"Expected a text for {self.what} (got neither --text nor --text-file). Do pass one.")
        inputs, labels = self.examples
        # Classes come one after the other in some data.
        rows = torch.arange(min(limit, len(labels))) * len(labels) // min(limit, len(labels))
        return [({self.key: inputs[part]}, labels[part]) for part in rows.split(BATCH)]

    def _is_own(self, batches: list[Batch]) -> bool:
        return self.examples is not None and batches[0][0][self.key].shape[1:] == self.examples[0].shape[1:]

    @torch.no_grad()
    def _predicted(self, inputs: Inputs) -> Tensor:
        return logits_of(self.model(**inputs)).argmax(dim=-1)

    def _class(self, name: str) -> int:
        if name in self.names:
            return self.names.index(name)
        raise ValueError(f"Expected --target of {self.names[:20]} (got {name!r}). Do choose one of the classes.")


class Images(Classes):
    """A classifier of images, which has no text: it is shown on the images of its run."""

    what, key, strings_known = "a classifier of images", "pixel_values", False

    def __init__(self, model: nn.Module, names: Sequence[str], examples: tuple[Tensor, Tensor]) -> None:
        super().__init__(model, BYTES, None, names, examples)

    def batches(self, text: bytes | None, length: int, limit: int) -> list[Batch]:
        self._refuse(text)
        return super().batches(text, length, limit)

    def task(self, text: bytes | None, length: int, target: str | None) -> Task:
        self._refuse(text)
        return super().task(text, length, target)

    def _refuse(self, text: bytes | None) -> None:
        if text is not None:
            raise ValueError(
                f"Expected no text for {self.what} (got one of {len(text)} bytes). Do drop --text and --text-file."
            )


class Translation(Reader):
    """An encoder-decoder. Sentences without a translation have the one it makes itself, greedily.

    Args:
        model, tokens, longest: as of `Reader`.
        begin, end: the token a translation begins with, and the one behind it.
        pairs: sentences of the run with their translations, `None` where it has none.
    """

    what, strings_known = "an encoder-decoder", False
    most: ClassVar[int] = 60

    def __init__(
        self, model: nn.Module, tokens: Tokens, longest: int | None, begin: int, end: int,
        pairs: Sequence[tuple[str, str]] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, tokens, longest)
        self.begin, self.end, self.pairs = begin, end, pairs

    @property
    def has_data(self) -> bool:
        return self.pairs is not None

    def batches(self, text: bytes | None, length: int, limit: int) -> list[Batch]:
        if text is None and self.pairs is not None:
            pairs: Sequence[tuple[str, str | None]] = self.pairs[:limit]
        else:
            lines = [line for line in (text or b"").decode("utf-8", "replace").splitlines() if line.strip()]
            pairs = [(line, None) for line in lines[:limit]]
        if not pairs:
            got = "neither --text nor --text-file" if text is None else "a text without a line"
            raise ValueError(f"Expected a text for {self.what} (got {got}). Do pass one.")
        # One sentence a batch: no padding, whose weights would be counted.
        return [self._pair(source.encode(), target, length)[0] for source, target in pairs]

    def given(self, ids: Tensor) -> Inputs:
        return {"input_ids": ids[None]}

    def notes(self, batches: list[Batch]) -> list[str]:
        return ["means over the source's tokens in the encoder and over the translation's in the decoder"]

    def task(self, text: bytes | None, length: int, target: str | None) -> Task:
        if text is None:
            if self.pairs is None or target is not None:
                got = "neither --text nor --text-file" if target is None else "its translation alone"
                raise ValueError(f"Expected a text for {self.what} (got {got}). Do pass one.")
            source, target = self.pairs[0]
            text = source.encode()
        (inputs, labels), words, notes = self._pair(text, target, length)
        own = self.tokens.text(labels[0])
        said = f"log p of the translation {own!r}" + ("" if target is not None else ", which it makes itself")
        return Task(inputs, log_probability(labels, shift=False), said, notes, words)

    def _pair(self, source: bytes, target: str | None, length: int) -> tuple[Batch, int, tuple[str, ...]]:
        ids, words, notes = self.sequence(source, length)
        if target is None:
            said = self._translated(ids)
        else:
            said = torch.cat([self.tokens.known(target.encode())[0], torch.tensor([self.end])])
        before = torch.cat([torch.tensor([self.begin]), said[:-1]])
        return ({**self.given(ids), "decoder_input_ids": before[None]}, said[None]), words, notes

    @torch.no_grad()
    def _translated(self, ids: Tensor) -> Tensor:
        """The greedy translation of a sentence, its end included, int64 `[T]`."""
        said: list[int] = [self.begin]
        for _ in range(min(self.most, (self.longest or self.most + 1) - 1)):
            output = self.model(input_ids=ids[None], decoder_input_ids=torch.tensor([said]))
            said.append(int(logits_of(output)[0, -1].argmax()))
            if said[-1] == self.end:
                break
        return torch.tensor(said[1:], dtype=torch.long)
