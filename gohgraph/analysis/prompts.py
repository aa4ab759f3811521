"""Pairs of inputs that differ in one thing: what attribution compares."""

from __future__ import annotations

import csv
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gohgraph.analysis.metrics import log_probability, logit_difference
from gohgraph.common.checks import check_int

NAMES = ("Mary", "John", "Tom", "James", "Dan", "Martin", "Amy", "Laura", "Sarah", "Anna", "Paul", "Mark")
PLACES = ("store", "garden", "school", "station", "house", "office")
THINGS = ("ring", "book", "drink", "letter", "ball", "key")


class Task(NamedTuple):
    """A behaviour: arguments of `attribution_graph` and `faithfulness` by their names, `**task._asdict()`."""

    inputs: Any
    against: Any
    metric: Callable[[Any], Tensor]


class Pair(NamedTuple):
    """Two prompts and how they go on: after `clean` with `right` rather than with `wrong`."""

    clean: str
    other: str
    right: str
    wrong: str


def repeated_tokens(vocabulary: int, *, length: int, examples: int, first: int = 0, seed: int = 0) -> Task:
    """Returns the induction task: random tokens twice, against another first half; mean log probability of the second.

    Args:
        vocabulary: random tokens are `first` to this one, without it.
        length: of one half; inputs are twice as long.

    Example:
        >>> task = repeated_tokens(50, length=3, examples=2)
        >>> torch.equal(task.inputs[:, :3], task.inputs[:, 3:]), torch.equal(task.inputs[:, 3:], task.against[:, 3:])
        (True, True)
    """
    check_int("length", length, low=2)
    generator = torch.Generator().manual_seed(seed)
    half, other = torch.randint(first, vocabulary, (2, examples, length), generator=generator)
    clean = torch.cat([half, half], dim=1)  # [B, 2T]
    labels = clean.clone()
    # The first token of the second half cannot be known.
    labels[:, : length + 1] = -100
    return Task(clean, torch.cat([other, half], dim=1), log_probability(labels))


def ioi_pairs(examples: int, *, seed: int = 0) -> list[Pair]:
    """Returns prompts of indirect object identification (Wang et al. 2022, arXiv 2211.00593), against a third name.

    Example:
        >>> pair = ioi_pairs(1)[0]
        >>> pair.clean.count(pair.wrong.strip()), pair.clean.count(pair.right.strip()), len(pair.clean.split())
        (2, 1, 13)
    """
    draw, pairs = random.Random(seed), []
    for _ in range(examples):
        right, wrong, third = draw.sample(NAMES, 3)
        place, thing = draw.choice(PLACES), draw.choice(THINGS)
        start = f"When {right} and {wrong} went to the {place},"
        end = f"gave a {thing} to"
        pairs.append(Pair(f"{start} {wrong} {end}", f"{start} {third} {end}", f" {right}", f" {wrong}"))
    return pairs


def pairs_from_csv(path: str | os.PathLike[str]) -> list[Pair]:
    """Reads pairs from a table with the columns clean, other, right and wrong; `ValueError` where one is missing."""
    with open(Path(path), newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows, start=2):
        if missing := [name for name in Pair._fields if not row.get(name)]:
            raise ValueError(f"Expected columns {', '.join(Pair._fields)} in {path} (got no {missing}, line {number}).")
    if not rows:
        raise ValueError(f"Expected pairs in {path} (got none). Do add lines below its header.")
    return [Pair(*(row[name] for name in Pair._fields)) for row in rows]


def encoded(pairs: Sequence[Pair], tokenizer: Any) -> Task:
    """Returns the task of pairs under a tokenizer of transformers: the difference of two logits after each prompt.

    Prompts are padded on the right; `ValueError` for a pair whose sides are not equally many tokens, or whose
    continuation begins with the same token.
    """
    sides = [[tokenizer(getattr(pair, name))["input_ids"] for pair in pairs] for name in ("clean", "other")]
    ends = [[_first(tokenizer, getattr(pair, name)) for pair in pairs] for name in ("right", "wrong")]
    for pair, clean, other, right, wrong in zip(pairs, *sides, *ends, strict=True):
        if len(clean) != len(other) or right == wrong:
            raise ValueError(
                f"Expected sides of equally many tokens, and continuations that differ in the first (got {len(clean)} "
                f"and {len(other)}, {right} and {wrong}, for {pair.clean!r}). Do reword the pair."
            )
    lengths = torch.tensor([len(tokens) for tokens in sides[0]])
    padding = tokenizer.pad_token_id or 0
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()  # [B, T]
    ids = [torch.tensor([t + [padding] * (mask.shape[1] - len(t)) for t in side]) for side in sides]
    metric = logit_difference(*map(torch.tensor, ends), at=lengths - 1)
    clean, other = ({"input_ids": tokens, "attention_mask": mask} for tokens in ids)
    return Task(clean, other, metric)


def _first(tokenizer: Any, text: str) -> int:
    return tokenizer(text, add_special_tokens=False)["input_ids"][0]
