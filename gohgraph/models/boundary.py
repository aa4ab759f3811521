"""What models check and derive at their boundary: token ids, positions, masks, and the loss of the next token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gohgraph.models.config import TransformerConfig

IGNORED_TARGET = -100


def positions_and_masks(
    tokens: Tensor, past: int, keep_mask: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns positions `[T]` or `[B, T]` of new tokens `[B, T]` after `past` ones, and the masks of attention.

    The token mask `[B, past + T]` becomes a mask over keys `[B, 1, 1, past + T]` and one of the new tokens `[B, T]`.
    """
    new = tokens.shape[1]
    if keep_mask is None:
        return torch.arange(past, past + new, device=tokens.device), None, None  # [T]
    if keep_mask.dtype != torch.bool or keep_mask.shape != (tokens.shape[0], past + new):
        raise ValueError(
            f"Expected a bool keep_mask of shape [{tokens.shape[0]}, {past + new}] "
            f"(got {keep_mask.dtype} {list(keep_mask.shape)}). Do mark every token, True = real."
        )
    # Counting real tokens gives a sequence the same positions whichever side it is padded on.
    positions = (keep_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, past:]  # [B, T]
    return positions, keep_mask[:, None, None, :], keep_mask[:, past:]  # [B, 1, 1, S], [B, T]


def check_tokens(tokens: Tensor, vocab_size: int) -> None:
    """Raises `ValueError` unless `tokens` are ids `[B, T]`."""
    if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"Expected token ids [B, T] of an integer dtype (got {tokens.dtype} {list(tokens.shape)}). "
            f"Do pass ids below {vocab_size}."
        )


def check_length(config: TransformerConfig, length: int) -> None:
    """Raises `ValueError` for a sequence longer than learned positions reach."""
    if config.positions == "learned" and length > config.max_length:
        raise ValueError(
            f"Expected at most {config.max_length} tokens with learned positions (got {length}). "
            "Do raise max_length, or use rotary positions."
        )


def check_ids(vocab_size: int, **ids: int | None) -> None:
    """Raises `ValueError` for a named token id outside the vocabulary."""
    for name, token in ids.items():
        if token is not None and not 0 <= token < vocab_size:
            raise ValueError(f"Expected {name} in 0..{vocab_size - 1} (got {token}). Do pass an id of the vocabulary.")


def next_token_loss(logits: Tensor, targets: Tensor | None) -> Tensor | None:
    """Returns the mean cross entropy of logits `[B, T, V]` in nats, `None` without targets `[B, T]`."""
    if targets is None:
        return None
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"Expected targets of shape {list(logits.shape[:-1])} (got {list(targets.shape)}). "
            "Do pass one next token for every token."
        )
    return F.cross_entropy(widened(logits).flatten(0, 1), targets.flatten(), ignore_index=IGNORED_TARGET)


def widened(logits: Tensor) -> Tensor:
    """Returns logits in float32 at least, so that their softmax does not lose digits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
