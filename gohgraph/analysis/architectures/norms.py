"""The linear part of a norm: what it does to one of the parts of its input while its scale stays as it was."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

# Far above any epsilon inside a norm's square root; 1e2 is within float16.
AMPLITUDE, AMPLITUDE_OF_DOUBLE = 1e2, 1e5


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
    signs = torch.ones(width, dtype=parameter.dtype, device=parameter.device)
    signs[1::2] = -1
    if width % 2:
        # The mean has to be zero.
        signs[-3:] = torch.tensor([1.0, 1.0, -2.0]).to(signs)
    with torch.no_grad():
        size = AMPLITUDE_OF_DOUBLE if signs.dtype == torch.float64 else AMPLITUDE
        flat, probe = size * torch.ones_like(signs), size * signs
        # Differences take biases away. Calls of `forward`, which no hook sees.
        flat = norm.forward(flat) - norm.forward(-flat)
        length = signs.square().mean().sqrt()
        weight = (norm.forward(probe) - norm.forward(-probe)) / 2 * length / signs
    return Gain(weight, bool(flat.abs().max() <= 1e-3 * weight.abs().max()))


def scale_of(norm: nn.Module, x: Tensor, gain: Gain) -> Tensor:
    """Returns s(x) of a norm for tokens `x [*, M]` -> `[*, 1]`."""
    with torch.no_grad():
        linear = gain(x)  # [*, M]
        result = norm.forward(x) - norm.forward(torch.zeros_like(x[..., :1, :]))
        power = linear.square().sum(dim=-1, keepdim=True)
        return (result * linear).sum(dim=-1, keepdim=True) / power.clamp(min=torch.finfo(power.dtype).tiny)


def pulled_back(gain: Gain, scale: Tensor, x: Tensor, slopes: Tensor) -> Tensor:
    r"""Returns J^T v of s(x) * gain(x) where s(x) is one over a root of the mean square, as LayerNorm's and RMSNorm's.

    .. math:: J^T v = s\, (w v - s^2 c\, \langle c, w v \rangle / M), \qquad c = x \text{ or } x - \mathrm{mean}(x)

    Args:
        scale: `[N, 1]`, of `scale_of`; x: `[N, M]`.
        slopes: v, `[R, N, M]`, which are overwritten.
    """
    centred = x - x.mean(dim=-1, keepdim=True) if gain.centred else x
    weighed = slopes.to(torch.promote_types(slopes.dtype, gain.weight.dtype)).mul_(gain.weight)  # [R, N, M]
    along = torch.einsum("rnm,nm->rn", weighed, centred).unsqueeze(-1) * scale.square() / x.shape[-1]  # [R, N, 1]
    if gain.centred:
        weighed -= weighed.mean(dim=-1, keepdim=True)
    return weighed.addcmul_(along, centred, value=-1).mul_(scale)
