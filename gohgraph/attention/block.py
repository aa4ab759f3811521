"""Multi-head attention whose heads may form graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn

from gohgraph.attention.cache import KeyValueCache
from gohgraph.attention.call import Call, Mask, Routed
from gohgraph.attention.forms import attend
from gohgraph.attention.history import Earlier, History
from gohgraph.attention.routed_forms import why_all_heads
from gohgraph.attention.routing import HeadRouter, Routing
from gohgraph.attention.skipped import ActiveHeads, project_all
from gohgraph.common.checks import there
from gohgraph.graphs.protocol import Losses, Messages, SiteGraph
from gohgraph.graphs.wrapped import graph_at

# The further sites by the name of their slot, and what the block can give graphs at every site.
INNER_SITES = {"query": "queries", "key": "keys", "value": "values", "weight": "weights"}
ALLOWED = {
    "outputs": {"whole", "reach", "values"},
    **dict.fromkeys(("scores", "weights"), {"whole", "keyed", "nonlinear"}),
    **dict.fromkeys(("queries", "keys", "values"), {"whole", "reach"}),
}


class Heads(NamedTuple):
    """What the heads of an attention block did.

    Args:
        outputs: `[B, T, H, D]`, after messages and times their gates: what the output projection reads.
        routing: the router's decisions, `None` without one.
        nodes: by site, what later layers read of this one.

    Example:
        >>> y, heads = MultiHeadAttention(20, 5)(torch.randn(2, 3, 20))
        >>> heads.outputs.shape, heads.routing
        (torch.Size([2, 3, 5, 4]), None)
    """

    outputs: Tensor
    routing: Routing | None = None
    nodes: Mapping[str, Tensor] = {}


class MultiHeadAttention(nn.Module):
    r"""Multi-head attention whose heads exchange messages over explicit graphs, in place of concatenating them.

    .. math::
        a_i = q_i k_i^T / \sqrt{D} \;\to\; a' = \mathrm{score\_graph}(a, x), \qquad
        z_i = \mathrm{softmax}(a'_i)\, v_i \;\to\; z' = \mathrm{output\_graph}(z, x), \qquad
        y(t) = \sum_i g_i(t)\, W_O^i z'_i(t)

    ::

        x -+- query -> query graph -> rotary -> q -+
           |                                       +-> scores -> score graph -> softmax -> weight graph -+
           +- key ---> key graph ---> rotary -> k -+                                                     |
           |                                                                                             +-> z
           +- value -> value graph ----------------------------------------------------------------> v --+
           |                                                                                             |
           +- router -> active heads, gates g         y <- output <- times g <- output graph <-----------+

    With all slots empty this is the attention of Vaswani et al. 2017 (equation 1 and section 3.2.2), g = 1. A slot
    takes any `SiteGraph` that may stand there, or a plain module `(nodes [*, H, F], context [*, M]) -> nodes`, which is
    wrapped; the context x(t) is this block's own input.

    Args:
        d_model: M.
        num_heads: H query heads; M = H * D.
        num_kv_heads: G key/value heads, a divisor of H (arXiv 2305.13245); `None` for H.
        bias: biases in the four projections.
        dropout: probability of dropping an attention weight in training.
        causal: token t attends to s <= t only.
        rotary: what queries and keys of every head go through, `RotaryPositions`, `QueryKeyNorm` or `None`.
        output_graph: messages between head outputs, e.g. a `HeadGraphConv`, or `None`.
        score_graph: messages between attention scores before the softmax, or `None`.
        router: a `HeadRouter`, which chooses and weighs the heads of every token, or `None`: all work, g = 1. Messages
            at both sites then flow on the induced subgraph of a token's active heads.
        inner_graphs: graphs at further sites by name: `"query"`, `"key"`, `"value"`, before attention and rotary
            positions (nodes are the key/value heads at the last two, the context is the token's own), and `"weight"`,
            the maps `[B, T, H, S]` after the softmax.

    Attributes:
        form: the name of the form in which attention is computed, of `gohgraph.attention.forms.FORMS`; `None` chooses
            the one that was measured to pay. `explain` tells what a call would choose.

    Shape:
        x `[B, T, M]` -> (y `[B, T, M]`, `Heads` with outputs `[B, T, H, D]`).

    Raises:
        ValueError: numbers of heads that do not divide, or a graph or router that does not fit its site; in forward,
            a mask of another shape, or a `form` that does not take the call.

    Example:
        >>> import gohgraph as goh
        >>> graph = goh.HeadGraphConv(goh.head_graph(4), head_dim=8, context_dim=32)
        >>> attention = MultiHeadAttention(32, 4, causal=True, output_graph=graph)
        >>> y, heads = attention(torch.randn(2, 5, 32))
        >>> y.shape, heads.outputs.shape
        (torch.Size([2, 5, 32]), torch.Size([2, 5, 4, 8]))
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        causal: bool = False,
        rotary: nn.Module | None = None,
        output_graph: nn.Module | None = None,
        score_graph: nn.Module | None = None,
        router: HeadRouter | None = None,
        inner_graphs: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_sizes(d_model, num_heads, num_kv_heads)
        self.d_model, self.num_heads, self.num_kv_heads = d_model, num_heads, num_kv_heads
        self.head_dim, self.dropout, self.causal = d_model // num_heads, dropout, causal
        self.query = nn.Linear(d_model, d_model, bias=bias)
        self.key = nn.Linear(d_model, num_kv_heads * self.head_dim, bias=bias)
        self.value = nn.Linear(d_model, num_kv_heads * self.head_dim, bias=bias)
        self.output = nn.Linear(d_model, d_model, bias=bias)
        self.rotary = rotary
        self.fill_slots(output_graph, score_graph, router, inner_graphs or {})
        self.form: str | None = None

    def fill_slots(
        self,
        output_graph: nn.Module | None,
        score_graph: nn.Module | None,
        router: HeadRouter | None,
        inner_graphs: Mapping[str, nn.Module],
    ) -> None:
        """Puts graphs and a router into the block, in place of what stands there; arguments as in the constructor."""
        if router is not None and router.num_heads != self.num_heads:
            raise ValueError(f"Expected a router over {self.num_heads} heads (got {router.num_heads}). Do build it so.")
        if unknown := sorted(set(inner_graphs) - set(INNER_SITES)):
            raise ValueError(f"Expected inner_graphs of {list(INNER_SITES)} (got {unknown}). Do choose among them.")
        output_graph = graph_at("outputs", output_graph, self.num_heads, ALLOWED["outputs"])
        # Pairs of heads that share a key/value head have no keys to join, and routed heads no pairs.
        joins = self.num_kv_heads == self.num_heads and router is None and "weight" not in inner_graphs
        allowed = ALLOWED["scores"] | ({"joined keys"} if joins else set())
        score_graph = graph_at("scores", score_graph, self.num_heads, allowed)
        inner: dict[str, nn.Module] = {}
        for name, graph in inner_graphs.items():
            site, nodes = INNER_SITES[name], self.num_kv_heads if name in ("key", "value") else self.num_heads
            inner[name] = there(graph_at(site, graph, nodes, ALLOWED[site]))
        # All are checked before any is put in: what is refused leaves the block as it was.
        self.output_graph, self.score_graph, self.router = output_graph, score_graph, router
        self.inner_graphs = nn.ModuleDict(inner)

    @property
    def graphs(self) -> dict[str, SiteGraph]:
        """What stands at which site, of `gohgraph.graphs.config.SITES`."""
        inner = {slot: cast(SiteGraph, graph) for slot, graph in self.inner_graphs.items()}
        slots = {"output": self.output_graph, "score": self.score_graph, **inner}
        sites = {"output": "outputs", "score": "scores", **INNER_SITES}
        return {sites[slot]: graph for slot, graph in slots.items() if graph is not None}

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        keep_mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KeyValueCache | None = None,
        earlier: Earlier | Sequence[Tensor] = (),
        token_mask: Tensor | None = None,
        losses: Losses | None = None,
    ) -> tuple[Tensor, Heads]:
        """Attends from `x [B, T, M]` to itself, or to `memory` (cross attention).

        Args:
            memory: `[B, S, M]`, or `None` for self attention.
            keep_mask: bool, four dimensions that broadcast to `[B, H, T, S]`, True = may attend. A row without any
                gives zeros.
            positions: `[T]` or `[B, T]` for the rotary; `None` counts on from the cache.
            cache: keys and values of the tokens before, extended in place; causality then counts from its length.
            earlier: for graphs with `cross_layer`, the nodes of all layers before by site, nearest first; the block's
                own at these sites are then in `Heads.nodes`. A sequence are head outputs.
            token_mask: bool `[B, T]`, True = a real token of `x`; losses leave out the others.
            losses: asks for what graphs add to the training loss: takes in a scalar under each name it has, the mean
                over active heads of real tokens.
        """
        _check_mask(keep_mask)
        past = 0 if cache is None else len(cache)
        source = x if memory is None else memory
        keys = past if memory is not None and past else past + source.shape[1]
        routing = self._route(x, token_mask, decodes=cache is not None and x.shape[1] == 1)
        active, history = None if routing is None else routing.active, History(earlier)
        routed = self._routed(routing, x, keys)
        heads = routed.heads if routed is not None and isinstance(routed.heads, ActiveHeads) else None
        if positions is None and self.rotary is not None:
            positions = torch.arange(past, past + x.shape[1], device=x.device)
        q = self._queries(x, routing, heads, history)  # [B, T, H, D]
        if cache is not None and cache.is_filled:
            q, (k, v, *states) = self._turned(positions, q)[0], cache.read()  # [B, S, G, D] each
            own = v
        else:
            k, v = self._keys_values(source, heads, history)  # [B, S, G, D] each
            q, k = self._turned(positions, q, k)
            own, (k, v, *states) = v, self._remembered(cache, k, v, source)
        scores, weights = self._messages(x, active, states)
        mask, dropout = Mask(keep_mask, self.causal), self.dropout if self.training else 0.0
        z, _ = attend(Call(q, k, v, mask, dropout, scores, weights, routed), self.form)  # [B, T, H, D]
        if self.output_graph is not None:
            read = {"values": self._values_of(own, memory)} if self.output_graph.traits.reads_values else {}
            z = self._pass_messages(z, x, history, active, token_mask, losses, **read)
        if routing is not None:
            z = z * routing.gates.unsqueeze(-1).to(z.dtype)
        history.hand_on("outputs", z)
        y = self.output(z.flatten(-2)) if heads is None else heads.read_out(z, self.output)  # [B, T, M]
        return y, Heads(z, routing, history.nodes)

    if TYPE_CHECKING:
        __call__ = forward

    def _route(self, x: Tensor, token_mask: Tensor | None, *, decodes: bool) -> Routing | None:
        if self.router is None:
            return None
        return self.router(x, token_mask, statistics=not decodes or torch.is_grad_enabled())

    def _routed(self, routing: Routing | None, x: Tensor, keys: int) -> Routed | None:
        # In tensor parallelism the router tells of all heads, while queries are of some.
        if routing is None or routing.active.shape[-1] != self.num_heads:
            return None
        reason, router = why_all_heads(self, x, keys), there(self.router)
        return Routed(routing.active, router.num_shared, router.num_active, reason or ActiveHeads(routing.active))

    def _queries(
        self, x: Tensor, routing: Routing | None, heads: ActiveHeads | None, history: History
    ) -> Tensor:
        if heads is None:
            q = _by_head(self.query(x), self.num_heads)  # [B, T, H, D]
        else:
            q = heads.project(x, self.query, self.head_dim)  # [B, T, H, D]
        return self._inner("query", q, x, history, routing)

    def _keys_values(self, source: Tensor, heads: ActiveHeads | None, history: History) -> tuple[Tensor, Tensor]:
        if heads is not None and source.shape[1] == 1:
            # Later tokens may need the keys of any head: none is left out.
            k, v = (project_all(source, linear, self.head_dim) for linear in (self.key, self.value))
        else:
            k, v = (_by_head(f(source), self.num_kv_heads) for f in (self.key, self.value))
        return self._inner("key", k, source, history), self._inner("value", v, source, history)

    def _turned(self, positions: Tensor | None, *heads: Tensor) -> tuple[Tensor, ...]:
        """Queries and keys after the rotary; of one token in one call, which then costs as much as its work."""
        if self.rotary is None:
            return heads
        if len(heads) == 1 or any(each.shape[1] != 1 for each in heads):
            return tuple(self.rotary(each, positions) for each in heads)
        turned: Tensor = self.rotary(torch.cat(heads, dim=2), positions)
        return tuple(turned.split_with_sizes([each.shape[2] for each in heads], 2))

    def _remembered(self, cache: KeyValueCache | None, k: Tensor, v: Tensor, source: Tensor) -> tuple[Tensor, ...]:
        """All keys and values, and the state `[B, S, 1, U]` of every graph over maps that reads the keys' tokens."""
        keyed = (graph for graph in self._map_graphs() if graph is not None and graph.traits.keyed)
        states = (there(graph.key_state(source)).unsqueeze(2) for graph in keyed)
        return (k, v, *states) if cache is None else cache.update(k, v, *states)

    def _inner(
        self, slot: str, nodes: Tensor, context: Tensor, history: History, routing: Routing | None = None
    ) -> Tensor:
        site = INNER_SITES[slot]
        graph = self._inner_graph(slot)
        if graph is not None:
            active = None if routing is None else routing.active
            nodes = graph(nodes, context, history.of(site, graph), active)
        history.hand_on(site, nodes, routing)
        return nodes

    def _map_graphs(self) -> tuple[SiteGraph | None, SiteGraph | None]:
        return self.score_graph, self._inner_graph("weight")

    def _inner_graph(self, slot: str) -> SiteGraph | None:
        # Asked five times a token and layer: past what a module dictionary does in Python.
        return cast("SiteGraph | None", self.inner_graphs._modules.get(slot))

    def _messages(self, x: Tensor, active: Tensor | None, states: Sequence[Tensor]) -> list[Messages | None]:
        """The graphs over scores and over weights, bound to the tokens of this call."""
        left = iter(states)
        return [
            None if graph is None else Messages(graph, x, active, next(left).squeeze(2) if _is_keyed(graph) else None)
            for graph in self._map_graphs()
        ]

    def _values_of(self, v: Tensor, memory: Tensor | None) -> Tensor:
        """The tokens' own values `[B, T, G, D]` for every head, `[B, T, H, D]`."""
        if memory is not None:
            raise ValueError(
                f"Expected self attention for {type(self.output_graph).__name__}, which reads the tokens' own values "
                "(got a memory). Do leave the graph out of cross attention."
            )
        return v.repeat_interleave(self.num_heads // self.num_kv_heads, dim=2)

    def _pass_messages(
        self,
        z: Tensor,
        x: Tensor,
        history: History,
        active: Tensor | None,
        token_mask: Tensor | None,
        losses: Losses | None,
        **own: Tensor,
    ) -> Tensor:
        asked: Losses = {} if losses is None else {name: [] for name in losses}
        graph = there(self.output_graph)
        earlier = history.of("outputs", graph)
        z = graph(z, x, earlier, active, losses=asked, **own)  # [B, T, H, D]
        for name, of_nodes in asked.items():
            there(losses)[name] += [_mean_over(one, active, token_mask) for one in of_nodes]
        return z

    def extra_repr(self) -> str:
        return (
            f"d_model={self.d_model}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"causal={self.causal}, dropout={self.dropout}"
        )


def _by_head(x: Tensor, num_heads: int) -> Tensor:
    # Not unflatten, which is Python and takes as long as the product for one token.
    return x.view(*x.shape[:-1], num_heads, x.shape[-1] // num_heads)  # [B, T, H, D]


def _is_keyed(graph: SiteGraph | None) -> bool:
    return graph is not None and graph.traits.keyed


def _mean_over(of_nodes: Tensor, active: Tensor | None, token_mask: Tensor | None) -> Tensor:
    """The mean of `[B, T, H]` over the active heads of real tokens."""
    if active is None and token_mask is None:
        return of_nodes.mean()
    counted = torch.ones_like(of_nodes, dtype=torch.bool) if active is None else active.expand_as(of_nodes)
    if token_mask is not None:
        counted = counted & token_mask.unsqueeze(-1)  # [B, T, H]
    return torch.where(counted, of_nodes, 0.0).sum() / counted.sum().clamp(min=1)


def _check_mask(keep_mask: Tensor | None) -> None:
    # A float mask would be added to the scores, and [B, S] would be taken for [T, S] where B = T.
    if keep_mask is not None and (keep_mask.dtype != torch.bool or keep_mask.dim() != 4):
        raise ValueError(
            f"Expected a bool keep_mask that broadcasts to [B, H, T, S] (got {keep_mask.dtype} "
            f"{list(keep_mask.shape)}). Do index a token mask as mask[:, None, None, :]."
        )


def _check_sizes(d_model: int, num_heads: int, num_kv_heads: int) -> None:
    if num_heads < 1 or d_model % num_heads:
        raise ValueError(
            f"Expected d_model to be a multiple of num_heads = {num_heads} (got {d_model}). Do change either."
        )
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"Expected num_kv_heads to divide num_heads = {num_heads} (got {num_kv_heads}). Do choose a divisor."
        )
