"""Attention on whole maps: torch's own, and the one under messages between maps, which every other form equals."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Mix = Callable[[Tensor], Tensor]


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep_mask: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Returns `[B, T, H, D]` of torch's attention for q `[B, T, H, D]`, k, v `[B, S, G, D]` and masks as below."""
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))  # [B, H, T, D], [B, G, S, D]
    z = F.scaled_dot_product_attention(
        q, k, v, keep_mask, dropout, is_causal=is_causal, enable_gqa=grouped, scale=scale
    )
    return z.transpose(1, 2)  # [B, T, H, D]


def causal_mask(tokens: int, keys: int, device: torch.device) -> Tensor:
    """Returns the mask `[T, S]` of the last T of S tokens, each seeing those up to itself."""
    rows = torch.arange(keys - tokens, keys, device=device).unsqueeze(1)  # [T, 1]
    return torch.arange(keys, device=device) <= rows  # [T, S]


def mixed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mix_scores: Mix | None = None,
    mix_weights: Mix | None = None,
    keep_mask: Tensor | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    r"""Attention with messages between scores, between the weights they become, or both, on whole maps: `[B, T, H, D]`.

    .. math:: z_i(t) = \sum_s f_\text{weights}\big(\mathrm{softmax}_s f_\text{scores}(a(t, s))\big)_i\, v_i(s), \qquad
        a_i(t, s) = q_i(t) \cdot k_i(s) / \sqrt{D}

    The nodes of a graph are the heads, their features the scores or weights over keys. In decode (T = 1) this is the
    cheapest form, on long sequences it holds T x S x H numbers a map. Source: talking heads (arXiv 2003.02436) where
    edges are static, DCMHA (2405.08553) where they depend on the token; both mix scores and weights.

    Args:
        q: queries `[B, T, H, D]`.
        k, v: keys and values `[B, S, G, D]`, G dividing H.
        mix_scores, mix_weights: functions of nodes `[B, T, H, S]`, e.g. `partial(conv, context=x)`.
        keep_mask: bool, broadcastable to `[B, H, T, S]`, True = may attend; a row without any gives zeros. Or a float,
            added to the mixed scores, as torch's masks are.
        dropout: probability of dropping an attention weight.
        scale: of the scores, `None` for 1/sqrt(D).
    """
    # Query heads of one group follow one another: they read their keys and values as more queries of one head.
    batch, tokens, heads, _ = q.shape
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    grouped = (batch, k.shape[2], heads // k.shape[2] * tokens, q.shape[-1])
    queries = q.transpose(1, 2).reshape(grouped)  # [B, G, H/G*T, D]
    maps = (batch, heads, tokens, k.shape[1])
    scores = (queries @ k.permute(0, 2, 3, 1)).view(maps)  # [B, H, T, S]
    if mix_scores is not None:
        scores = mix_scores(scores.transpose(1, 2)).transpose(1, 2)  # [B, H, T, S]
    if keep_mask is not None and keep_mask.is_floating_point():
        scores, keep_mask = scores + keep_mask, keep_mask > float("-inf")
    if keep_mask is not None:
        scores = scores.masked_fill(~keep_mask, float("-inf"))
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    if keep_mask is not None:
        weights = weights.masked_fill(~keep_mask.any(dim=-1, keepdim=True), 0.0)
    if mix_weights is not None:
        weights = mix_weights(weights.transpose(1, 2)).transpose(1, 2)  # [B, H, T, S]
    # The graph may have read the maps of more heads than it gives back, those of other ranks.
    heads = weights.shape[1]
    grouped = (batch, v.shape[2], heads // v.shape[2] * tokens, k.shape[1])
    weights = F.dropout(weights, dropout).to(v.dtype).reshape(grouped)  # [B, G, H/G*T, S]
    return (weights @ v.transpose(1, 2)).view(batch, heads, tokens, v.shape[-1]).transpose(1, 2)  # [B, T, H, D]
