"""What crosses tensor-parallel ranks, forward and backward.

Megatron-Core's own mappings allocate on the current CUDA device, and its all-reduce of a gradient that is not
contiguous reduces a copy: these run on any device and leave their inputs alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def copy_to_ranks(x: Tensor, group: Any) -> Tensor:
    """Returns `x`, equal on all ranks, for work of which every rank does a part: the gradients of all are added."""
    return x if group.size() == 1 else _Copy.apply(x, group)


def gather_heads(z: Tensor, group: Any) -> Tensor:
    """Returns the heads `[*, n*K, D]` of all n ranks, of `z [*, K, D]` of each; their gradients are added."""
    return z if group.size() == 1 else _GatherHeads.apply(z, group)


def own_heads(gates: Tensor, group: Any) -> Tensor:
    """Returns this rank's part `[*, H/n]` of `gates [*, H]`, which all ranks hold; each gets the whole gradient."""
    return gates if group.size() == 1 else _OwnHeads.apply(gates, group)


def gather_sequence(x: Tensor, group: Any) -> Tensor:
    """Returns all tokens `[s, b, M]` of the ranks' parts `[s/n, b, M]`; what follows is equal on all ranks."""
    return x if group.size() == 1 else _GatherSequence.apply(x, group)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _GatherHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return torch.cat(_all_gather(z, group), dim=-2)  # [*, n*K, D]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        parts = [part.contiguous() for part in grad.chunk(ctx.group.size(), dim=-2)]  # n of [*, K, D]
        total = torch.empty_like(parts[0])
        dist.reduce_scatter(total, parts, group=ctx.group)
        return total, None


class _OwnHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return gates.chunk(group.size(), dim=-1)[group.rank()].contiguous()  # [*, H/n]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.cat(_all_gather(grad, ctx.group), dim=-1), None  # [*, H]


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return torch.cat(_all_gather(x, group), dim=0)  # [s, b, M]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.chunk(ctx.group.size(), dim=0)[ctx.group.rank()].contiguous(), None  # [s/n, b, M]


def _all_gather(x: Tensor, group: Any) -> list[Tensor]:
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x, group=group)
    return parts
