"""Language models of any origin with head graphs, and how they read a text."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gohgraph.convert import load_converted
from gohgraph.convert.saving import BACKBONE, is_converted
from gohgraph.learning.checkpoints import load_language_model
from gohgraph.learning.regimes.language import byte_strings, next_token_output
from gohgraph.models.boundary import next_token_loss
from gohgraph.models.models import LanguageModel


class TextModel(NamedTuple):
    """A language model and its tokens.

    Attributes:
        model: in eval mode.
        encode: bytes of a text, uint8 `[N]`, to token ids `[T]`.
        strings: token ids `[T]` to what they stand for, one string for each.
        loss: of `(model, (inputs [B, T], targets [B, T]))`: the mean cross entropy, or an output with it.
        longest: most tokens of a window, `None` for no limit.
    """

    model: nn.Module
    encode: Callable[[Tensor], Tensor]
    strings: Callable[[Tensor], list[str]]
    loss: Callable[[nn.Module, Any], Any]
    longest: int | None


def load_text_model(folder: str | os.PathLike[str]) -> TextModel:
    """Loads a language model with head graphs: one of gohgraph's own, or a converted one of transformers.

    Args:
        folder: as for `load_language_model`, or as for `goh.load_converted`; a converted model's tokenizer is looked
            for beside it, then where its backbone came from.
    """
    if not is_converted(folder):
        return of_bytes(load_language_model(folder))
    model = load_converted(folder).eval()
    return _of_tokenizer(model, _tokenizer(Path(folder), model))


def of_bytes(model: LanguageModel) -> TextModel:
    """Returns one of gohgraph's own models, which reads bytes, of a vocabulary that holds them.

    Example:
        >>> from gohgraph.models.config import TransformerConfig
        >>> source = of_bytes(LanguageModel(TransformerConfig(256, d_model=8, num_heads=2, num_layers=1, d_ff=8)))
        >>> source.strings(source.encode(torch.tensor([104, 105], dtype=torch.uint8)))
        ['h', 'i']
    """
    config = model.config
    if config.vocab_size < 256:
        raise ValueError(
            f"Expected a byte-level model (got a vocabulary of {config.vocab_size}). Do pass one of at least 256."
        )
    longest = config.max_length if config.positions == "learned" else None
    return TextModel(model, lambda text: text, byte_strings, next_token_output, longest)


def encoder_of(tokenizer: Any) -> Callable[[Tensor], Tensor]:
    """Returns what makes token ids int32 `[T]` of bytes uint8 `[N]`, by a tokenizer of transformers."""

    def encode(text: Tensor) -> Tensor:
        words = bytes(text.tolist()).decode("utf-8", "replace")
        return torch.tensor(tokenizer(words, add_special_tokens=False)["input_ids"], dtype=torch.int32)

    return encode


def _of_tokenizer(model: nn.Module, tokenizer: Any) -> TextModel:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        return next_token_loss(model(input_ids=inputs, use_cache=False).logits, targets)

    def strings(tokens: Tensor) -> list[str]:
        return [tokenizer.decode([token]) for token in tokens.tolist()]

    longest = getattr(model.config, "max_position_embeddings", None)
    return TextModel(model, encoder_of(tokenizer), strings, loss, longest)


def _tokenizer(folder: Path, model: nn.Module) -> Any:
    from transformers import AutoTokenizer

    places = [str(folder), str(folder / BACKBONE), getattr(model.config, "_name_or_path", "")]
    reasons = []
    for place in filter(None, places):
        try:
            return AutoTokenizer.from_pretrained(place)
        # transformers raises many kinds of errors for a folder without a tokenizer, or with a damaged one.
        except Exception as error:
            reasons.append(f"{place}: {' '.join(str(error).split())[:120]}")
    raise ValueError(
        f"Expected the model's tokenizer in {folder / BACKBONE} (got none: {'; '.join(reasons)}). Do save it there by "
        "its save_pretrained."
    )
