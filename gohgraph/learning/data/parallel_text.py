"""Parallel text for translation: sentence pairs, subwords, and batches of pairs of like length."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gohgraph.common.checks import check_int
from gohgraph.common.packages import needs
from gohgraph.learning.data.numerals import numeral_sentences
from gohgraph.models.boundary import IGNORED_TARGET

NUMERALS = "numerals"
PAD, BOS, EOS = 0, 1, 2
SPECIAL = ("<pad>", "<bos>", "<eos>")


@dataclass(frozen=True, eq=False)
class ParallelText:
    """Sentence pairs, split into what is trained on and what is only measured.

    Args:
        name: where they come from.
        train: (source, target) sentences.
        validation: (source, target) sentences.
    """

    name: str
    train: list[tuple[str, str]]
    validation: list[tuple[str, str]]


def load_parallel_text(
    data: str | os.PathLike[str] = NUMERALS, *, source: str = "en", target: str = "de"
) -> ParallelText:
    """Loads a parallel text.

    - `"numerals"`: synthetic, made on the spot: 20,500 different sentences about numbers in English and German words,
      "we have sold forty-two apples ..." and "wir haben zweiundvierzig äpfel ... verkauft". German puts units before
      tens, writes numbers as one word and the verb at the end.
    - a folder with `train.en`, `train.de`, `val.en` and `val.de`, one sentence a line, as Multi30k has them.

    Args:
        data: the name above, or a folder.
        source, target: the languages, suffixes of the files.

    Raises:
        ValueError: a file is missing, damaged or empty, the files of a pair have different lengths, or numerals in
            other languages.

    Example:
        >>> text = load_parallel_text()
        >>> len(text.train), len(text.validation), len(set(text.train) & set(text.validation))
        (20000, 500, 0)
    """
    if os.fspath(data) == NUMERALS:
        return _numerals(source, target)
    train, validation = (_read_pairs(Path(data), split, source, target) for split in ("train", "val"))
    return ParallelText(os.fspath(data), train, validation)


def _numerals(source: str, target: str) -> ParallelText:
    order = {("en", "de"): 1, ("de", "en"): -1}.get((source, target))
    if order is None:
        raise ValueError(f"Expected numerals in 'en' and 'de' (got {source!r} and {target!r}). Do pass a folder.")
    generator, distinct = random.Random(0), dict[tuple[str, str], None]()
    while len(distinct) < 20_500:
        first, second = numeral_sentences(generator)[::order]
        distinct[first, second] = None
    pairs = list(distinct)
    return ParallelText(NUMERALS, pairs[500:], pairs[:500])


def _read_pairs(folder: Path, split: str, source: str, target: str) -> list[tuple[str, str]]:
    files = [folder / f"{split}.{language}" for language in (source, target)]
    try:
        sides = [file.read_text(encoding="utf-8").splitlines() for file in files]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"Expected {NUMERALS!r}, or a folder with {files[0].name} and {files[1].name} in UTF-8 "
            f"(got {folder}: {reason}). Do check the path."
        ) from error
    if len(sides[0]) != len(sides[1]) or not sides[0]:
        raise ValueError(
            f"Expected as many lines in {files[0]} as in {files[1]}, at least one (got {len(sides[0])} and "
            f"{len(sides[1])}). Do restore the files."
        )
    return list(zip(*([line.strip() for line in side] for side in sides), strict=True))


class Subwords:
    """A vocabulary of subwords that both languages share: byte-pair encoding over bytes, by `tokenizers`.

    Args:
        tokenizer: a `tokenizers.Tokenizer` with the ids `PAD`, `BOS` and `EOS`.

    Example:
        >>> subwords = Subwords.train(["ein haus", "ein kleines haus"] * 2, vocab_size=270)
        >>> subwords.decode(subwords.encode(["ein kleines haus"])[0])
        'ein kleines haus'
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @classmethod
    def train(cls, sentences: Sequence[str], vocab_size: int) -> Subwords:
        """Learns at most `vocab_size` subwords, bytes and special tokens (259) among them."""
        with needs("the package tokenizers for subwords", "translation"):
            from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        smallest = len(SPECIAL) + 256
        if vocab_size < smallest:
            raise ValueError(f"Expected a vocab_size of at least {smallest} (got {vocab_size}). Do raise it.")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )  # fmt: skip
        tokenizer.train_from_iterator(sentences, trainer)
        return cls(tokenizer)

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    def encode(self, sentences: Sequence[str]) -> list[Tensor]:
        """Returns the ids of each sentence, int64 `[T]`, without special tokens."""
        return [torch.tensor(code.ids, dtype=torch.long) for code in self.tokenizer.encode_batch(list(sentences))]

    def decode(self, tokens: Tensor) -> str:
        """Returns the text of ids `[T]`; special tokens are left out."""
        return self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True).strip()

    def to_json(self) -> str:
        """Returns the whole vocabulary in the format of `tokenizers`, for `Tokenizer.from_str`."""
        return self.tokenizer.to_str(pretty=True)


@dataclass(frozen=True, eq=False)
class PairBatches:
    """Batches of sentence pairs of like length, every pair once an epoch; batch i is a pure function of (seed, i).

    Args:
        source: ids of each source sentence, `[S]`.
        target: ids of each target sentence, `[T]`.
        batch_size: pairs in a batch, B, at least 1.
        seed: names the order.
        longest: subwords of a sentence, what is longer is cut.

    Example:
        >>> sentences = [torch.full((length,), 9) for length in (2, 3, 5, 7)]
        >>> batches = PairBatches(sentences, sentences, batch_size=2)
        >>> len(batches), [tensor.shape[0] for tensor in batches(0)]
        (2, [2, 2, 2])
    """

    source: list[Tensor]
    target: list[Tensor]
    batch_size: int
    seed: int = 0
    longest: int = 100

    def __post_init__(self) -> None:
        check_int("batch_size", self.batch_size, low=1)

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch_size)

    def __call__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns source `[B, S]`, target `[B, T]` from `BOS` on, and the token after each `[B, T]`, -100 = padding."""
        epoch, place = divmod(index, len(self))
        return self.pairs(self._epoch(epoch)[place])

    def in_order(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields all pairs once, in the order given."""
        for rows in torch.arange(len(self.source)).split(self.batch_size):
            yield self.pairs(rows)

    def pairs(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the batch of these pairs `[B]`."""
        special = torch.tensor([BOS]), torch.tensor([EOS])
        sources = [torch.cat((self.source[row][: self.longest], special[1])) for row in rows]
        targets = [torch.cat((special[0], self.target[row][: self.longest], special[1])) for row in rows]
        after = pad_sequence([ids[1:] for ids in targets], batch_first=True, padding_value=IGNORED_TARGET)  # [B, T]
        return _padded(sources), _padded([ids[:-1] for ids in targets]), after

    @cached_property
    def _epoch(self) -> Callable[[int], list[Tensor]]:
        return lru_cache(maxsize=1)(self._order)

    @cached_property
    def _lengths(self) -> Tensor:
        return torch.tensor([len(a) + len(b) for a, b in zip(self.source, self.target, strict=True)]).float()

    def _order(self, epoch: int) -> list[Tensor]:
        """Rows of every batch: sorted by length, of which noise makes other neighbours every epoch, then shuffled."""
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed} {epoch}").getrandbits(32))
        noise = torch.rand(len(self._lengths), generator=generator)
        batches = (self._lengths * (1 + 0.1 * noise) + noise).argsort().split(self.batch_size)
        return [batches[place] for place in torch.randperm(len(batches), generator=generator)]


def _padded(sequences: list[Tensor]) -> Tensor:
    return pad_sequence(sequences, batch_first=True, padding_value=PAD)  # [B, T]
