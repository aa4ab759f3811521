"""Attention of many tokens under a router: each routed head attends for the tokens that chose it alone."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gohgraph.attention.maps import plain_attention

# From so many keys, and up to so large a share of the queries of all heads, grouping was measured to pay on a CPU
# (`tools/benchmark.py` with moh-50 and moh-50-all; causal attention has a kernel that reads half of the keys).
FROM_KEYS = 512
LARGEST_SHARE = {True: 0.65, False: 0.85}
# Backward keeps the masks of causal groups: with more keys these take more memory than all the rest of attention.
MOST_KEPT_KEYS = 4096
# Queries that share a bound on the keys they read, where attention is causal.
CHUNK = 128


class TokenGroups(NamedTuple):
    """The tokens of every routed head.

    Args:
        order: `[B, C, h_r]`, the tokens that chose a head, in order, and then others up to C, those of the busiest.
        counts: `[B, h_r]`, how many chose it.
        num_shared: h_s, the first heads, which attend for all tokens.
    """

    order: Tensor
    counts: Tensor
    num_shared: int

    def share(self, tokens: int) -> float:
        """Queries that are computed, of those of all heads and tokens."""
        routed = self.counts.shape[1]
        return (self.num_shared + routed * self.order.shape[1] / max(1, tokens)) / (self.num_shared + routed)


def group_tokens(active: Tensor, num_shared: int) -> TokenGroups:
    """Sorts the tokens of `active [B, T, H]` by the routed heads they chose.

    Example:
        >>> active = torch.tensor([[[True, True, False], [True, False, True], [True, True, False]]])
        >>> group_tokens(active, num_shared=1).order.tolist()
        [[[0, 1], [2, 0]]]
    """
    chosen = active[..., num_shared:]  # [B, T, h_r]
    counts = chosen.sum(dim=1)  # [B, h_r]
    order = chosen.to(torch.uint8).argsort(dim=1, descending=True, stable=True)  # [B, T, h_r]
    most = int(counts.max()) if counts.numel() else 0
    return TokenGroups(order[:, : max(1, most)], counts, num_shared)


def may_pay(q: Tensor, keys: int, causal: bool) -> bool:
    """Whether grouping queries `q [B, T, H, D]` can pay, before it is known who chose which head."""
    keeps_masks = causal and q.requires_grad
    return q.device.type == "cpu" and keys >= FROM_KEYS and not (keeps_masks and keys > MOST_KEPT_KEYS)


def grouped_attention(
    q: Tensor, k: Tensor, v: Tensor, groups: TokenGroups, keep_mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Attention of active heads, `[B, T, H, D]`; zeros for the others, and where there are no keys.

    Args:
        q, k, v: `[B, T, H, D]` and twice `[B, S, G, D]`, G dividing H.
        groups: of the T tokens.
        keep_mask: bool, four dimensions that broadcast to `[B, H, T, S]`, True = may attend.
        causal: token t attends to keys up to S - T + t.
    """
    if not q.numel() or not k.shape[1]:
        # Without queries or keys there is nothing to group, and the gradients are zeros.
        return plain_attention(q, k, v, None, 0.0, is_causal=False)
    split = groups.num_shared
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2).transpose(1, 2) for x in (k, v))  # [B, H, S, D]
    tokens, keys = q.shape[1], k.shape[2]
    q = q.transpose(1, 2)  # [B, H, T, D]
    order = groups.order.transpose(1, 2)  # [B, h_r, C]
    index = order.unsqueeze(-1).expand(-1, -1, -1, q.shape[-1])  # [B, h_r, C, D]
    real = torch.arange(order.shape[-1], device=q.device) < groups.counts.unsqueeze(-1)  # [B, h_r, C]
    queries = q[:, split:].gather(2, index)  # [B, h_r, C, D]
    last = torch.where(real, order, 0) + keys - tokens  # [B, h_r, C], the last key a causal query may see
    parts = []
    for start in range(0, order.shape[-1], CHUNK if causal else order.shape[-1]):
        some = slice(start, start + CHUNK) if causal else slice(None)
        # At least one key: the first of more tokens than keys see none, and are masked.
        end = max(1, int(last[..., some].max()) + 1) if causal else keys
        mask = _rows(keep_mask, order[..., some], split, q.shape[1], tokens, end)
        if causal:
            seen = torch.arange(end, device=q.device) <= last[..., some].unsqueeze(-1)  # [B, h_r, c, end]
            mask = seen if mask is None else seen & mask
        parts.append(F.scaled_dot_product_attention(queries[:, :, some], k[:, split:, :end], v[:, split:, :end], mask))
    outputs = torch.cat(parts, dim=2) * real.unsqueeze(-1)  # [B, h_r, C, D]
    routed = torch.zeros_like(q[:, split:]).scatter(2, index, outputs)  # [B, h_r, T, D]
    shared = _shared(q[:, :split], k[:, :split], v[:, :split], keep_mask, causal)  # [B, h_s, T, D]
    return torch.cat((shared, routed), dim=1).transpose(1, 2)  # [B, T, H, D]


def _rows(
    keep_mask: Tensor | None, order: Tensor, split: int, heads: int, tokens: int, end: int
) -> Tensor | None:
    """The mask of queries in `order [B, h_r, c]` for the first `end` keys, broadcasting to `[B, h_r, c, end]`."""
    if keep_mask is None:
        return None
    keep_mask = keep_mask[..., :end]
    if keep_mask.shape[1] == keep_mask.shape[2] == 1:
        return keep_mask
    keep_mask = keep_mask.expand(order.shape[0], heads, tokens, end)[:, split:]  # [B, h_r, T, end]
    return keep_mask.gather(2, order.unsqueeze(-1).expand(-1, -1, -1, end))


def _shared(q: Tensor, k: Tensor, v: Tensor, keep_mask: Tensor | None, causal: bool) -> Tensor:
    tokens, keys = q.shape[2], k.shape[2]
    if keep_mask is not None and keep_mask.shape[1] > 1:
        keep_mask = keep_mask[:, : q.shape[1]]
    if causal and (keep_mask is not None or tokens != keys):
        seen = torch.ones(tokens, keys, dtype=torch.bool, device=q.device).tril(keys - tokens)  # [T, S]
        keep_mask, causal = seen if keep_mask is None else seen & keep_mask, False
    return F.scaled_dot_product_attention(q, k, v, keep_mask, is_causal=causal)
