"""Gradients of parameters that lie on ranks in different ways: their norm, and groups of equal layout."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def layout_of(tensor: Tensor) -> Hashable:
    """What tensors must share to go into one call of an optimizer: all whole, or on one mesh."""
    return tensor.device_mesh if isinstance(tensor, DTensor) else None


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
    """Scales all gradients so that their norm is at most `largest`, as `torch.nn.utils.clip_grad_norm_`.

    Args:
        parameters: whole ones, whose gradients are equal on all ranks, and `DTensor`s, in any mixture.
        largest: norm above which gradients are scaled.

    Returns:
        The norm before, the same on all ranks.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_gradients([weight], 1.0).item(), round(weight.grad.norm().item(), 5)
        (5.0, 1.0)
    """
    groups: dict[Hashable, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            groups.setdefault(layout_of(parameter.grad), []).append(parameter)
    norms = [get_total_norm([parameter.grad for parameter in group]) for group in groups.values()]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = torch.stack(whole).norm() if whole else torch.zeros(())
    for group in groups.values():
        clip_grads_with_norm_(group, largest, total)
    return total
