"""Runs of heads as one head of a longer sequence, for attention over the keys of all of them."""

from __future__ import annotations

from torch import Tensor


def interleaved(heads: Tensor, run: int) -> Tensor:
    """Returns `[B, run*T, H/run, D]` of `[B, T, H, D]`: token by token, and in a token head by head of a run.

    Example:
        >>> import torch
        >>> interleaved(torch.arange(8).view(1, 2, 4, 1), run=2)[0, :, :, 0].tolist()
        [[0, 2], [1, 3], [4, 6], [5, 7]]
    """
    return heads.unflatten(2, (-1, run)).transpose(2, 3).flatten(1, 2)  # [B, run*T, H/run, D]


def parted(z: Tensor, run: int) -> Tensor:
    """Returns `[B, T, H, D]` of `[B, run*T, H/run, D]`, the way back."""
    return z.unflatten(1, (-1, run)).transpose(2, 3).flatten(2, 3)  # [B, T, H, D]


def interleaved_mask(keep: Tensor | None, q: Tensor, k: Tensor, run: int) -> Tensor | None:
    """Returns a mask that broadcasts to `[B, H/run, run*T, run*S]`, of one to `[B, H, T, S]`.

    A head's own mask is that of all keys of its run.
    """
    if keep is None:
        return None
    tokens, keys = q.shape[1], k.shape[1]
    keep = keep.expand(-1, run if keep.shape[1] == 1 else -1, tokens, keys)  # [B or 1, run or H, T, S]
    rows = keep.unflatten(1, (-1, run)).transpose(2, 3).flatten(2, 3)  # [B or 1, H/run or 1, run*T, S]
    return rows.repeat_interleave(run, dim=-1)
