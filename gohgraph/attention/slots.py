"""The sites where heads exchange messages, for attention whose projections live elsewhere."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gohgraph.attention.maps import mixed_attention, plain_attention, wide_heads_for
from gohgraph.attention.routing import Routing
from gohgraph.attention.tiled import runs_in_tiles, tiled_attention


class HeadSites(nn.Module):
    r"""The slots of an attention block for head graphs and a router, and what they do to queries, keys and values.

    .. math::
        a' = \mathrm{score\_graph}(a, x), \qquad z_i = \mathrm{softmax}(a'_i)\, v_i, \qquad
        z'_i = g_i\, \mathrm{output\_graph}(z, x)_i

    Args:
        num_heads: H, query heads.
        output_graph: messages between head outputs, or `None`; as in `MultiHeadAttention`, of one layer.
        score_graph: messages between attention scores, or `None`; as there, of the query's token alone.
        router: a `HeadRouter`, or `None`: all heads work, g = 1.
        head_order: heads in the router's order, a permutation of 0..H-1 whose first `num_shared` are the shared ones;
            `None` for the order they have.

    Raises:
        ValueError: a slot over another number of heads, a graph that needs earlier layers, the keys' tokens or an
            alignment loss, an order that is no permutation.

    Example:
        >>> from gohgraph import HeadGraphConv, head_graph
        >>> sites = HeadSites(5, output_graph=HeadGraphConv(head_graph(5), head_dim=4, context_dim=20))
        >>> z, x = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 20)
        >>> torch.equal(sites.pass_messages(z, x), z)
        True
    """

    def __init__(
        self,
        num_heads: int,
        *,
        output_graph: nn.Module | None = None,
        score_graph: nn.Module | None = None,
        router: nn.Module | None = None,
        head_order: list[int] | None = None,
    ) -> None:
        super().__init__()
        check_slots(num_heads, output_graph=output_graph, score_graph=score_graph, router=router)
        self.num_heads = num_heads
        self.output_graph, self.score_graph, self.router = output_graph, score_graph, router
        self.wide = wide_heads_for(score_graph)
        self.order_heads(head_order)

    def order_heads(self, order: list[int] | None) -> None:
        """Sets which head each place of the router stands for."""
        if order is not None and sorted(order) != list(range(self.num_heads)):
            raise ValueError(
                f"Expected head_order to be a permutation of 0..{self.num_heads - 1} (got {order}). Do list every head."
            )
        self.head_order = order
        places = None if order is None else torch.tensor(order).argsort()  # [H]
        self.register_buffer("places", places, persistent=False)

    def route(self, x: Tensor, token_mask: Tensor | None = None) -> Routing | None:
        """Returns the router's decisions for `x [B, T, M]`, gates and active heads `[B, T, H]` in the heads' order.

        Losses and load are those of real tokens, where `token_mask [B, T]` is True.
        """
        if self.router is None:
            return None
        routing = self.router(x, token_mask)
        if self.places is None:
            return routing
        gates, active = (each.index_select(-1, self.places) for each in (routing.gates, routing.active))  # [B, T, H]
        return routing._replace(gates=gates, active=active)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        is_causal: bool = False,
        dropout: float = 0.0,
        routing: Routing | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends under the messages between scores.

        Args:
            q, k, v: `[B, T, H, D]`, `[B, S, G, D]` twice.
            x: the context `[B, T, M]`.
            mask: of `scaled_dot_product_attention`, broadcastable to `[B, H, T, S]`.
            is_causal: query t sees keys s <= t; without `mask`.
            dropout: probability of dropping an attention weight.
            routing: of `route`.
            need_weights: returns the attention weights too, after dropout.

        Returns:
            Head outputs `[B, T, H, D]`, and weights `[B, T, H, S]` or `None`.
        """
        tokens, keys = q.shape[1], k.shape[1]
        if not need_weights and self.score_graph is None:
            return plain_attention(q, k, v, mask, dropout, is_causal), None
        numbers = mask is not None and mask.is_floating_point()
        if not need_weights and not numbers and runs_in_tiles([self.score_graph], q, k, dropout):
            mixing = self.score_graph.mixing(x, **_active(routing))  # [B, T, H, H] or [H, H]
            return tiled_attention(q, k, v, mixing, None, mask, is_causal), None
        if not need_weights and self.wide is not None and tokens > 1:
            return self.wide(q, k, v, self.score_weights(x, routing), mask, is_causal, dropout), None
        if is_causal:
            mask = torch.ones(tokens, keys, dtype=torch.bool, device=q.device).tril()  # [T, S]
        kept: list[Tensor] = []

        def keep(weights: Tensor) -> Tensor:
            kept.append(F.dropout(weights, dropout))  # [B, T, H, S]
            return kept[0]

        z = mixed_attention(q, k, v, self.mixing(x, routing), keep, mask)  # [B, T, H, D]
        return z, kept[0]

    def score_weights(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        """Returns the weights of the score graph's edges, `[B, T, E]` or `[E]`."""
        return self.score_graph.edge_weight(x, **_active(routing))

    def mixing(self, x: Tensor, routing: Routing | None = None) -> Any:
        """Returns the score graph as a function of scores `[B, T, H, S]` alone, or `None`."""
        return self.score_graph and partial(self.score_graph, context=x, **_active(routing))

    def pass_messages(self, z: Tensor, x: Tensor, routing: Routing | None = None) -> Tensor:
        """Passes messages between head outputs `z [B, T, H, D]` and weighs them with the gates."""
        if self.output_graph is not None:
            z = self.output_graph(z, x, **_active(routing))  # [B, T, H, D]
        return z if routing is None else z * routing.gates.unsqueeze(-1).to(z.dtype)


def check_slots(num_heads: int, **slots: nn.Module | None) -> None:
    """Raises `ValueError` for a graph or router these slots cannot hold."""
    for name, module in slots.items():
        for part in module if isinstance(module, nn.ModuleList) else (module,):
            heads = getattr(part, "num_heads", num_heads)
            if heads != num_heads:
                raise ValueError(f"Expected {name} over {num_heads} heads (got {heads}). Do build it for {num_heads}.")
            reasons = {
                "heads of earlier layers": getattr(part, "cross_layer", 0) > 0,
                "the keys' tokens": getattr(part, "is_keyed", False),
                "an alignment loss": getattr(part, "alignment", False),
                "messages that are not linear": name == "score_graph" and not getattr(part, "is_linear", True),
            }
            for reason, holds in reasons.items():
                if holds:
                    raise ValueError(
                        f"Expected a {name} of one layer's heads and the query's token (got one with {reason}). Do "
                        "build it without, or use gohgraph's own models."
                    )


def _active(routing: Routing | None) -> dict[str, Tensor]:
    return {} if routing is None else {"active": routing.active}
