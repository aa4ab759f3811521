"""Multi-head attention whose heads may form graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gohgraph.attention.cache import KeyValueCache
from gohgraph.attention.grouped import LARGEST_SHARE, TokenGroups, group_tokens, grouped_attention, may_pay
from gohgraph.attention.maps import causal_mask, mixed_attention, plain_attention, wide_heads_for
from gohgraph.attention.routing import Routing
from gohgraph.attention.skipped import ActiveHeads, only_multiplies, project_all
from gohgraph.attention.tiled import runs_in_tiles, tiled_attention
from gohgraph.graphs.experts import alignment_loss

# Numbers per row that need not be read for heads that are off, from which leaving these out pays on a CPU; with fewer
# the calls cost more. Between 0.33 and 0.39 million by `tools/benchmark.py routing`, two threads.
SKIP_FROM_UNREAD = 350_000
INNER_SITES = ("query", "key", "value", "weight")


class Heads(NamedTuple):
    """What the heads of an attention block did.

    Args:
        outputs: `[B, T, H, D]`, after messages and times their gates: what the output projection reads.
        routing: the router's decisions, `None` without one.
        alignment_loss: scalar, of graph experts with `alignment`, else `None`.
    """

    outputs: Tensor
    routing: Routing | None = None
    alignment_loss: Tensor | None = None


class MultiHeadAttention(nn.Module):
    r"""Multi-head attention whose heads exchange messages over explicit graphs, in place of concatenating them.

    .. math::
        a_i = q_i k_i^T / \sqrt{D} \;\to\; a' = \mathrm{score\_graph}(a, x), \qquad
        z_i = \mathrm{softmax}(a'_i)\, v_i \;\to\; z' = \mathrm{output\_graph}(z, x), \qquad
        y(t) = \sum_i g_i(t)\, W_O^i z'_i(t)

    With all slots empty this is the attention of Vaswani et al. 2017 (equation 1 and section 3.2.2), g = 1. A graph
    slot takes any module `(nodes [*, H, F], context=[*, M]) -> nodes`; the context x(t) is this block's own input.
    Beside a router it is called with `active=` bool `[*, H]` too, with `cross_layer` also with `earlier`. Where
    messages between maps depend on the key's token, the module says so (`is_keyed`) and is called with `key_state=`
    what its method `key_state` made of the keys' tokens, `[B, S, M] -> [B, S, U]`; a cache keeps it.

    Args:
        d_model: M.
        num_heads: H query heads; M = H * D.
        num_kv_heads: G key/value heads, a divisor of H (arXiv 2305.13245); `None` for H.
        bias: biases in the four projections.
        dropout: probability of dropping an attention weight in training.
        causal: token t attends to s <= t only.
        rotary: `RotaryPositions` for queries and keys, or `None`.
        output_graph: messages between head outputs, e.g. a `HeadGraphConv`, or `None`.
        score_graph: messages between attention scores before the softmax, or `None`. Linear ones run in tiles of
            queries (`tiled`: `None` where that was measured to pay, True wherever it can be done, on CUDA by a Triton
            kernel, False never); where they do not, a one-round graph of in-degree up to 4 runs as attention over wider
            heads (`wide`, a `WideHeads`; set it to `None` to force the eager form).
        router: a `HeadRouter`, which chooses and weighs the heads of every token, or `None`: all work, g = 1. Messages
            at both sites then flow on the induced subgraph of a token's active heads. Heads that are off are left out:
            in decoding altogether, of more tokens their attention (`skip`: `None` where that was measured to pay, True
            wherever it can be done, False never).
        inner_graphs: graphs at further sites by name: `"query"`, `"key"`, `"value"`, before attention and rotary
            positions (nodes are the key/value heads at the last two, the context is the token's own), and `"weight"`,
            the maps `[B, T, H, S]` after the softmax, which are held in memory then.

    Shape:
        x `[B, T, M]` -> (y `[B, T, M]`, `Heads` with outputs `[B, T, H, D]`).

    Raises:
        ValueError: M not a multiple of H, G not a divisor of H, a graph or router over another number of heads, an
            unknown site.

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
        router: nn.Module | None = None,
        inner_graphs: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        inner_graphs = inner_graphs or {}
        _check_sizes(d_model, num_heads, num_kv_heads)
        _check_graphs(num_heads, num_kv_heads, inner_graphs, output_graph=output_graph, score_graph=score_graph)
        _check_heads("router", router, num_heads)
        self.d_model, self.num_heads, self.num_kv_heads = d_model, num_heads, num_kv_heads
        self.head_dim, self.dropout, self.causal = d_model // num_heads, dropout, causal
        self.query = nn.Linear(d_model, d_model, bias=bias)
        self.key = nn.Linear(d_model, num_kv_heads * self.head_dim, bias=bias)
        self.value = nn.Linear(d_model, num_kv_heads * self.head_dim, bias=bias)
        self.output = nn.Linear(d_model, d_model, bias=bias)
        self.rotary = rotary
        self.output_graph = output_graph
        self.score_graph = score_graph
        self.router = router
        self.inner_graphs = nn.ModuleDict(inner_graphs)
        self.skip: bool | None = None
        self.tiled: bool | None = None
        self.wide = wide_heads_for(score_graph)
        # Appends the queries and keys of heads on other ranks; `gohgraph.parallel` fills it.
        self.fetch: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        keep_mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KeyValueCache | None = None,
        earlier: Sequence[Tensor] = (),
        token_mask: Tensor | None = None,
    ) -> tuple[Tensor, Heads]:
        """Attends from `x` to itself, or to `memory` (cross attention).

        Args:
            x: `[B, T, M]`.
            memory: `[B, S, M]`, or `None` for self attention.
            keep_mask: bool, four dimensions that broadcast to `[B, H, T, S]`, True = may attend. A row without any
                gives zeros.
            positions: `[T]` or `[B, T]` for the rotary; `None` counts on from the cache.
            cache: keys and values of the tokens before, extended in place; causality then counts from its length.
            earlier: head outputs of the layers before, nearest first, for a graph with `cross_layer`.
            token_mask: bool `[B, T]`, True = a real token of `x`; losses of router and experts leave out the others.

        Returns:
            The output `[B, T, M]` and the `Heads`.

        Raises:
            ValueError: a mask that is not bool or has not four dimensions.
        """
        _check_mask(keep_mask)
        routing = None
        if self.router is not None:
            decodes = cache is not None and x.shape[1] == 1 and not torch.is_grad_enabled()
            routing = self.router(x, token_mask, statistics=not decodes)
        active = {} if routing is None else {"active": routing.active}
        source, past = x if memory is None else memory, 0 if cache is None else len(cache)
        keys = past if memory is not None and past else past + source.shape[1]
        heads = ActiveHeads(routing.active) if self._skips(x, keys) else None
        if heads is None:
            q = self.query(x).unflatten(-1, (self.num_heads, self.head_dim))  # [B, T, H, D]
        else:
            q = heads.project(x, self.query, self.head_dim)  # [B, T, H, D]
        q = self._inner("query", q, x, **active)
        if positions is None and self.rotary is not None:
            positions = torch.arange(past, past + x.shape[1], device=x.device)
        if self.rotary is not None:
            q = self.rotary(q, positions)
        k, v, *states = self._keys_values(source, positions, cache, heads)  # [B, S, G, D] each
        if heads is None:
            z = self._attend(q, k, v, x, keep_mask, active, states)  # [B, T, H, D]
        else:
            z = heads.attend(q, k, v, x, keep_mask, self.score_graph)  # [B, T, H, D]
        z, alignment = self._pass_messages(z, x, earlier, active, token_mask)
        if routing is not None:
            z = z * routing.gates.unsqueeze(-1).to(z.dtype)
        y = self.output(z.flatten(-2)) if heads is None else heads.read_out(z, self.output)  # [B, T, M]
        return y, Heads(z, routing, alignment)

    def fit_to(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        """Rebuilds the wide form after the score graph lost edges; see `HeadGraphConv.fit_to`."""
        self.wide = wide_heads_for(self.score_graph)

    def _skips(self, x: Tensor, keys: int) -> bool:
        """Whether heads that are off are left out: in decoding only, by default where that was measured to pay."""
        if self.router is None or self.skip is False or x.shape[1] != 1 or not len(x):
            return False
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or (self.training and self.dropout):
            return False
        if len(self.inner_graphs) or self._keyed():
            return False
        off = 1 - self.router.num_active / self.num_heads
        unread = off * (keys * self.num_kv_heads * self.head_dim + self.d_model**2 / x.shape[0])
        if not self.skip and (x.device.type != "cpu" or unread < SKIP_FROM_UNREAD):
            return False
        # Weights are read by head, past the modules that hold them: these must do nothing else, nor autocast.
        projections = (self.query, self.key, self.value, self.output)
        return not torch.is_autocast_enabled(x.device.type) and all(map(only_multiplies, projections))

    def _groups(self, q: Tensor, k: Tensor, active: Tensor | None = None) -> TokenGroups | None:
        """The tokens of each routed head where these are to attend for their own alone, else `None`."""
        if active is None or self.skip is False or q.shape[1] == 1 or not len(q) or torch.compiler.is_compiling():
            return None
        if self.router.num_active == self.num_heads:
            return None
        if self.skip is None and not may_pay(q, k.shape[1], self.causal):
            return None
        groups = group_tokens(active, self.router.num_shared)
        return groups if self.skip or groups.share(q.shape[1]) <= LARGEST_SHARE[self.causal] else None

    def _keys_values(
        self, source: Tensor, positions: Tensor | None, cache: KeyValueCache | None, heads: ActiveHeads | None
    ) -> tuple[Tensor, ...]:
        """Keys, values, and the state `[B, S, 1, U]` of every graph that depends on the keys' tokens."""
        if cache is not None and cache.is_filled:
            return cache.read()
        if heads is not None and source.shape[1] == 1:
            # Later tokens may need the keys of any head: none is left out.
            k, v = (project_all(source, linear, self.head_dim) for linear in (self.key, self.value))
        else:
            k, v = (f(source).unflatten(-1, (self.num_kv_heads, self.head_dim)) for f in (self.key, self.value))
        k, v = self._inner("key", k, source), self._inner("value", v, source)
        if self.rotary is not None:
            k = self.rotary(k, positions)
        kept = (k, v, *(graph.key_state(source).unsqueeze(2) for graph in self._keyed()))
        return kept if cache is None else cache.update(*kept)

    def _inner(self, site: str, nodes: Tensor, context: Tensor, **active: Tensor) -> Tensor:
        return self.inner_graphs[site](nodes, context, **active) if site in self.inner_graphs else nodes

    def _map_graphs(self) -> tuple[nn.Module | None, nn.Module | None]:
        return self.score_graph, self.inner_graphs["weight"] if "weight" in self.inner_graphs else None

    def _keyed(self) -> list[nn.Module]:
        return [graph for graph in self._map_graphs() if getattr(graph, "is_keyed", False)]

    def _pass_messages(
        self,
        z: Tensor,
        x: Tensor,
        earlier: Sequence[Tensor],
        active: dict[str, Tensor],
        token_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        if self.output_graph is None:
            return z, None
        passed = self.output_graph(z, x, *((earlier,) if earlier else ()), **active)
        if not isinstance(passed, tuple):
            return passed, None
        counted = active.get("active")  # [B, T, H]
        if token_mask is not None:
            real = token_mask.unsqueeze(-1)  # [B, T, 1]
            counted = real if counted is None else real & counted
        return passed[0], alignment_loss(z, passed[1], counted)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor,
        keep_mask: Tensor | None,
        active: dict[str, Tensor],
        states: Sequence[Tensor],
    ) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        on_scores, on_weights = self._map_graphs()
        has_no_maps = on_scores is on_weights is None
        groups = self._groups(q, k, **active) if has_no_maps and not dropout else None
        if groups is not None:
            return grouped_attention(q, k, v, groups, keep_mask, self.causal)
        tokens, keys = q.shape[1], k.shape[1]
        # One query may see every key there is; a full square without padding leaves causality to the kernel.
        is_causal = self.causal and tokens > 1 and tokens == keys and keep_mask is None
        if self.causal and tokens > 1 and not is_causal:
            keep_mask = _and(causal_mask(tokens, keys, q.device), keep_mask)
        if has_no_maps:
            return plain_attention(q, k, v, keep_mask, dropout, is_causal)
        if self.fetch is not None:
            q, k = self.fetch(q, k)  # [B, T, H', D], [B, S, H', D]
        if runs_in_tiles((on_scores, on_weights), q, k, dropout, self.tiled):
            mixes = [graph if graph is None else graph.mixing(x, **active) for graph in (on_scores, on_weights)]
            return tiled_attention(q, k, v, *mixes, keep_mask, is_causal)
        if self.wide is not None and on_weights is None and (tokens > 1 or states):
            alpha = on_scores.edge_weight(x, **active)  # [B, T, E] or [E]
            beta = states[0].squeeze(2) if states else None  # [B, S, E]
            return self.wide(q, k, v, alpha, keep_mask, is_causal, dropout, beta)
        if is_causal:
            keep_mask = causal_mask(tokens, keys, q.device)
        mixes = self._bound(x, active, states)
        return mixed_attention(q, k, v, *mixes, keep_mask, dropout)

    def _bound(
        self, x: Tensor, active: dict[str, Tensor], states: Sequence[Tensor]
    ) -> list[Callable[[Tensor], Tensor] | None]:
        """The graphs over scores and over weights as functions of their nodes alone."""
        left = iter(states)
        keyed = self._keyed()
        return [
            graph
            and partial(graph, context=x, **active, **({"key_state": next(left).squeeze(2)} if graph in keyed else {}))
            for graph in self._map_graphs()
        ]

    def extra_repr(self) -> str:
        return (
            f"d_model={self.d_model}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"causal={self.causal}, dropout={self.dropout}"
        )


def _and(mask: Tensor, other: Tensor | None) -> Tensor:
    return mask if other is None else mask & other


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


def _check_graphs(num_heads: int, num_kv_heads: int, inner: Mapping[str, nn.Module], **slots: nn.Module | None) -> None:
    if unknown := sorted(set(inner) - set(INNER_SITES)):
        raise ValueError(f"Expected inner_graphs of {list(INNER_SITES)} (got {unknown}). Do choose among them.")
    for name, graph in {**slots, **inner}.items():
        _check_heads(name, graph, num_kv_heads if name in ("key", "value") else num_heads)
    for name, graph in {"score_graph": slots["score_graph"], **inner}.items():
        if getattr(graph, "cross_layer", 0) or (name == "score_graph" and not getattr(graph, "is_linear", True)):
            raise ValueError(
                f"Expected a {name} without norm, cross_layer and embeddings (got one). Do build it without."
            )


def _check_heads(name: str, module: nn.Module | None, num_heads: int) -> None:
    heads = getattr(module, "num_heads", num_heads)
    if heads != num_heads:
        raise ValueError(f"Expected {name} over {num_heads} heads (got {heads}). Do build it for {num_heads} heads.")
