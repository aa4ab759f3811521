"""The masks of `torch.nn.MultiheadAttention`, whose True leaves out, as ours, whose True may attend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gohgraph.attention.call import NO_MASK, Mask


def joined(
    padding: Tensor | None, attn_mask: Tensor | None, num_heads: int, dtype: torch.dtype, keys: int
) -> Mask:
    """Returns both masks as one, over `[B, H, T, S]`: True = may attend, or numbers where either has such.

    Args:
        padding, attn_mask: torch's `key_padding_mask` and `attn_mask`: True, or a number, for what is left out.
        num_heads: H.
        dtype: of the scores.
        keys: S, learned and zero keys included, which are open to all.
    """
    masks = []
    if attn_mask is not None:
        shape = (1, 1) if attn_mask.dim() == 2 else (len(attn_mask) // num_heads, num_heads)
        masks.append(attn_mask.reshape(*shape, *attn_mask.shape[-2:]))  # [1 or B, 1 or H, T, S]
    if padding is not None:
        masks.append(padding.reshape(-1 if padding.numel() else 0, 1, 1, padding.shape[-1]))  # [B, 1, 1, S]
    if not masks:
        return NO_MASK
    if all(mask.dtype == torch.bool for mask in masks):
        keeps = [_open(~mask, keys, True) for mask in masks]
        return Mask(keeps[0] if len(keeps) == 1 else keeps[0] & keeps[1])
    numbers = [_open(_added(mask, dtype), keys, 0.0) for mask in masks]
    return Mask(numbers[0] if len(numbers) == 1 else numbers[0] + numbers[1])


def causal(q: Tensor, k: Tensor) -> Mask:
    """Returns the hint as torch takes it: a query sees as many keys as there are queries up to it, the first ones."""
    tokens, keys = q.shape[1], k.shape[1]
    if tokens == keys:
        return Mask(causal=True)
    return Mask(torch.ones(tokens, keys, dtype=torch.bool, device=q.device).tril())  # [T, S]


def is_mask(mask: Tensor) -> bool:
    """Whether a tensor has a type of torch's masks."""
    return mask.dtype == torch.bool or mask.is_floating_point()


def attended(padding: Tensor) -> Tensor:
    """Returns True where a key may be attended to: torch's encoders turn masks of padding into 0 and -inf."""
    if padding.is_floating_point():
        return padding > torch.finfo(padding.dtype).min
    return ~padding


def _open(mask: Tensor, keys: int, value: float | bool) -> Tensor:
    """The mask continued to learned and zero keys, which are open to all."""
    return F.pad(mask, (0, keys - mask.shape[-1]), value=value) if mask.shape[-1] < keys else mask


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.is_floating_point():
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
