"""The sites where heads exchange messages, for attention whose projections live elsewhere."""

from collections.abc import Collection
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from gohgraph.attention.call import NO_MASK, Call, Core, Mask
from gohgraph.attention.forms import attend
from gohgraph.attention.routing import HeadRouter, Routing
from gohgraph.graphs.protocol import Messages
from gohgraph.graphs.wrapped import graph_at


class Slots(TypedDict, total=False):
    """What stands in the slots of a `HeadSlots`, as keyword arguments."""

    output_graph: nn.Module | None
    score_graph: nn.Module | None
    router: HeadRouter | None


class HeadSlots(nn.Module):
    r"""The slots of an attention block for head graphs and a router, and what they do to queries, keys and values.

    .. math::
        a' = \mathrm{score\_graph}(a, x), \qquad z_i = \mathrm{softmax}(a'_i)\, v_i, \qquad
        z'_i = g_i\, \mathrm{output\_graph}(z, x)_i

    Args:
        num_heads: H, query heads.
        output_graph: messages between head outputs, or `None`; as in `MultiHeadAttention`, of one layer.
        score_graph: messages between attention scores, or `None`; as there, of the query's token alone.
        router: a `HeadRouter`, or `None`: all heads work, g = 1.
        allowed: what the attention around it can give graphs, as in `check_site`.
        head_order: heads in the router's order, a permutation of 0..H-1 whose first `num_shared` are the shared ones;
            `None` for the order they have.

    Attributes:
        form: as in `MultiHeadAttention`.
        origin: what a conversion built it from, so that it can be built again; `None` where none did.

    Example:
        >>> from gohgraph import HeadGraphConv, head_graph
        >>> sites = HeadSlots(5, output_graph=HeadGraphConv(head_graph(5), head_dim=4, context_dim=20))
        >>> z, x = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 20)
        >>> torch.equal(sites.pass_messages(z, x), z)
        True
    """

    origin: Any = None
    places: Tensor | None

    def __init__(
        self,
        num_heads: int,
        *,
        output_graph: nn.Module | None = None,
        score_graph: nn.Module | None = None,
        router: HeadRouter | None = None,
        allowed: Collection[str] = ("whole", "nonlinear"),
        head_order: list[int] | None = None,
    ) -> None:
        super().__init__()
        self.fill_slots(num_heads, output_graph, score_graph, router, allowed)
        self.order_heads(head_order)

    def fill_slots(
        self,
        num_heads: int,
        output_graph: nn.Module | None = None,
        score_graph: nn.Module | None = None,
        router: HeadRouter | None = None,
        allowed: Collection[str] = ("whole", "nonlinear"),
    ) -> None:
        """Puts graphs and a router in, in place of what stands there; arguments as in the constructor."""
        if router is not None and router.num_heads != num_heads:
            raise ValueError(f"Expected a router over {num_heads} heads (got {router.num_heads}). Do build it so.")
        output_graph = graph_at("outputs", output_graph, num_heads, allowed)
        score_graph = graph_at("scores", score_graph, num_heads, allowed)
        # All are checked before any is put in: what is refused leaves the attention as it was.
        self.num_heads = num_heads
        self.output_graph, self.score_graph, self.router = output_graph, score_graph, router
        self.form: str | None = None

    def empty_slots(self) -> None:
        """Takes out all that `fill_slots` and `order_heads` put in, as if it had never been there."""
        for name in ("output_graph", "score_graph", "router"):
            self._modules.pop(name, None)
            self.__dict__.pop(name, None)
        for name in ("form", "head_order", "origin"):
            self.__dict__.pop(name, None)
        self._buffers.pop("places", None)
        self._non_persistent_buffers_set.discard("places")

    def order_heads(self, order: list[int] | None) -> None:
        """Sets which head each place of the router stands for."""
        if order is not None and sorted(order) != list(range(self.num_heads)):
            raise ValueError(
                f"Expected head_order to be a permutation of 0..{self.num_heads - 1} (got {order}). Do list every head."
            )
        self.head_order = order
        # On the CPU whatever the default device is: a table that nothing loads again.
        places = None if order is None else torch.tensor(order, device="cpu").argsort()  # [H]
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
        mask: Mask = NO_MASK,
        *,
        dropout: float = 0.0,
        routing: Routing | None = None,
        need_weights: bool = False,
        core: Core | None = None,
        scale: float | None = None,
    ) -> tuple[Tensor, Any]:
        """Attends under the messages between scores: `[B, T, H, D]`, and the weights `[B, T, H, S]` or `None`.

        Args:
            q, k, v: `[B, T, H, D]`, `[B, S, G, D]` twice.
            x: the context `[B, T, M]`.
            mask, dropout, core, scale: as in `Call`.
            routing: of `route`.
            need_weights: returns the attention weights too, after dropout.
        """
        active = None if routing is None else routing.active
        scores = None if self.score_graph is None else Messages(self.score_graph, x, active)
        call = Call(q, k, v, mask, dropout, scores, need_weights=need_weights, core=core, scale=scale)
        return attend(call, self.form)

    def pass_messages(self, z: Tensor, x: Tensor, routing: Routing | None = None) -> Tensor:
        """Passes messages between head outputs `z [B, T, H, D]` and weighs them with the gates."""
        if self.output_graph is not None:
            z = self.output_graph(z, x, (), None if routing is None else routing.active)  # [B, T, H, D]
        return z if routing is None else z * routing.gates.unsqueeze(-1).to(z.dtype)
