"""Residual connections with more than one way through: several streams, or all earlier layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gohgraph.models.sublayers import Residual

# n, the streams of the published models; k, inner units of dense connections for every sender.
STREAMS, UNITS_A_SENDER = 4, 4


class StreamWeights(nn.Module):
    r"""What a sublayer reads of n streams, keeps of them, and adds to each.

    .. math::
        A(H) &= A + s_A \tanh\big(\mathrm{norm}(H)\, W_A\big), \qquad
        b(H) = b + s_b \tanh\big(\mathrm{norm}(H)\, w_b\big)

    A `[n, 1 + n]` has the weights of reading in its first column and of keeping in the others, b `[n]` of adding.
    They start at A = (e_k, I) and b = 1, W_A and w_b at zero, s_A and s_b at 0.01. Static ones have A and b alone.

    Args:
        d_model, streams: M and n.
        place: the sublayer's index k in its stack; at the start it reads stream k mod n.
        dynamic: the weights depend on the token.
    """

    def __init__(self, d_model: int, place: int, *, dynamic: bool, streams: int = STREAMS) -> None:
        super().__init__()
        self.place, self.streams = place, streams
        self.mix, self.add = nn.Parameter(torch.empty(streams, 1 + streams)), nn.Parameter(torch.empty(streams))
        self.mix_of = nn.Parameter(torch.empty(1 + streams, d_model)) if dynamic else None
        self.add_of = nn.Parameter(torch.empty(d_model)) if dynamic else None
        self.scales = nn.Parameter(torch.empty(2)) if dynamic else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets the neutral start: n equal streams go through the sublayer as one does."""
        nn.init.zeros_(self.mix)
        self.mix[self.place % self.streams, 0] = 1
        self.mix[:, 1:].fill_diagonal_(1)
        nn.init.ones_(self.add)
        if self.mix_of is not None and self.add_of is not None and self.scales is not None:
            nn.init.zeros_(self.mix_of)
            nn.init.zeros_(self.add_of)
            nn.init.constant_(self.scales, 0.01)

    def forward(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns, for `[*, n, M]`, the weights of reading `[*, n]`, keeping `[*, n, n]` (rows send) and adding."""
        mix: Tensor = self.mix
        add: Tensor = self.add
        if self.mix_of is not None and self.add_of is not None and self.scales is not None:
            normed = F.layer_norm(streams, streams.shape[-1:])  # [*, n, M]
            mix = mix + self.scales[0] * F.linear(normed, self.mix_of).tanh()  # [*, n, 1 + n]
            add = add + self.scales[1] * (normed @ self.add_of).tanh()  # [*, n]
        return mix[..., 0], mix[..., 1:], add


class HyperConnection(Residual):
    r"""A sublayer between n residual streams: it reads a weighted sum of them, which they also exchange.

    .. math::
        y = f\big(\mathrm{norm}(\textstyle\sum_j a_j h_j)\big), \qquad
        h_i' = \textstyle\sum_j A_{ji} h_j + b_i\, \mathrm{drop}(y)

    At its start, n equal streams stay equal, and each is a pre-norm residual connection.

    Source: hyper-connections (arXiv 2409.19606, equations 2 to 5 and 11 to 14). Differs: a stack takes the mean of the
    streams in the end, there their sum: the last norm makes no difference between them.

    Args:
        object, d_model, norm, dropout: as in `Residual`, pre-norm.
        place, dynamic: as in `StreamWeights`.

    Shape:
        streams `[B, T, n, M]` -> `[B, T, n, M]`, or a pair with what the object returned beside y.

    Example:
        >>> sublayer = HyperConnection(nn.Identity(), 6, place=1, dynamic=True)
        >>> x = torch.randn(2, 3, 6)
        >>> streams = sublayer(x.unsqueeze(2).expand(-1, -1, 4, -1))
        >>> bool((streams - Residual(nn.Identity(), 6)(x).unsqueeze(2)).abs().max() < 1e-5)
        True
    """

    def __init__(
        self, object: nn.Module, d_model: int, *, place: int, dynamic: bool, norm: str = "layer", dropout: float = 0.0
    ) -> None:
        super().__init__(object, d_model, norm=norm, dropout=dropout)
        self.weights = StreamWeights(d_model, place, dynamic=dynamic)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Applies the object between the streams `x`; further arguments go to the object."""
        reads, keeps, adds = self.weights(x)
        result = self.object(self.norm((reads.unsqueeze(-1) * x).sum(-2)), *args, **kwargs)
        y, extra = result if isinstance(result, tuple) else (result, None)
        kept = keeps.transpose(-1, -2) @ x  # [B, T, n, M]
        x = kept + adds.unsqueeze(-1) * self.dropout(y).unsqueeze(-2)
        return x if extra is None else (x, extra)


class DenseConnection(nn.Module):
    r"""What a layer gets beside the residual stream: the inputs of all layers before it, weighed by the token.

    .. math::
        x_l' = x_l + s \sum_{j < l} \alpha_j\, x_j, \qquad
        \alpha = a + W_2\, \mathrm{gelu}\big(W_1\, \mathrm{norm}(x_l)\big)

    x_0 is the embedding. W_2 and a start at zero and s at 0.1: a new one changes nothing.

    Source: the residual stream of MUDD connections (arXiv 2502.12170, section 2), whose reduced form in modded-nanogpt
    (April 2026) stands before the last two layers only and learns s. Differs: senders are all inputs of layers before.

    Args:
        d_model: M.
        senders: l >= 1.

    Shape:
        x `[B, T, M]`, l tensors `[B, T, M]` -> `[B, T, M]`.

    Example:
        >>> x, first = torch.randn(2, 3, 6), torch.randn(2, 3, 6)
        >>> torch.equal(DenseConnection(6, senders=1)(x, [first]), x)
        True
    """

    def __init__(self, d_model: int, senders: int) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.empty(UNITS_A_SENDER * (senders + 1), d_model))
        self.outer = nn.Parameter(torch.empty(senders, len(self.inner)))
        self.bias, self.scale = nn.Parameter(torch.empty(senders)), nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the neutral start; W_1 is drawn with sd 1/sqrt(M)."""
        nn.init.normal_(self.inner, std=self.inner.shape[1] ** -0.5)
        nn.init.zeros_(self.outer)
        nn.init.zeros_(self.bias)
        nn.init.constant_(self.scale, 0.1)

    def forward(self, x: Tensor, earlier: Sequence[Tensor]) -> Tensor:
        """Adds the inputs `earlier` of the layers before, the first one's first."""
        hidden = F.gelu(F.linear(F.rms_norm(x, x.shape[-1:]), self.inner))  # [B, T, K]
        weights = self.scale * F.linear(hidden, self.outer, self.bias)  # [B, T, l]
        return x + torch.einsum("btl,btlm->btm", weights, torch.stack(tuple(earlier), dim=2))


class ResidualPath(nn.Module):
    """How a stack carries tokens from layer to layer: what `TransformerConfig.residual` names.

    Args:
        residual: `"plain"`, `"hyper"`, `"dynamic-hyper"` or `"dense"`.
        d_model, num_layers: of the stack.
    """

    def __init__(self, residual: str, d_model: int, num_layers: int) -> None:
        super().__init__()
        self.residual = residual
        dense = range(max(1, num_layers - 2), num_layers) if residual == "dense" else ()
        self.connections = nn.ModuleDict({str(layer): DenseConnection(d_model, layer) for layer in dense})

    @property
    def has_streams(self) -> bool:
        """Whether n streams stand for one."""
        return self.residual in ("hyper", "dynamic-hyper")

    def enter(self, x: Tensor) -> Tensor:
        """Returns what the first layer gets of the embedding `[B, T, M]`: itself, or n times, `[B, T, n, M]`."""
        return x.unsqueeze(2).expand(-1, -1, STREAMS, -1) if self.has_streams else x

    def before(self, layer: int, x: Tensor, inputs: list[Tensor]) -> Tensor:
        """Returns what the layer of that index gets; `inputs` are those of the layers before, and takes in its own."""
        if not self.connections:
            return x
        earlier = tuple(inputs)
        inputs.append(x)
        return self.connections[str(layer)](x, earlier) if str(layer) in self.connections else x

    def leave(self, x: Tensor) -> Tensor:
        """Returns what the last norm gets, `[B, T, M]`."""
        return x.mean(dim=2) if self.has_streams else x
