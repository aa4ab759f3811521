"""Tokens of a text: bytes of our own models, subwords of a tokenizer, and what is refused as one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gohgraph.common.packages import needs
from gohgraph.learning.regimes.language import byte_strings, decode


@dataclass(frozen=True)
class Tokens:
    """A model's tokens.

    Args:
        words: of bytes of a text, its ids int64 `[T]`, without special tokens.
        strings: of ids `[T]`, what each stands for.
        text: of ids `[T]`, the text they stand for, without special tokens.
        size: how many there are.
        before, after: special tokens around a text, such as [CLS] and [SEP].
        special: all special tokens.
        mask: the id that hides a token, `None` where there is none.
        unknown: the id of what has none, `None` where there is none.
    """

    words: Callable[[bytes], Tensor]
    strings: Callable[[Tensor], list[str]]
    text: Callable[[Tensor], str]
    size: int
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    special: frozenset[int] = frozenset()
    mask: int | None = None
    unknown: int | None = None

    def framed(self, words: Tensor) -> Tensor:
        """Returns ids between the special tokens that stand around a text."""
        return torch.cat([torch.tensor(self.before, dtype=torch.long), words, torch.tensor(self.after).long()])

    def known(self, text: bytes) -> tuple[Tensor, str]:
        """Returns the ids of a text, and a sentence about what the tokenizer does not know, "" where it knows all.

        Raises:
            ValueError: it knows nothing of the text.
        """
        ids = self.words(text)
        if self.unknown is None or not (missing := int((ids == self.unknown).sum())):
            return ids, ""
        name = self.strings(torch.tensor([self.unknown]))[0]
        if missing == len(ids):
            raise ValueError(
                f"Expected a text of words the tokenizer knows (got {len(ids)} tokens, all of them {name}). Do pass "
                "the model's own tokenizer by --tokenizer, or another text."
            )
        return ids, f"{missing} of {len(ids)} tokens are {name}: the tokenizer does not know these parts of the text"


class NoTokenizerError(ValueError):
    """A model without a tokenizer, in any of the places where it might be."""


BYTES = Tokens(lambda text: torch.tensor(list(text), dtype=torch.long), byte_strings, decode, 256)


def encoder_of(tokenizer: Any) -> Callable[[Tensor], Tensor]:
    """Returns what makes token ids int32 `[T]` of bytes uint8 `[N]`, by a tokenizer of transformers."""
    return lambda text: _words(tokenizer, bytes(text.tolist())).int()


def of_subwords(tokenizer: Any) -> Tokens:
    """Returns the tokens of a `tokenizers.Tokenizer`, as translation runs have it."""

    def words(text: bytes) -> Tensor:
        return torch.tensor(tokenizer.encode(text.decode("utf-8", "replace")).ids, dtype=torch.long)

    def strings(ids: Tensor) -> list[str]:
        return [tokenizer.decode([token]) for token in ids.tolist()]

    return Tokens(words, strings, lambda ids: tokenizer.decode(ids.tolist()).strip(), tokenizer.get_vocab_size())


def of_tokenizer(tokenizer: Any) -> Tokens:
    """Returns the tokens of a tokenizer of transformers."""
    # What is unknown is a word of the text, if one without a name.
    special = frozenset(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    ids = tokenizer("a")["input_ids"]
    inner = [place for place, token in enumerate(ids) if token not in special]
    first, last = (inner[0], inner[-1]) if inner else (len(ids), len(ids))

    def strings(ids: Tensor) -> list[str]:
        return [tokenizer.decode([token]) for token in ids.tolist()]

    return Tokens(
        partial(_words, tokenizer),
        strings,
        lambda ids: tokenizer.decode(ids.tolist(), skip_special_tokens=True),
        len(tokenizer),
        before=tuple(ids[:first]),
        after=tuple(ids[last + 1 :]),
        special=special,
        mask=tokenizer.mask_token_id,
        unknown=tokenizer.unk_token_id,
    )


def load_tokenizer(places: Iterable[str | os.PathLike[str]], vocab_size: int) -> Tokens:
    """Returns the tokens of the first of several folders or hub names that has a tokenizer.

    Raises:
        NoTokenizerError: none has.
        ValueError: it has more tokens than the model, so that it is another one's.
    """
    with needs("transformers", "hf"):
        from transformers import AutoTokenizer
    reasons = []
    for place in dict.fromkeys(str(place) for place in places if str(place)):
        try:
            tokenizer = AutoTokenizer.from_pretrained(place)
        # transformers raises many kinds of errors for a folder without a tokenizer, or with a damaged one.
        except Exception as error:
            reasons.append(f"{place}: {' '.join(str(error).split())[:120]}")
            continue
        # For a folder without its files, some kinds of tokenizers come back with special tokens alone.
        if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
            reasons.append(f"{place}: a tokenizer of special tokens alone")
            continue
        highest = max(tokenizer.get_vocab().values())
        if highest >= vocab_size:
            raise ValueError(
                f"Expected the model's own tokenizer, of up to {vocab_size:,} tokens (got token {highest:,} in "
                f"{place}). Do pass it by --tokenizer."
            )
        return of_tokenizer(tokenizer)
    raise NoTokenizerError(
        f"Expected the model's tokenizer (got none: {'; '.join(reasons)}). Do save it there by its save_pretrained, or "
        "name its folder by --tokenizer."
    )


def _words(tokenizer: Any, text: bytes) -> Tensor:
    ids = tokenizer(text.decode("utf-8", "replace"), add_special_tokens=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)
