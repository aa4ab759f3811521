"""Networks of models without head graphs, for `visualize_heads.py`: by weights, or by attribution on a text."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import gohgraph as goh
from gohgraph.analysis.metrics import log_probability, logit_difference
from gohgraph.learning.regimes.text_models import is_converted, load_text_model

# What types of models of our own begin with.
OWN = "gohgraph"
SOURCES = ("graph", "weights", "attribution")
WORDS = ("mean", "zero")
# Of a masked model's tokens, every so many-th is masked.
MASKED_EVERY = 7


class Stock(NamedTuple):
    """A model that reads text, and its tokens: `encode` of a text `[T]`, special ones included, `words` without."""

    model: nn.Module
    encode: Callable[[str], Tensor]
    words: Callable[[str], Tensor]
    mask: int | None = None


def is_stock(folder: str | None) -> bool:
    """Whether a folder holds a model of transformers that was not converted."""
    path = Path(folder or ".")
    if folder is None or not (path / "config.json").is_file() or is_converted(path):
        return False
    try:
        kind = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type", OWN)
    # What is damaged is for the loader to name.
    except (ValueError, AttributeError):
        return False
    return not str(kind).startswith(OWN)


def chosen_source(flags: argparse.Namespace) -> str:
    """Returns where the network comes from, and checks the flags that go with it."""
    stock = is_stock(flags.checkpoint)
    source = flags.source or ("attribution" if stock else "graph")
    if source == "graph" and stock:
        raise ValueError(f"Expected --from weights or attribution for {flags.checkpoint} (got graph: it has none).")
    for name, sources in (("against", ("attribution",)), ("target", ("attribution",)), ("tokenizer", SOURCES[1:])):
        if getattr(flags, name) is not None and source not in sources:
            raise ValueError(f"Expected --{name} with --from {' or '.join(sources)} (got {source}). Do drop it.")
    if source == "weights" and (flags.text is not None or flags.text_file is not None):
        raise ValueError("Expected no text for --from weights (got one). Do drop it, or use --from attribution.")
    if source != "graph" and flags.view not in (None, "network"):
        raise ValueError(f"Expected --view network for --from {source} (got {flags.view}). Do change it.")
    return source


def stock_network(flags: argparse.Namespace, source: str, text: str) -> tuple[goh.HeadNetwork, str]:
    """Returns the network of a model and the line that says what it shows."""
    name = Path(flags.checkpoint).resolve().name
    if source == "weights":
        stock = is_stock(flags.checkpoint)
        model = flags.checkpoint if stock else load_text_model(flags.checkpoint).model
        return goh.composition_graph(model), f"{name}: composition of weights, in [0, 1]"
    stock = _load(flags)
    tokens = stock.encode(text)[: flags.length if flags.target is None else None]
    if len(tokens) < 2:
        raise ValueError(f"Expected a text of at least two tokens (got {len(tokens)}). Do pass a longer one.")
    tokens, metric, said = _task(stock, tokens, flags.target)
    against = _against(stock, flags.against or "zero", tokens)
    network = goh.attribution_graph(stock.model, tokens, against=against, metric=metric)
    other = against if isinstance(against, str) else "another text"
    return network, f"{name}: attribution to {said}, {tokens.shape[1]} tokens against {other}"


def _task(stock: Stock, tokens: Tensor, target: str | None) -> tuple[Tensor, Callable[[Any], Tensor], str]:
    """The inputs `[1, T]`, the metric, and what it is."""
    batch = tokens[None]
    if target is not None:
        words = target.split("|")
        ends = [int(stock.words(word)[0]) for word in words if word]
        if len(ends) != len(words) or len(ends) > 2 or len(set(ends)) < len(ends):
            raise ValueError(f"Expected --target WORD or 'RIGHT|WRONG' (got {target!r}). Do name one or two words.")
        if len(ends) == 2:
            metric = logit_difference(*(torch.tensor([end]) for end in ends))
            return batch, metric, f"logit({words[0]!r}) - logit({words[1]!r})"
        return batch, lambda output: output.logits[:, -1].log_softmax(-1)[:, ends[0]], f"log p({target!r}) at the end"
    labels = torch.full_like(batch, -100)
    if stock.mask is None:
        labels[:, 1:] = batch[:, 1:]
        return batch, log_probability(labels), "log p of every next token"
    hidden = torch.arange(len(tokens)) % MASKED_EVERY == MASKED_EVERY // 2
    labels[:, hidden] = batch[:, hidden]
    masked = batch.masked_fill(hidden, stock.mask)
    return masked, log_probability(labels, shift=False), f"log p of every {MASKED_EVERY}th token, masked"


def _against(stock: Stock, words: str, tokens: Tensor) -> Tensor | str:
    if words in WORDS:
        return words
    text = Path(words).read_text(encoding="utf-8") if Path(words).is_file() else words
    other = stock.encode(text)[None]
    if other.shape[1] < tokens.shape[1]:
        raise ValueError(
            f"Expected --against of {tokens.shape[1]} tokens, as the text (got {other.shape[1]}). Do make both as "
            f"long, or choose {' or '.join(WORDS)}."
        )
    return other[:, : tokens.shape[1]]


def _load(flags: argparse.Namespace) -> Stock:
    if not is_stock(flags.checkpoint):
        source = load_text_model(flags.checkpoint)
        encode = lambda text: source.encode(_bytes(text)).long()  # noqa: E731
        return Stock(source.model, encode, encode)
    import transformers

    config = transformers.AutoConfig.from_pretrained(flags.checkpoint)
    kind = getattr(transformers, (config.architectures or ["AutoModelForCausalLM"])[0])
    tokenizer = transformers.AutoTokenizer.from_pretrained(flags.tokenizer or flags.checkpoint)
    model = kind.from_pretrained(flags.checkpoint).eval()
    is_masked = "MaskedLM" in type(model).__name__
    if not is_masked and "CausalLM" not in type(model).__name__ and "LMHead" not in type(model).__name__:
        raise ValueError(
            f"Expected a causal or masked language model for --from attribution (got {type(model).__name__}). Do use "
            "--from weights."
        )

    def encode(text: str, special: bool = True) -> Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=special)["input_ids"], dtype=torch.long)

    return Stock(model, encode, partial(encode, special=False), tokenizer.mask_token_id if is_masked else None)


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else torch.zeros(0, dtype=torch.uint8)
