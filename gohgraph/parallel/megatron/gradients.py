"""Gradients of a Megatron-Core model for a torch optimizer: mean over data parallel ranks, norm over all parts."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def average_gradients(model: nn.Module, group: Any) -> None:
    """Takes the mean of gradients over the data-parallel ranks of `group`, in one call."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if group.size() == 1 or not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=group)
    parts = (flat / group.size()).split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def clip_gradients(model: nn.Module, most: float, group: Any) -> Tensor:
    """Scales gradients to a norm of at most `most`, and returns the norm they had.

    The norm is that of the whole model: parts of a parameter on the tensor-parallel ranks of `group` are added, and
    what every rank holds whole counts once.

    Args:
        model: of Megatron-Core, after the backward pass and `average_gradients`.
        most: largest norm.
        group: the tensor-parallel ranks.
    """
    gradients = [(parameter, parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
    squares = torch.zeros(2, device=gradients[0][1].device)  # of what all hold, of parts
    for parameter, gradient in gradients:
        squares[int(getattr(parameter, "tensor_model_parallel", False))] += gradient.float().square().sum()
    dist.all_reduce(squares[1], group=group)
    norm = squares.sum().sqrt()
    factor = (most / (norm + 1e-6)).clamp(max=1.0)
    for _, gradient in gradients:
        gradient.mul_(factor)
    return norm
