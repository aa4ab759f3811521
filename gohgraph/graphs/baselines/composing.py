"""Dynamically composable heads: attention maps composed by the query's token and by the key's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gohgraph.common.checks import check_bool, check_int, needed
from gohgraph.graphs.protocol import MAPS, SiteGraph, Traits


class Composition(SiteGraph):
    r"""The Compose function of DCMHA on scores or on weights, in its low-rank form.

    .. math::
        A'(t, s) &= A(t, s) + \big(M^q(t) + M^k(s)\big) A(t, s), \qquad
        M = w_2 w_1^T + \mathrm{diag}(g) \\
        [w_1; w_2] &= W_2\, \mathrm{gelu}(W_1 x), \qquad w_1 \leftarrow w_1 / \mathrm{rms}_\text{heads}(w_1), \qquad
        g = \tanh(W_g x)

    A holds all heads of a pair of tokens, w_1 and w_2 are `[H, R]`; M^q is made of the query's token and M^k of the
    key's, with weights of their own. Both read the original A. Masked weights stay zero, rows are not renormalised.

    Source: DCMHA (Xiao et al. 2024, arXiv 2405.08553), as its released code computes it, whose released models leave
    out the static projection; the gates start as in its PyTorch code (in its JAX code ten times smaller). Nearly
    neutral at the start.

    Args:
        num_heads, head_dim, context_dim: H, D (not used) and M.
        rank: R >= 1.
        gates: has g; without it, and after the softmax of the last layer only, it is modded-nanogpt's reduced form
            (record of May 2026).

    Shape:
        maps `[B, T, H, S]`, context `[B, T, M]`, keys `[B, S, U]` -> `[B, T, H, S]`.

    Example:
        >>> compose = Composition(num_heads=5, head_dim=4, context_dim=20)
        >>> maps, x, source = torch.randn(2, 3, 5, 7), torch.randn(2, 3, 20), torch.randn(2, 7, 20)
        >>> compose(maps, x, keys=compose.key_state(source)).shape
        torch.Size([2, 3, 5, 7])
    """

    def __init__(self, num_heads: int, head_dim: int, context_dim: int, *, rank: int = 2, gates: bool = True) -> None:
        super().__init__()
        check_int("rank", rank, low=1)
        check_bool("gates", gates)
        self.num_heads, self.rank = num_heads, rank
        self.traits = Traits(num_heads, MAPS, keyed=True)
        hidden = 2 * rank * num_heads
        # The first of two is made of the query's token, the second of the key's.
        self.inner = nn.Parameter(torch.empty(2, hidden, context_dim))
        self.outer = nn.Parameter(torch.empty(2, hidden, hidden))
        self.gate = nn.Parameter(torch.empty(2, num_heads, context_dim)) if gates else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights as the released code does."""
        hidden, width = self.inner.shape[1:]
        nn.init.normal_(self.inner, std=(2 / (width + hidden)) ** 0.5)
        nn.init.normal_(self.outer, std=0.02 / (hidden**0.5 * (self.num_heads + self.rank)))
        if self.gate is not None:
            nn.init.normal_(self.gate, std=0.05 * (2 / (width + self.num_heads)) ** 0.5)

    def key_state(self, source: Tensor) -> Tensor:
        """Returns M^k of the keys' tokens, `[B, S, M] -> [B, S, H*H]`."""
        return self._mixing(source, 1).flatten(-2)  # [B, S, H*H]

    def forward(
        self,
        nodes: Tensor,
        context: Tensor | None = None,
        earlier: Any = (),
        active: Tensor | None = None,
        *,
        keys: Tensor | None = None,
        **call: Any,
    ) -> Tensor:
        """Composes maps `[B, T, H, S]`; heads that are off send nothing."""
        sent = nodes if active is None else nodes * active.unsqueeze(-1)  # [B, T, H, S]
        keys, context = needed("state of the keys", keys), needed("context", context)
        by_key = keys.unflatten(-1, (self.num_heads, self.num_heads)).to(nodes.dtype)  # [B, S, H, H]
        from_query = self._mixing(context, 0).to(nodes.dtype) @ sent  # [B, T, H, S]
        from_key = torch.einsum("bsij,btjs->btis", by_key, sent)  # [B, T, H, S]
        return nodes + from_query + from_key

    def _mixing(self, x: Tensor, side: int) -> Tensor:
        hidden = F.gelu(F.linear(x, self.inner[side]))  # [*, 2*R*H]
        pair = F.linear(hidden, self.outer[side]).unflatten(-1, (2, self.rank, self.num_heads))  # [*, 2, R, H]
        senders, receivers = pair.unbind(dim=-3)  # [*, R, H] each
        senders = F.rms_norm(senders, (self.num_heads,), eps=1e-6)
        mixing = receivers.transpose(-1, -2) @ senders  # [*, H, H]
        if self.gate is None:
            return mixing
        return mixing + torch.diag_embed(F.linear(x, self.gate[side]).tanh())  # [*, H, H]

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, rank={self.rank}, gates={self.gate is not None}"
