"""The forms of attention: plain, and over heads whose maps are mixed by a graph, wide or eager."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gohgraph.graphs.conv import HeadGraphConv

Mix = Callable[[Tensor], Tensor]

# Wide heads cost about in-degree times the plain attention core and hold no map of scores: on a CPU less than mixing
# whole maps from length 1024 on, as much at 512. On denser graphs their widened keys outgrow the maps.
WIDEST_IN_DEGREE = 4


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, keep_mask: Tensor | None, dropout: float, is_causal: bool
) -> Tensor:
    """Returns `[B, T, H, D]` of torch's attention for q `[B, T, H, D]`, k, v `[B, S, G, D]` and masks as below."""
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))  # [B, H, T, D], [B, G, S, D]
    z = F.scaled_dot_product_attention(q, k, v, keep_mask, dropout, is_causal=is_causal, enable_gqa=grouped)
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
) -> Tensor:
    r"""Attention with messages between scores, between the weights they become, or both, on materialised maps.

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

    Returns:
        Head outputs `[B, T, H, D]`.
    """
    # Query heads of one group follow one another: they read their keys and values as more queries of one head.
    batch, tokens, heads, _ = q.shape
    grouped = (batch, k.shape[2], -1, q.shape[-1])
    queries = (q * q.shape[-1] ** -0.5).transpose(1, 2).reshape(grouped)  # [B, G, H/G*T, D]
    maps = (batch, heads, tokens, k.shape[1])
    scores = (queries @ k.permute(0, 2, 3, 1)).view(maps)  # [B, H, T, S]
    if mix_scores is not None:
        scores = mix_scores(scores.transpose(1, 2)).transpose(1, 2)  # [B, H, T, S]
    if keep_mask is not None and keep_mask.is_floating_point():
        scores, keep_mask = scores + keep_mask, keep_mask > float("-inf")
    if keep_mask is not None:
        scores = scores.masked_fill(~keep_mask, float("-inf"))
    weights = scores.softmax(dim=-1)
    if keep_mask is not None:
        weights = weights.masked_fill(~keep_mask.any(dim=-1, keepdim=True), 0.0)
    if mix_weights is not None:
        weights = mix_weights(weights.transpose(1, 2)).transpose(1, 2)  # [B, H, T, S]
    # The graph may have read the maps of more heads than it gives back, those of other ranks.
    weights = F.dropout(weights, dropout).to(v.dtype).reshape(batch, v.shape[2], -1, k.shape[1])  # [B, G, H/G*T, S]
    return (weights @ v.transpose(1, 2)).view(batch, -1, tokens, v.shape[-1]).transpose(1, 2)  # [B, T, H, D]


class WideHeads(nn.Module):
    r"""Attention with messages between scores on a sparse graph: ordinary attention with wider heads.

    For receiver i with senders j in N(i), itself included, and weights w = identity + alpha,

    .. math::
        Q'_i(t) = \mathrm{concat}_{j \in N(i)}\, w_{ji}(t) q_j(t), \qquad
        K'_i(s) = \mathrm{concat}_{j \in N(i)}\, k_j(s)

    and softmax(Q' K'^T / sqrt(D)) V equals softmax(sum_j w_ji a_j) V exactly, with no T x S map in memory. The values
    are padded to the width of Q', since backends are slow on unequal widths. Heads of in-degree below the widest get
    slots of weight zero.

    Args:
        conv: one-round graph over scores; only its edges are used, its weights are handed to `forward`.

    Raises:
        ValueError: a graph of several rounds, or with `norm` or `cross_layer`.

    Example:
        >>> from gohgraph.graphs.graph import head_graph
        >>> conv = HeadGraphConv(head_graph(5, "ring"), head_dim=4, context_dim=20)
        >>> q, x = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 20)
        >>> z = WideHeads(conv)(q, q, q, conv.edge_weight(x), is_causal=True)
        >>> bool(torch.equal(z[:, 0], q[:, 0]))
        True
    """

    def __init__(self, conv: HeadGraphConv) -> None:
        super().__init__()
        if conv.rounds != 1 or conv.cross_layer or not conv.is_linear:
            raise ValueError("Expected a linear score graph of one round (got another). Do use mixed_attention.")
        senders, slots = _senders_and_slots(conv)
        self.register_buffer("senders", senders, persistent=False)
        self.register_buffer("slots", slots, persistent=False)
        self.register_buffer("identity", (torch.arange(senders.shape[1]) == 0).float(), persistent=False)

    @property
    def in_degree(self) -> int:
        """k, the widest in-degree, self included."""
        return self.senders.shape[1]

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        alpha: Tensor,
        keep_mask: Tensor | None = None,
        is_causal: bool = False,
        dropout: float = 0.0,
        beta: Tensor | None = None,
    ) -> Tensor:
        """Returns head outputs `[B, T, H, D]` for q `[B, T, H, D]`, k, v `[B, S, G, D]`, alpha `[B, T, E]` or `[E]`.

        With weights of the keys' side too, beta `[B, S, E]`, K'_i(s) concatenates (1 + beta_ji(s)) k_j(s).
        """
        head_dim = q.shape[-1]
        wide_q, wide_k, wide_v = (x.transpose(1, 2) for x in self.widen(q, k, v, alpha, beta))  # [B, H, T, k*D]
        z = F.scaled_dot_product_attention(
            wide_q, wide_k, wide_v, keep_mask, dropout, is_causal=is_causal, scale=head_dim**-0.5
        )
        return z[..., :head_dim].transpose(1, 2)  # [B, T, H, D]

    def widen(
        self, q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns Q', K' and the padded V, `[B, T or S, H, k*D]` each, for any attention of scale 1/sqrt(D)."""
        head_dim, groups = q.shape[-1], q.shape[2] // k.shape[2]
        mix = self._of_slots(alpha).to(q.dtype) + self.identity.to(q.dtype)  # [B, T, H, k]
        senders, shape = self.senders.flatten(), self.senders.shape  # [H*k]
        # index_select and not indexing: its backward adds whole heads, not single elements.
        wide_q = q.index_select(2, senders).unflatten(2, shape)  # [B, T, H, k, D]
        wide_q = (wide_q * mix.unsqueeze(-1)).flatten(-2)  # [B, T, H, k*D]
        wide_k = k.index_select(2, senders // groups).unflatten(2, shape)  # [B, S, H, k, D]
        if beta is not None:
            wide_k = wide_k * (1 + self._of_slots(beta)).unsqueeze(-1).to(k.dtype)
        wide_k = wide_k.flatten(-2)  # [B, S, H, k*D]
        v = v.repeat_interleave(shape[0] // v.shape[2], dim=2)  # [B, S, H, D]
        wide_v = F.pad(v, (0, wide_k.shape[-1] - head_dim))  # [B, S, H, k*D]
        return wide_q, wide_k, wide_v

    def _of_slots(self, weights: Tensor) -> Tensor:
        slots = F.pad(weights, (0, 1)).index_select(-1, self.slots.flatten())  # [*, H*k]
        return slots.unflatten(-1, self.slots.shape)  # [*, H, k]


def wide_heads_for(score_graph: nn.Module | None) -> WideHeads | None:
    """Returns the wide form of a score graph sparse enough for it, else `None`."""
    if not isinstance(score_graph, HeadGraphConv) or score_graph.backend != "dense" or score_graph.rounds != 1:
        return None
    wide = WideHeads(score_graph)
    return wide if wide.in_degree <= WIDEST_IN_DEGREE else None


def _senders_and_slots(conv: HeadGraphConv) -> tuple[Tensor, Tensor]:
    edges = {(i, j): e for e, (j, i) in enumerate(conv.local_edges.t().tolist())}
    lists = [[i] + [j for (r, j) in edges if r == i and j != i] for i in range(conv.num_heads)]
    width = max(map(len, lists))
    # A slot beyond a head's in-degree repeats the head itself under the weight of no edge, which is zero.
    senders = torch.tensor([row + [row[0]] * (width - len(row)) for row in lists])  # [H, k]
    none = conv.edges.num_edges
    slots = [
        [edges.get((i, j), none) for j in row] + [none] * (width - len(row)) for i, row in enumerate(lists)
    ]
    return senders, torch.tensor(slots)  # [H, k] each
