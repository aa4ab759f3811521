"""What transformers calls the inputs of models, translated: masks of 0 and 1, and labels that are not shifted yet."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from gohgraph.models.boundary import IGNORED_TARGET
from gohgraph.models.model_output import ModelOutput


def required(name: str, value: Tensor | None) -> Tensor:
    """Returns an input that may come by either of two names; without it raises `TypeError`.

    Example:
        >>> required("tokens", None)
        Traceback (most recent call last):
        TypeError: Expected tokens (got none). Do pass them, or by the name of transformers.
    """
    if value is None:
        raise TypeError(f"Expected {name} (got none). Do pass them, or by the name of transformers.")
    return value


def next_tokens(labels: Tensor) -> Tensor:
    """Returns the targets of labels `[B, T]` that are the tokens themselves: each one's next, and none of the last.

    Example:
        >>> import torch
        >>> next_tokens(torch.tensor([[4, 5, 6]])).tolist()
        [[5, 6, -100]]
    """
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED_TARGET)  # [B, T]


def real_tokens(attention_mask: Tensor | None) -> Tensor | None:
    """Returns the bool mask of real tokens `[B, T]` of one of numbers; `None` where all are."""
    if attention_mask is None or attention_mask.bool().all():
        return None
    return attention_mask.bool()


def shifted_right(labels: Tensor | None, config: Any) -> Tensor:
    """Returns decoder inputs `[B, T]` of labels: the start token, then all but the last label.

    Raises:
        ValueError: no labels, or a configuration without `decoder_start_token_id`.
    """
    start, pad = getattr(config, "decoder_start_token_id", None), getattr(config, "pad_token_id", None)
    if labels is None or start is None:
        missing = "labels" if labels is None else "decoder_start_token_id in the configuration"
        raise ValueError(f"Expected decoder_input_ids (got none, and no {missing}). Do pass either.")
    inputs = F.pad(labels[:, :-1], (1, 0), value=start)  # [B, T]
    return inputs.masked_fill(inputs == IGNORED_TARGET, 0 if pad is None else pad)


def check_unused(others: dict[str, Any]) -> None:
    """Raises `ValueError` for inputs of other models that ask for something; `return_dict` is granted."""
    asked = {name for name, value in others.items() if value is not None and value is not False} - {"return_dict"}
    if asked:
        raise ValueError(f"Expected inputs that gohgraph's own models have (got {sorted(asked)}). Do leave them out.")


def by_name(output: ModelOutput) -> Any:
    """Returns an output as the dictionary that transformers' Trainer takes from models of others."""
    entries = {"loss": output.loss, "logits": output.logits}
    return {name: value for name, value in entries.items() if value is not None}
