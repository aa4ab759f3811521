"""The two objects of a transformer: multi-head attention, in a room of its own, and the feed-forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from gohgraph.attention.block import MultiHeadAttention
from gohgraph.common.checks import check_choice

__all__ = ["FeedForward", "MultiHeadAttention"]


class FeedForward(nn.Module):
    r"""Position-wise feed-forward, FF(x) = W_2 f(W_1 x), or W_2 (silu(W_1 x) * W_3 x) for SwiGLU.

    Sources: Vaswani et al. 2017, equation 2; SwiGLU: Shazeer 2020 (arXiv 2002.05202); squared ReLU: So et al. 2021
    (arXiv 2109.08668).

    Args:
        d_model: M.
        d_ff: inner width F. SwiGLU has three matrices: two thirds of a ReLU's width give equal parameters.
        activation: `"relu"`, `"relu2"` (its square), `"gelu"` (exact) or `"swiglu"`.
        bias: biases in the projections.
        dropout: probability of dropping an inner unit in training.

    Shape:
        x `[*, M]` -> `[*, M]`.

    Example:
        >>> import torch
        >>> FeedForward(8, 21, "swiglu")(torch.randn(2, 3, 8)).shape
        torch.Size([2, 3, 8])
    """

    def __init__(
        self, d_model: int, d_ff: int, activation: str = "gelu", *, bias: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        functions: dict[str, Callable[[Tensor], Tensor]] = {
            "relu": F.relu, "relu2": squared_relu, "gelu": F.gelu, "swiglu": F.silu,
        }  # fmt: skip
        check_choice("activation", activation, functions)
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
        return self.outer(self.dropout(hidden) if self.dropout.training else hidden)

    if TYPE_CHECKING:
        __call__ = forward


def squared_relu(x: Tensor) -> Tensor:
    """Returns max(x, 0)²."""
    return F.relu(x).square()
