"""What crosses tensor-parallel ranks, forward and backward: linear maps and their adjoints over a process group.

They run on any device and leave their inputs alone. Megatron-Core's own mappings allocate on the current CUDA device,
and its all-reduce of a gradient that is not contiguous reduces a copy. Over one rank all of them return their input.
"""

from collections.abc import Callable
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Partial

HEADS = -2


def sum_gradients(value: Tensor, group: ProcessGroup) -> Tensor:
    """The same value; backward adds the gradients of all ranks: for what all hold and each uses for its heads only."""
    return _apply(value, group, 0, _same, _all_reduce)


def gather_heads(heads: Tensor, group: ProcessGroup) -> Tensor:
    """All-gathers `[*, b, D]` of every rank to `[*, n*b, D]`; backward is one reduce-scatter."""
    return _apply(heads, group, HEADS, _all_gather, _reduce_scatter)


def scatter_heads(sums: Tensor, group: ProcessGroup) -> Tensor:
    """Adds `[*, n*c, D]` over ranks, each of which keeps its own `[*, c, D]`; backward is one all-gather."""
    return _apply(sums, group, HEADS, _reduce_scatter, _all_gather)


def own_part(value: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """This rank's equal part of what all ranks hold; backward is one all-gather."""
    return _apply(value, group, dim, _part, _all_gather)


def gather_parts(part: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """The whole of equal parts, for work that all ranks do alike: backward takes this rank's part of the gradient."""
    return _apply(part, group, dim, _all_gather, _part)


@overload
def local(value: Tensor) -> Tensor: ...


@overload
def local(value: None) -> None: ...


def local(value: Tensor | None) -> Tensor | None:
    """The part of a tensor on this rank; of an input of all ranks, each rank's gradient is one summand."""
    if not isinstance(value, DTensor):
        return value
    return value.to_local(grad_placements=[Partial() if place.is_replicate() else place for place in value.placements])


Step = Callable[[Tensor, ProcessGroup, int], Tensor]


def _apply(value: Tensor, group: ProcessGroup, dim: int, forward: Step, backward: Step) -> Tensor:
    return value if group.size() == 1 else _Collective.apply(value, group, dim, forward, backward)


class _Collective(torch.autograd.Function):
    """One step forward, its adjoint backward."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: ProcessGroup, dim: int, forward: Step, backward: Step) -> Tensor:
        ctx.group, ctx.dim, ctx.step = group, dim, backward
        return forward(value, group, dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.step(gradient, ctx.group, ctx.dim), None, None, None, None


def _same(value: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    return value.view_as(value)


def _part(value: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    return value.chunk(group.size(), dim)[group.rank()].contiguous()


def _all_reduce(value: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    total = value.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _all_gather(part: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    parts = part.new_empty(group.size() * part.shape[0], *part.shape[1:])  # one behind the other along dimension 0
    dist.all_gather_into_tensor(parts, part.contiguous(), group=group)
    return torch.cat(parts.chunk(group.size()), dim)


def _reduce_scatter(value: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    parts = torch.cat(value.chunk(group.size(), dim))  # one behind the other along dimension 0
    total = parts.new_empty(parts.shape[0] // group.size(), *parts.shape[1:])
    dist.reduce_scatter_tensor(total, parts, group=group)
    return total
