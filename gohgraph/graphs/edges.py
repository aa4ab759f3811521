"""Learned edge weights: one signed number per edge, chosen per token."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gohgraph.common.checks import check_choice, check_int, there

EDGE_KINDS = ("token", "static", "frozen")
ACTIVATIONS = {"tanh": torch.tanh, None: lambda alpha: alpha}


class EdgeWeights(nn.Module):
    r"""Weights of all edges of a head graph for every round of message passing.

    .. math:: \alpha_e(t) = \tanh(s_e + (W c(t))_e), \qquad W = W_2 W_1 \text{ when } rank = r

    `s` (`bias`) and `W` (`weight`; W_2 when low rank) start at zero, so a new graph sends nothing. `W_1` (`down`) is
    initialised as a linear layer: two zero factors would never open.

    Edges in `scaled` are multiplied by a learned factor, one number for all of them (`learned_scale`).

    Args:
        num_edges: E.
        context_dim: M, the size of the context c(t).
        kind: `"token"` as above; `"static"` keeps only s; `"frozen"` is a fixed random s of variance `scale`², a
            control that is not neutral at the start.
        rank: r >= 1 for a low-rank W, `None` for full rank (a bottleneck of 16 was measured to lose the lasting gain).
        activation: `"tanh"` (bounded) or `None`.
        rounds: R, the number of rounds, each with weights of its own.
        scale: standard deviation of frozen weights.
        scaled: bool `[E]`, the edges that a learned factor multiplies; `None` for none.
        scale_start: start of that factor. At 0 the bias of these edges starts at `scale` instead of 0, so that one of
            the two factors is open.

    Shape:
        context `[*, M]` -> `[*, R, E]`; static and frozen edges ignore the context and give `[R, E]`.

    Example:
        >>> EdgeWeights(num_edges=6, context_dim=5)(torch.randn(2, 3, 5)).shape
        torch.Size([2, 3, 1, 6])
    """

    bias: Tensor
    scaled: Tensor | None

    def __init__(
        self,
        num_edges: int,
        context_dim: int,
        *,
        kind: str = "token",
        rank: int | None = None,
        activation: str | None = "tanh",
        rounds: int = 1,
        scale: float = 1.0,
        scaled: Tensor | None = None,
        scale_start: float = 0.0,
    ) -> None:
        super().__init__()
        check_edge_options(kind, rank, activation, rounds)
        self.num_edges, self.context_dim = num_edges, context_dim
        self.kind, self.rank, self.activation, self.rounds, self.scale = kind, rank, activation, rounds, scale
        self.scale_start = scale_start
        if kind == "frozen":
            self.register_buffer("bias", torch.empty(rounds, num_edges))
        else:
            self.bias = nn.Parameter(torch.empty(rounds, num_edges))
        token = kind == "token"
        width = context_dim if rank is None else rank
        self.weight = nn.Parameter(torch.empty(rounds, num_edges, width)) if token else None
        self.down = nn.Parameter(torch.empty(rounds, rank, context_dim)) if token and rank is not None else None
        self.learned_scale = None if scaled is None else nn.Parameter(torch.empty(1))
        self.register_buffer("scaled", scaled, persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets the neutral start: s = 0, W = 0 (W_2 = 0 and W_1 as a linear layer when low rank)."""
        if self.kind == "frozen":
            nn.init.normal_(self.bias, std=self.scale)
        else:
            nn.init.zeros_(self.bias)
        if self.weight is not None:
            nn.init.zeros_(self.weight)
        if self.down is not None:
            bound = 1.0 / math.sqrt(self.context_dim)
            nn.init.uniform_(self.down, -bound, bound)
        if self.learned_scale is not None:
            nn.init.constant_(self.learned_scale, self.scale_start)
            if self.scale_start == 0 and self.kind != "frozen":
                self.bias.add_(self.scale * there(self.scaled).to(self.bias.device, self.bias.dtype))

    def keep_edges(self, kept: Tensor) -> None:
        """Leaves the weights of the edges of a bool mask `[E]`."""
        self.num_edges = int(kept.sum())
        for name in ("bias", "weight"):
            old = getattr(self, name)
            if old is not None:
                new = old.detach()[:, kept].clone()  # [R, E'] or [R, E', M]
                setattr(self, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
        if self.scaled is not None:
            self.scaled = self.scaled[kept]

    def forward(self, context: Tensor | None = None) -> Tensor:
        """Returns the weights of all rounds and edges for each token of `context`."""
        return self.rescaled(self._activated(context, self.bias, self.weight, self.down), self.learned_scale)

    def rescaled(self, alpha: Tensor, factor: Tensor | None) -> Tensor:
        """Returns alpha `[*, E]` times a factor of one element (`None`: 1) where edges are `scaled`."""
        if factor is None:
            return alpha
        return alpha * torch.where(there(self.scaled), factor, 1.0).to(alpha.dtype)  # [*, E]

    def _activated(
        self, context: Tensor | None, bias: Tensor, weight: Tensor | None, down: Tensor | None
    ) -> Tensor:
        activate = ACTIVATIONS[self.activation]
        if weight is None:
            return activate(bias)
        if context is None or context.shape[-1] != self.context_dim:
            got = "None" if context is None else list(context.shape)
            raise ValueError(
                f"Expected a context of shape [*, {self.context_dim}] (got {got}). Do pass the attention block's input."
            )
        if down is not None:
            low = F.linear(context, down.flatten(0, 1)).unflatten(-1, (self.rounds, -1))  # [*, R, r]
            return activate(torch.einsum("...rk,rek->...re", low, weight) + bias)  # [*, R, E]
        alpha = F.linear(context, weight.reshape(-1, self.context_dim), bias.reshape(-1))  # [*, R*E]
        return activate(alpha).view(*context.shape[:-1], self.rounds, self.num_edges)  # [*, R, E]

    def extra_repr(self) -> str:
        rank = "full" if self.rank is None else self.rank
        return (
            f"num_edges={self.num_edges}, context_dim={self.context_dim}, kind={self.kind!r}, rank={rank}, "
            f"activation={self.activation!r}, rounds={self.rounds}"
        )


def check_edge_options(kind: str, rank: int | None, activation: str | None, rounds: int) -> None:
    """Raises `ValueError` for an impossible combination of edge options."""
    check_choice("edges", kind, EDGE_KINDS)
    check_choice("activation", activation, ACTIVATIONS)
    check_int("rounds", rounds, low=1)
    if rank is None:
        return
    if kind != "token":
        raise ValueError(f"Expected rank=None with {kind!r} edges (got {rank}). Do drop it: they have no matrix W.")
    check_int("rank", rank, low=1)
