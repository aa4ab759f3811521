"""What a model is given of a text and what it predicts there: language models, causal and masked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from gohgraph.analysis.metrics import IGNORED, log_probability, logit_difference, logits_of
from gohgraph.common.checks import needed, there
from gohgraph.learning.data.corpus import evaluation_batches
from gohgraph.learning.readers.tokens import Tokens

Inputs = dict[str, Tensor]
# What a model is given, by the names of transformers, and what it is to predict: [B, T], or classes [B].
Batch = tuple[Inputs, Tensor]
# Sequences of a batch; of a masked model's tokens, every so many-th is hidden.
BATCH, MASKED_EVERY = 8, 7


class Task(NamedTuple):
    """One text and a behaviour there.

    Attributes:
        inputs: of one batch.
        metric: what the model returns -> one number for each example.
        said: what the metric is.
        notes: sentences a reader of the picture should know.
        words: how many of the text's tokens the model is given, special ones not counted.
    """

    inputs: Inputs
    metric: Callable[[Any], Tensor]
    said: str
    notes: tuple[str, ...] = ()
    words: int = 0


class Reader(ABC):
    """A model in eval mode and its tokens; a subclass says what such a model predicts.

    Args:
        model: takes its inputs by the names of transformers.
        tokens: that it was trained on.
        longest: most tokens of a sequence, `None` for no limit.

    Attributes:
        what: the kind of model, in words.
        least: fewest tokens of a text, special ones counted.
        strings_known: whether every token of a sequence is one row of a recording.
        unit: what the loss is in.
    """

    what: ClassVar[str]
    strings_known: ClassVar[bool] = True
    least: ClassVar[int] = 1
    unit: ClassVar[str] = "in nats"

    def __init__(self, model: nn.Module, tokens: Tokens, longest: int | None = None) -> None:
        self.model, self.tokens, self.longest = model, tokens, longest

    @property
    def has_data(self) -> bool:
        """Whether the model's run has examples of its own, taken where the text is `None`."""
        return False

    @abstractmethod
    def batches(self, text: bytes | None, length: int, limit: int) -> list[Batch]:
        """Returns at most `limit` sequences of `length` tokens, spread over a text, with what is to be predicted."""

    @abstractmethod
    def given(self, ids: Tensor) -> Inputs:
        """Returns what the model is given of the tokens `[T]` of one sequence."""

    @abstractmethod
    def task(self, text: bytes | None, length: int, target: str | None) -> Task:
        """Returns what is to be attributed to: `target`, or without one what the model is trained to predict."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns the mean cross entropy of a batch in nats."""
        inputs, labels = batch
        return -log_probability(labels, shift=False)(model(**inputs)).mean()

    def notes(self, batches: list[Batch]) -> list[str]:
        """Returns what a reader of a picture of these batches should know."""
        return []

    def strings(self, batch: Batch) -> list[str]:
        """Returns what the tokens of a batch's first sequence stand for."""
        return self.tokens.strings(batch[0]["input_ids"][0])

    def other(self, text: bytes, task: Task) -> Inputs:
        """Returns the inputs of a task with another text, cut to as many tokens."""
        words, _ = self.tokens.known(text)
        if len(words) < task.words:
            raise ValueError(
                f"Expected --against of {task.words} tokens, as the text (got {len(words)}). Do make both as long, or "
                "choose zero."
            )
        return {**task.inputs, **self.given(self.tokens.framed(words[: task.words]))}

    def metric_beside(self, task: Task, other: Inputs) -> Callable[[Any], Tensor]:
        """Returns the metric of a task whose heads are given what they write of another input."""
        return task.metric

    def sequence(self, text: bytes | None, length: int | None) -> tuple[Tensor, int, tuple[str, ...]]:
        """Returns the tokens of a text between special ones, how many it has itself, and what is to be said of it."""
        words, unknown = self.tokens.known(needed("text", text))
        if length is not None:
            words = words[: max(1, length - len(self.tokens.before) - len(self.tokens.after))]
        ids = self.tokens.framed(words)
        if not len(words) or len(ids) < self.least:
            raise self._too_short(len(words))
        if self.longest is not None and len(ids) > self.longest:
            raise ValueError(
                f"Expected a text of up to {self.longest} tokens (got {len(ids)}). Do shorten it."
            )
        return ids, len(words), ((unknown,) if unknown else ())

    def pieces(self, text: bytes | None, length: int) -> list[Tensor]:
        """Returns the sequences of up to `length` tokens that a text is cut into, all as long, what is left dropped."""
        words, _ = self.tokens.known(needed("text", text))
        room = min(max(1, length - len(self.tokens.before) - len(self.tokens.after)), len(words))
        if not room:
            raise self._too_short(0)
        return [self.tokens.framed(part) for part in words.split(room) if len(part) == room]

    def _too_short(self, count: int) -> ValueError:
        least = "one token" if self.least == 1 else "two tokens"
        return ValueError(f"Expected a text of at least {least} (got {count or 'none'}). Do pass a longer one.")

    def ends(self, target: str) -> tuple[list[str], list[int], tuple[str, ...]]:
        """Returns the one or two words of `WORD` or `RIGHT|WRONG`, their first tokens, and what is to be said of it."""
        words, ids, notes = target.split("|"), [], []
        for word in filter(None, words):
            own = self.tokens.words(word.encode())
            if len(own) and int(own[0]) != self.tokens.unknown:
                ids.append(int(own[0]))
            if len(own) > 1:
                notes.append(f"{word!r} is {len(own)} tokens: its first, {self.tokens.strings(own[:1])[0]!r}, counts")
        if len(ids) != len(words) or len(ids) > 2 or len(set(ids)) < len(ids):
            raise ValueError(
                f"Expected --target WORD or 'RIGHT|WRONG' of known, different words (got {target!r}). Do name others."
            )
        return words, ids, tuple(notes)

    def logits_at(self, place: int, target: str, where: str) -> tuple[Callable[[Any], Tensor], str, tuple[str, ...]]:
        """Returns the metric of a target at a place, what it is, and what is to be said of it."""
        words, ids, notes = self.ends(target)
        if len(ids) == 2:
            metric = logit_difference(*(torch.tensor([token]) for token in ids), at=place)
            return metric, f"logit({words[0]!r}) - logit({words[1]!r}) {where}", notes
        return (lambda out: logits_of(out)[:, place].log_softmax(-1)[:, ids[0]]), f"log p({target!r}) {where}", notes


class Causal(Reader):
    """A model that predicts the next token."""

    what, least = "a causal language model", 2

    def batches(self, text: bytes | None, length: int, limit: int) -> list[Batch]:
        words, _ = self.tokens.known(needed("text", text))
        length = min(length, len(words) - 1)
        if length < 1:
            raise self._too_short(len(words))
        windows = evaluation_batches(words, batch_size=BATCH, length=length, limit=limit)
        return [(self.given(inputs), targets) for inputs, targets in windows]

    def notes(self, batches: list[Batch]) -> list[str]:
        last = self.tokens.strings(batches[0][1][0, -1:])[0]
        return [f"the last token, {last!r}, is only predicted: no head reads it"]

    def given(self, ids: Tensor) -> Inputs:
        return {"input_ids": ids if ids.dim() == 2 else ids[None]}

    def task(self, text: bytes | None, length: int, target: str | None) -> Task:
        ids, words, notes = self.sequence(text, length if target is None else None)
        last = self.tokens.strings(ids[-1:])[0]
        if target is not None:
            metric, said, more = self.logits_at(-1, target, f"after the last token, {last!r}")
            return Task(self.given(ids), metric, said, notes + more, words)
        labels = torch.cat([ids[1:], torch.tensor([IGNORED])])[None]
        notes = (*notes, f"the last token, {last!r}, is only predicted: what heads read at it does not count")
        return Task(self.given(ids), log_probability(labels, shift=False), "log p of every next token", notes, words)


class Masked(Reader):
    """A model that predicts hidden tokens from both sides."""

    what = "a masked language model"

    @property
    def _mask(self) -> int:
        # `load_reader` refuses a tokenizer without.
        return there(self.tokens.mask)

    def batches(self, text: bytes | None, length: int, limit: int) -> list[Batch]:
        words, _ = self.tokens.known(needed("text", text))
        room = min(max(1, length - len(self.tokens.before) - len(self.tokens.after)), len(words))
        if not room:
            raise self._too_short(0)
        available = len(words) // room
        count = min(available, limit)
        starts = [number * available // count * room for number in range(count)]
        ids = torch.stack([self.tokens.framed(words[start : start + room]) for start in starts])  # [N, T]
        return [self._hidden(part) for part in ids.split(BATCH)]

    def given(self, ids: Tensor) -> Inputs:
        return self._hidden(ids[None])[0]

    def task(self, text: bytes | None, length: int, target: str | None) -> Task:
        ids, words, notes = self.sequence(text, length)
        places = (ids == self._mask).nonzero().flatten().tolist()
        if target is not None:
            if len(places) != 1:
                name = self.tokens.strings(torch.tensor([self._mask]))[0]
                raise ValueError(
                    f"Expected one {name} in the text, where --target is predicted (got {len(places)}). Do put it in."
                )
            metric, said, more = self.logits_at(places[0], target, "at the mask")
            return Task({"input_ids": ids[None]}, metric, said, notes + more, words)
        inputs, labels = self._hidden(ids[None])
        said = f"log p of every {MASKED_EVERY}th token, masked"
        return Task(inputs, log_probability(labels, shift=False), said, notes, words)

    def _hidden(self, ids: Tensor) -> Batch:
        """Sequences `[B, T]` with every so many-th word masked, and these words as labels."""
        special = torch.isin(ids, torch.tensor(sorted(self.tokens.special)))
        number = (~special).long().cumsum(dim=1) - 1
        hidden = ~special & (number % MASKED_EVERY == MASKED_EVERY // 2)
        # A text shorter than that has its first word hidden.
        for row in (~hidden.any(dim=1)).nonzero().flatten().tolist():
            hidden[row, int((~special[row]).long().argmax())] = True
        return {"input_ids": ids.masked_fill(hidden, self._mask)}, ids.masked_fill(~hidden, IGNORED)
