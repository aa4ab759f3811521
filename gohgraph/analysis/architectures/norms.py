"""The linear part of a norm: what it does to one of the parts of its input while its scale stays as it was."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

# Far above any epsilon inside a norm's square root, and within float16.
AMPLITUDE = 1e2


class Gain(NamedTuple):
    r"""A norm as a linear map times a scale of the token: norm(x) = s(x) * gain * (x - centred * mean(x)) + bias.

    Args:
        weight: `[M]`.
        centred: it subtracts the mean over features (LayerNorm), or not (RMSNorm).
    """

    weight: Tensor
    centred: bool

    def __call__(self, parts: Tensor) -> Tensor:
        """Returns parts `[*, M]` times the gain, without the scale."""
        return self.weight * (parts - parts.mean(dim=-1, keepdim=True) if self.centred else parts)

    def into(self, weight: Tensor) -> Tensor:
        """Returns a weight `[..., M]` that reads through the norm, with the gain folded in."""
        folded = weight * self.weight
        return folded - folded.mean(dim=-1, keepdim=True) if self.centred else folded


def gain_of(norm: nn.Module, width: int) -> Gain:
    """Returns the linear part of a norm, found by asking it: whatever its parameters are called and mean (w, or 1 + w).

    Example:
        >>> gain = gain_of(torch.nn.RMSNorm(3, eps=1e-6), 3)
        >>> gain.weight.round(decimals=4).tolist(), gain.centred
        ([1.0, 1.0, 1.0], False)
        >>> gain_of(torch.nn.LayerNorm(4), 4).centred
        True
    """
    parameter = next(iter(norm.parameters()), torch.empty(0))
    make = {"dtype": parameter.dtype, "device": parameter.device}
    signs = torch.ones(width, **make)
    signs[1::2] = -1
    if width % 2:
        # The mean has to be zero.
        signs[-3:] = torch.tensor([1.0, 1.0, -2.0], **make)
    with torch.no_grad():
        ones, probe = torch.ones_like(signs), AMPLITUDE * signs
        # Differences take biases away. Calls of `forward`, which no hook sees.
        flat = norm.forward(AMPLITUDE * ones) - norm.forward(-AMPLITUDE * ones)
        size = signs.square().mean().sqrt()
        weight = (norm.forward(probe) - norm.forward(-probe)) / 2 * size / signs
    return Gain(weight, bool(flat.abs().max() <= 1e-3 * weight.abs().max()))


def scale_of(norm: nn.Module, x: Tensor, gain: Gain) -> Tensor:
    """Returns s(x) of a norm for tokens `x [*, M]` -> `[*, 1]`."""
    with torch.no_grad():
        linear = gain(x)  # [*, M]
        result = norm.forward(x) - norm.forward(torch.zeros_like(x[..., :1, :]))
        power = linear.square().sum(dim=-1, keepdim=True)
        return (result * linear).sum(dim=-1, keepdim=True) / power.clamp(min=torch.finfo(power.dtype).tiny)
