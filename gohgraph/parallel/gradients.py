"""Gradients of parameters that lie on ranks in different ways: their mean, their norm, and groups of equal layout."""

from collections.abc import Hashable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from gohgraph.common.checks import there


def layout_of(tensor: Tensor) -> Hashable:
    """What tensors must share to go into one call of an optimizer: all whole, or on one mesh."""
    return tensor.device_mesh if isinstance(tensor, DTensor) else None


def whole(tensor: Tensor) -> Tensor:
    """Returns all of a tensor whose parts may lie on several ranks; all of them call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_as(other: Tensor, tensor: Tensor) -> Tensor:
    """Returns a whole tensor, the same on all ranks, in the parts in which `other` lies on them."""
    if not isinstance(other, DTensor):
        return tensor
    mesh = other.device_mesh
    copies = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return copies.redistribute(mesh, other.placements)


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], largest: float, group: ProcessGroup | None = None) -> Tensor:
    """Scales all gradients so that their norm is at most `largest`, as `torch.nn.utils.clip_grad_norm_`.

    The norm is that of the whole model: parts on several ranks are added, what all ranks hold counts once.

    Args:
        parameters: whole ones, whose gradients are equal on all ranks, `DTensor`s, and plain parts, in any mixture.
        largest: norm above which gradients are scaled.
        group: the ranks that hold plain parts, those parameters that Megatron-Core marks `tensor_model_parallel`;
            `None` where there are none.

    Returns:
        The norm before, the same on all ranks.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_gradients([weight], 1.0).item(), round(weight.grad.norm().item(), 5)
        (5.0, 1.0)
    """
    members: dict[tuple[Hashable, bool], list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            is_part = group is not None and getattr(parameter, "tensor_model_parallel", False)
            members.setdefault((layout_of(parameter.grad), is_part), []).append(parameter)
    norms = [_norm(some, group if is_part else None) for (_, is_part), some in members.items()]
    total = torch.stack(norms).norm() if norms else torch.zeros(())
    for some in members.values():
        clip_grads_with_norm_(some, largest, total)
    return total


def _norm(parameters: list[nn.Parameter], group: ProcessGroup | None) -> Tensor:
    norm = get_total_norm([there(parameter.grad) for parameter in parameters])
    if group is not None:
        square = norm.square()
        dist.all_reduce(square, group=group)
        return square.sqrt()
    return whole(norm)


def average_gradients(parameters: Iterable[nn.Parameter], group: ProcessGroup) -> None:
    """Takes the mean of gradients over the data-parallel ranks of `group`, in one call."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if group.size() == 1 or not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=group)
    parts = (flat / group.size()).split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
