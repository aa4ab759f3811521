"""Attention over heads whose scores were mixed by a graph, in the form that is fastest and exact."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gohgraph.conv import HeadGraphConv

# Wide heads cost about in-degree times the plain attention core and hold no map of scores: on a CPU less than mixing
# whole maps from length 1024 on, as much at 512. On denser graphs their widened keys outgrow the maps.
WIDEST_IN_DEGREE = 4


def mixed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score_graph: nn.Module,
    context: Tensor,
    keep_mask: Tensor | None = None,
    dropout: float = 0.0,
    **active: Tensor,
) -> Tensor:
    r"""Attention with messages between scores, on materialised scores.

    .. math:: z_i(t) = \sum_s \mathrm{softmax}_s\big(\mathrm{graph}(a(t, s))_i\big)\, v_i(s), \qquad
        a_i(t, s) = q_i(t) \cdot k_i(s) / \sqrt{D}

    The nodes of `score_graph` are the heads, their features the scores over keys: any module that maps nodes
    `[B, T, H, S]` and a context to nodes fits. In decode (T = 1) this is the cheapest form, on long sequences it holds
    T x S x H scores. Source: talking heads (arXiv 2003.02436) where the weights are static, DCMHA (2405.08553) where
    they depend on the token; here edges are limited to the graph and scores are mixed before the softmax only.

    Args:
        q: queries `[B, T, H, D]`.
        k, v: keys and values `[B, S, G, D]`, G dividing H.
        score_graph: e.g. a `HeadGraphConv`.
        context: `[B, T, M]`.
        keep_mask: bool, broadcastable to `[B, H, T, S]`, True = may attend; a row without any gives zeros.
        dropout: probability of dropping an attention weight.
        **active: `active=` bool `[B, T, H]` for a graph under a router; heads that are off neither send nor receive.

    Returns:
        Head outputs `[B, T, H, D]`.
    """
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)  # [B, S, H, D]
    scores = torch.einsum("bthd,bshd->bths", q * q.shape[-1] ** -0.5, k)  # [B, T, H, S]
    scores = score_graph(scores, context, **active).transpose(1, 2)  # [B, H, T, S]
    if keep_mask is not None:
        scores = scores.masked_fill(~keep_mask, float("-inf"))
    weights = scores.softmax(dim=-1)
    if keep_mask is not None:
        weights = weights.masked_fill(~keep_mask.any(dim=-1, keepdim=True), 0.0)
    weights = F.dropout(weights, dropout).to(v.dtype)
    return torch.einsum("bhts,bshd->bthd", weights, v)  # [B, T, H, D]


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
        >>> from gohgraph.graph import head_graph
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
    ) -> Tensor:
        """Returns head outputs `[B, T, H, D]` for q `[B, T, H, D]`, k, v `[B, S, G, D]`, alpha `[B, T, E]` or `[E]`."""
        head_dim, groups = q.shape[-1], q.shape[2] // k.shape[2]
        mix = F.pad(alpha, (0, 1)).index_select(-1, self.slots.flatten())  # [B, T, H*k]
        mix = mix.unflatten(-1, self.slots.shape).to(q.dtype) + self.identity.to(q.dtype)  # [B, T, H, k]
        senders, shape = self.senders.flatten(), self.senders.shape  # [H*k]
        # index_select and not indexing: its backward adds whole heads, not single elements.
        wide_q = q.index_select(2, senders).unflatten(2, shape)  # [B, T, H, k, D]
        wide_q = (wide_q * mix.unsqueeze(-1)).flatten(-2)  # [B, T, H, k*D]
        wide_k = k.index_select(2, senders // groups).unflatten(2, shape).flatten(-2)  # [B, S, H, k*D]
        wide_v = F.pad(v.repeat_interleave(groups, dim=2), (0, wide_k.shape[-1] - head_dim))  # [B, S, H, k*D]
        wide_q, wide_k, wide_v = (x.transpose(1, 2) for x in (wide_q, wide_k, wide_v))  # [B, H, T, k*D]
        z = F.scaled_dot_product_attention(
            wide_q, wide_k, wide_v, keep_mask, dropout, is_causal=is_causal, scale=head_dim**-0.5
        )
        return z[..., :head_dim].transpose(1, 2)  # [B, T, H, D]


def wide_heads_for(score_graph: nn.Module | None) -> WideHeads | None:
    """Returns the wide form of a score graph sparse enough for it, else `None`."""
    if not isinstance(score_graph, HeadGraphConv) or score_graph.backend != "dense" or score_graph.rounds != 1:
        return None
    wide = WideHeads(score_graph)
    return wide if wide.in_degree <= WIDEST_IN_DEGREE else None


def _senders_and_slots(conv: HeadGraphConv) -> tuple[Tensor, Tensor]:
    edges = {(i, j): e for e, (j, i) in enumerate(conv.edge_index.t().tolist())}
    lists = [[i] + [j for (r, j) in edges if r == i and j != i] for i in range(conv.num_heads)]
    width = max(map(len, lists))
    # A slot beyond a head's in-degree repeats the head itself under the weight of no edge, which is zero.
    senders = torch.tensor([row + [row[0]] * (width - len(row)) for row in lists])  # [H, k]
    none = conv.edges.num_edges
    slots = [
        [edges.get((i, j), none) for j in row] + [none] * (width - len(row)) for i, row in enumerate(lists)
    ]
    return senders, torch.tensor(slots)  # [H, k] each
