"""Token and positional encodings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gohgraph.models.config import TransformerConfig
from gohgraph.models.sublayers import NORMS


class SinusoidalPositions(nn.Module):
    r"""Fixed sinusoidal positions, added to the embedding (Vaswani et al. 2017, section 3.5).

    .. math:: p_{2i}(t) = \sin(t\, 10000^{-2i/M}), \qquad p_{2i+1}(t) = \cos(t\, 10000^{-2i/M})

    Args:
        d_model: M, any positive width.

    Shape:
        positions `[B, T]` or `[T]` (integers) -> `[..., T, M]`.

    Example:
        >>> SinusoidalPositions(4)(torch.arange(2))[0].tolist()
        [0.0, 1.0, 0.0, 1.0]
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model

    def forward(self, positions: Tensor) -> Tensor:
        """Returns the encodings of integer positions."""
        pairs = torch.arange(0, self.d_model, 2, device=positions.device, dtype=torch.float32)  # [ceil(M/2)]
        angles = positions.unsqueeze(-1) * torch.exp(-math.log(10000.0) * pairs / self.d_model)  # [..., T, ceil(M/2)]
        waves = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)  # [..., T, 2*ceil(M/2)]
        return waves[..., : self.d_model]


class LearnedPositions(nn.Embedding):
    """Learned positions, added to the embedding.

    Args:
        max_length: number of positions.
        d_model: M.

    Example:
        >>> LearnedPositions(10, 4)(torch.arange(3)).shape
        torch.Size([3, 4])
    """

    def __init__(self, max_length: int, d_model: int) -> None:
        super().__init__(max_length, d_model)
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, positions: Tensor) -> Tensor:
        """Returns the encodings of integer positions `[..., T]` as `[..., T, M]`."""
        if positions.shape[-1] > self.num_embeddings:
            raise ValueError(
                f"Expected at most {self.num_embeddings} tokens with learned positions (got {positions.shape[-1]}). "
                "Do raise max_length, or use rotary positions."
            )
        return super().forward(positions)


class Rotation(NamedTuple):
    """What `RotaryPositions` turns heads by at some positions; the layers of a stack share one.

    Args:
        positions: `[T]` or `[B, T]`.
        cos, sin: of all angles, `[T, 1, D/2]` or `[B, T, 1, D/2]`, in float32.
        head_dim, base: of the `RotaryPositions` that it is for.
    """

    positions: Tensor
    cos: Tensor
    sin: Tensor
    head_dim: int
    base: float


class RotaryPositions(nn.Module):
    r"""Rotary positions on queries and keys (Su et al. 2021, arXiv 2104.09864), in the half-split layout of Llama.

    .. math:: \mathrm{rot}(x, t) = x \cos(t\theta) + (-x_{D/2:},\, x_{:D/2}) \sin(t\theta), \qquad
        \theta_i = base^{-2i/D}

    Args:
        head_dim: D, even.
        base: the longest wavelength over 2 pi.

    Shape:
        x `[B, T, H, D]`, positions `[T]` or `[B, T]`, or their `Rotation` -> `[B, T, H, D]`.

    Example:
        >>> x = torch.randn(1, 3, 2, 4)
        >>> rotated = RotaryPositions(4)(x, torch.arange(3))
        >>> torch.equal(rotated[:, 0], x[:, 0]), torch.allclose(rotated.norm(dim=-1), x.norm(dim=-1))
        (True, True)
    """

    def __init__(self, head_dim: int, base: float = 10000.0) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"Expected an even head_dim (got {head_dim}). Do change d_model or num_heads.")
        self.head_dim, self.base = head_dim, base

    def rotation(self, positions: Tensor | Rotation) -> Rotation:
        """Returns the rotation by these positions; one that was made for a module like this is returned as it is."""
        if isinstance(positions, Rotation):
            if (positions.head_dim, positions.base) == (self.head_dim, self.base):
                return positions
            positions = positions.positions
        half = torch.arange(0, self.head_dim, 2, device=positions.device, dtype=torch.float32)  # [D/2]
        # Angles stay in float32: bfloat16 cannot tell positions past 256 apart.
        angles = positions.unsqueeze(-1).float() * self.base ** (-half / self.head_dim)  # [*, T, D/2]
        cos, sin = angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2)  # [*, T, 1, D/2] each
        return Rotation(positions, cos, sin, self.head_dim, self.base)

    def forward(self, x: Tensor, positions: Tensor | Rotation) -> Tensor:
        """Rotates the features of every head by its token's position."""
        rotation = self.rotation(positions)
        cos, sin = rotation.cos.to(x.dtype), rotation.sin.to(x.dtype)  # [*, T, 1, D/2] each
        first, second = x.chunk(2, dim=-1)  # [B, T, H, D/2] each
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)  # [B, T, H, D]


class QueryKeyNorm(nn.Module):
    r"""Normalised queries and keys of every head, before rotary positions, so that scores stay bounded.

    .. math:: \mathrm{norm}(x) = \gamma \odot x / \sqrt{\tfrac{1}{D} \textstyle\sum_d x_d^2 + \epsilon}

    One gain serves queries and keys of all heads of a layer: scores know only the product of both. Where it starts at
    g, scores start within g^2 sqrt(D) of 0.

    Sources: Henry et al. 2020 (arXiv 2010.04245); Dehghani et al. 2023 (arXiv 2302.05442), section 2.

    Args:
        head_dim: D.
        rotary: `RotaryPositions`, or `None`.
        gain: that all features start with.

    Shape:
        x `[B, T, H, D]`, positions `[T]` or `[B, T]` -> `[B, T, H, D]`.

    Example:
        >>> QueryKeyNorm(4)(3 * torch.ones(1, 2, 1, 4)).flatten().tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """

    def __init__(self, head_dim: int, rotary: nn.Module | None = None, gain: float = 1.0) -> None:
        super().__init__()
        self.norm, self.rotary = nn.RMSNorm(head_dim), rotary
        nn.init.constant_(self.norm.weight, gain)

    def rotation(self, positions: Tensor | Rotation) -> Tensor | Rotation:
        """Returns the rotation by these positions; without rotary positions, these."""
        return self.rotary.rotation(positions) if isinstance(self.rotary, RotaryPositions) else positions

    def forward(self, x: Tensor, positions: Tensor | Rotation | None = None) -> Tensor:
        """Normalises the features of every head and rotates them by their token's position."""
        # In the gain's precision: under autocast x has fewer digits.
        x = self.norm(x.to(self.norm.weight.dtype)).to(x.dtype)
        return x if self.rotary is None else self.rotary(x, positions)


class TokenEmbedding(nn.Module):
    r"""Token embedding with added positions: e(t) = E[token] sqrt(M)^s + p(t), s = 1 for sinusoidal positions.

    The factor sqrt(M) is that of Vaswani et al. 2017 (section 3.4); with other positions there is none. With
    `embedding_norm` e(t) is normalised by the layers' own kind of norm.

    Args:
        config: `vocab_size`, `d_model`, `positions`, `max_length`, `norm`, `embedding_norm` and `dropout` are used.

    Shape:
        tokens `[B, T]`, positions `[T]` or `[B, T]` -> `[B, T, M]`.

    Example:
        >>> embedding = TokenEmbedding(TransformerConfig(vocab_size=7, d_model=8, num_heads=2))
        >>> embedding(torch.tensor([[1, 2]]), torch.arange(2)).shape
        torch.Size([1, 2, 8])
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        # A linear map where the inputs are no tokens, as patches of images.
        self.tokens: nn.Embedding | nn.Linear = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = positions_added(config)
        self.scale = math.sqrt(config.d_model) if config.positions == "sinusoidal" else 1.0
        # Scaled back, so that the scaled embedding has unit variance beside the positions' and tied logits stay small.
        nn.init.normal_(self.tokens.weight, std=0.02 if self.scale == 1.0 else config.d_model**-0.5)
        self.norm = NORMS[config.norm](config.d_model, eps=1e-5) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Returns the embedded tokens."""
        x = self.tokens(tokens)
        x = x if self.scale == 1.0 else x * self.scale
        if self.positions is not None:
            x = x + self.positions(positions).to(x.dtype)
        x = self.norm(x)
        return self.dropout(x) if self.dropout.training else x


def positions_of_heads(config: TransformerConfig, *, cross: bool = False) -> nn.Module | None:
    """Returns what queries and keys of every head go through; cross attention has no rotary positions."""
    rotary = RotaryPositions(config.head_dim) if config.positions == "rotary" and not cross else None
    return QueryKeyNorm(config.head_dim, rotary, config.qk_norm) if config.qk_norm else rotary


def shared_rotation(rotaries: Sequence[nn.Module | None], positions: Tensor | None) -> Tensor | Rotation | None:
    """Returns the rotation that the layers of a stack share, of what each has as `rotary`; else the positions.

    Angles are computed once a forward pass, in place of twice a layer: in decode that is a sixth of all calls.
    """
    first = rotaries[0] if rotaries else None
    if positions is None or not isinstance(first, (RotaryPositions, QueryKeyNorm)):
        return positions
    if not all(isinstance(rotary, (RotaryPositions, QueryKeyNorm)) for rotary in rotaries):
        return positions
    return first.rotation(positions)


def positions_added(config: TransformerConfig) -> nn.Module | None:
    """Returns the module whose encodings are added to the embedding; `None` with rotary positions or none."""
    if config.positions == "sinusoidal":
        return SinusoidalPositions(config.d_model)
    return LearnedPositions(config.max_length, config.d_model) if config.positions == "learned" else None
