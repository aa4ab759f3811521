"""The objects of a transformer: multi-head attention, whose heads may form graphs, and the feed-forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gohgraph.cache import KeyValueCache
from gohgraph.experts import alignment_loss
from gohgraph.grouping import LARGEST_SHARE, TokenGroups, group_tokens, grouped_attention, may_pay
from gohgraph.routing import Routing
from gohgraph.scores import mixed_attention, wide_heads_for
from gohgraph.skipping import ActiveHeads, only_multiplies, project_all

# Numbers per row that need not be read for heads that are off, from which leaving these out pays on a CPU; with fewer
# the calls cost more. Between 0.33 and 0.39 million by `tools/benchmark.py routing`, two threads.
SKIP_FROM_UNREAD = 350_000


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
    slot takes any module `(nodes [*, H, F], context [*, M]) -> nodes`; the context x(t) is this block's own input.
    Beside a router it is called with `active=` bool `[*, H]` too, with `cross_layer` also with `earlier`.

    Args:
        d_model: M.
        num_heads: H query heads; M = H * D.
        num_kv_heads: G key/value heads, a divisor of H (arXiv 2305.13245); `None` for H.
        bias: biases in the four projections.
        dropout: probability of dropping an attention weight in training.
        causal: token t attends to s <= t only.
        rotary: `RotaryPositions` for queries and keys, or `None`.
        output_graph: messages between head outputs, e.g. a `HeadGraphConv`, or `None`.
        score_graph: messages between attention scores before the softmax, or `None`. A one-round graph of in-degree up
            to 4 runs as attention over wider heads (`wide`, a `WideHeads`; set it to `None` to force the eager form).
        router: a `HeadRouter`, which chooses and weighs the heads of every token, or `None`: all work, g = 1. Messages
            at both sites then flow on the induced subgraph of a token's active heads. Heads that are off are left out:
            in decoding altogether, of more tokens their attention (`skip`: `None` where that was measured to pay, True
            wherever it can be done, False never).

    Shape:
        x `[B, T, M]` -> (y `[B, T, M]`, `Heads` with outputs `[B, T, H, D]`).

    Raises:
        ValueError: M not a multiple of H, G not a divisor of H, a graph or router over another number of heads.

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
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_attention(d_model, num_heads, num_kv_heads, output_graph, score_graph, router)
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
        self.skip: bool | None = None
        self.wide = wide_heads_for(score_graph)

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
        past = 0 if cache is None else len(cache)
        keys = past if memory is not None and past else past + (x if memory is None else memory).shape[1]
        heads = ActiveHeads(routing.active) if self._skips(x, keys) else None
        if heads is None:
            q = self.query(x).unflatten(-1, (self.num_heads, self.head_dim))  # [B, T, H, D]
        else:
            q = heads.project(x, self.query, self.head_dim)  # [B, T, H, D]
        if positions is None and self.rotary is not None:
            positions = torch.arange(past, past + x.shape[1], device=x.device)
        if self.rotary is not None:
            q = self.rotary(q, positions)
        k, v = self._keys_values(x if memory is None else memory, positions, cache, heads)  # [B, S, G, D] each
        if heads is None:
            z = self._attend(q, k, v, x, keep_mask, active)  # [B, T, H, D]
        else:
            z = heads.attend(q, k, v, x, keep_mask, self.score_graph)  # [B, T, H, D]
        z, alignment = self._pass_messages(z, x, earlier, active, token_mask)
        if routing is not None:
            z = z * routing.gates.unsqueeze(-1).to(z.dtype)
        y = self.output(z.flatten(-2)) if heads is None else heads.read_out(z, self.output)  # [B, T, M]
        return y, Heads(z, routing, alignment)

    def _skips(self, x: Tensor, keys: int) -> bool:
        """Whether heads that are off are left out: in decoding only, by default where that was measured to pay."""
        if self.router is None or self.skip is False or x.shape[1] != 1 or not len(x):
            return False
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or (self.training and self.dropout):
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
    ) -> tuple[Tensor, Tensor]:
        if cache is not None and cache.is_filled:
            return cache.read()
        if heads is not None and source.shape[1] == 1:
            # Later tokens may need the keys of any head: none is left out.
            k, v = (project_all(source, linear, self.head_dim) for linear in (self.key, self.value))
        else:
            k, v = (f(source).unflatten(-1, (self.num_kv_heads, self.head_dim)) for f in (self.key, self.value))
        if self.rotary is not None:
            k = self.rotary(k, positions)
        return (k, v) if cache is None else cache.update(k, v)

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
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, keep_mask: Tensor | None, active: dict[str, Tensor]
    ) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        groups = None if dropout or self.score_graph is not None else self._groups(q, k, **active)
        if groups is not None:
            return grouped_attention(q, k, v, groups, keep_mask, self.causal)
        tokens, keys = q.shape[1], k.shape[1]
        # One query may see every key there is; a full square without padding leaves causality to the kernel.
        is_causal = self.causal and tokens > 1 and tokens == keys and keep_mask is None
        if self.causal and tokens > 1 and not is_causal:
            keep_mask = _and(_causal_mask(tokens, keys, q.device), keep_mask)
        if self.score_graph is None:
            return _plain_attention(q, k, v, keep_mask, dropout, is_causal)
        if self.wide is not None and tokens > 1:
            alpha = self.score_graph.edge_weight(x, **active)  # [B, T, E] or [E]
            return self.wide(q, k, v, alpha, keep_mask, is_causal, dropout)
        if is_causal:
            keep_mask = _causal_mask(tokens, keys, q.device)
        return mixed_attention(q, k, v, self.score_graph, x, keep_mask, dropout, **active)

    def extra_repr(self) -> str:
        return (
            f"d_model={self.d_model}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"causal={self.causal}, dropout={self.dropout}"
        )


class FeedForward(nn.Module):
    r"""Position-wise feed-forward, FF(x) = W_2 f(W_1 x), or W_2 (silu(W_1 x) * W_3 x) for SwiGLU.

    Sources: Vaswani et al. 2017, equation 2; SwiGLU: Shazeer 2020 (arXiv 2002.05202).

    Args:
        d_model: M.
        d_ff: inner width F. SwiGLU has three matrices: two thirds of a ReLU's width give equal parameters.
        activation: `"relu"`, `"gelu"` (exact) or `"swiglu"`.
        bias: biases in the projections.
        dropout: probability of dropping an inner unit in training.

    Shape:
        x `[*, M]` -> `[*, M]`.

    Raises:
        ValueError: unknown activation.

    Example:
        >>> FeedForward(8, 21, "swiglu")(torch.randn(2, 3, 8)).shape
        torch.Size([2, 3, 8])
    """

    def __init__(
        self, d_model: int, d_ff: int, activation: str = "gelu", *, bias: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        functions = {"relu": F.relu, "gelu": F.gelu, "swiglu": F.silu}
        if activation not in functions:
            raise ValueError(f"Expected activation of {list(functions)} (got {activation!r}). Do choose one of them.")
        self.function = functions[activation]
        self.inner = nn.Linear(d_model, d_ff, bias=bias)
        self.gate = nn.Linear(d_model, d_ff, bias=bias) if activation == "swiglu" else None
        self.outer = nn.Linear(d_ff, d_model, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the feed-forward to every token."""
        hidden = self.function(self.inner(x))  # [*, F]
        if self.gate is not None:
            hidden = hidden * self.gate(x)
        return self.outer(self.dropout(hidden))


def _plain_attention(
    q: Tensor, k: Tensor, v: Tensor, keep_mask: Tensor | None, dropout: float, is_causal: bool
) -> Tensor:
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))  # [B, H, T, D], [B, G, S, D]
    z = F.scaled_dot_product_attention(q, k, v, keep_mask, dropout, is_causal=is_causal, enable_gqa=grouped)
    return z.transpose(1, 2)  # [B, T, H, D]


def _causal_mask(tokens: int, keys: int, device: torch.device) -> Tensor:
    rows = torch.arange(keys - tokens, keys, device=device).unsqueeze(1)  # [T, 1]
    return torch.arange(keys, device=device) <= rows  # [T, S]


def _and(mask: Tensor, other: Tensor | None) -> Tensor:
    return mask if other is None else mask & other


def _check_mask(keep_mask: Tensor | None) -> None:
    # A float mask would be added to the scores, and [B, S] would be taken for [T, S] where B = T.
    if keep_mask is not None and (keep_mask.dtype != torch.bool or keep_mask.dim() != 4):
        raise ValueError(
            f"Expected a bool keep_mask that broadcasts to [B, H, T, S] (got {keep_mask.dtype} "
            f"{list(keep_mask.shape)}). Do index a token mask as mask[:, None, None, :]."
        )


def _check_attention(
    d_model: int,
    num_heads: int,
    num_kv_heads: int,
    output_graph: nn.Module | None,
    score_graph: nn.Module | None,
    router: nn.Module | None,
) -> None:
    if num_heads < 1 or d_model % num_heads:
        raise ValueError(
            f"Expected d_model to be a multiple of num_heads = {num_heads} (got {d_model}). Do change either."
        )
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"Expected num_kv_heads to divide num_heads = {num_heads} (got {num_kv_heads}). Do choose a divisor."
        )
    for name, slot in (("output_graph", output_graph), ("score_graph", score_graph), ("router", router)):
        heads = getattr(slot, "num_heads", num_heads)
        if heads != num_heads:
            raise ValueError(
                f"Expected {name} over {num_heads} heads (got {heads}). Do build it for {num_heads} heads."
            )
    if getattr(score_graph, "cross_layer", 0) or not getattr(score_graph, "is_linear", True):
        raise ValueError(
            "Expected a score_graph without norm, cross_layer and embeddings (got one). Do build it without."
        )
