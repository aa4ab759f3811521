"""Counting the bytes that ranks send each other."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode

functional, direct = torch.ops._c10d_functional, torch.ops.c10d


class Traffic(TorchDispatchMode):
    """Counts the bytes that this rank sends in the collectives inside, forward and backward.

    Sizes are those of the very tensors handed to the collectives, over the ranks of their group. What a rank sends of
    them is that of ring algorithms, the least there is: (n-1)/n of the whole for an all-gather or a reduce-scatter,
    twice that for an all-reduce. What C++ sends unseen, DDP's buckets among it, is not in it.

    Attributes:
        bytes: sent by this rank, by kind of collective.
        calls: collectives, by kind.

    Example:
        >>> with Traffic() as traffic:
        ...     _ = torch.ones(3) + 1
        >>> traffic.total
        0
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Bytes sent in all collectives."""
        return round(sum(self.bytes.values()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A DTensor takes its operation apart first; the collectives inside come here again.
        if any(issubclass(kind, torch.distributed.tensor.DTensor) for kind in types):
            return NotImplemented
        packet = getattr(func, "_overloadpacket", None)
        if packet in COLLECTIVES:
            kind, measure = COLLECTIVES[packet]
            whole, ranks = measure(*args)
            rounds = 2 if kind == "all-reduce" else 1
            self.bytes[kind] += rounds * whole * (ranks - 1) / ranks
            self.calls[kind] += 1
        elif packet in OTHERS:
            raise NotImplementedError(f"Expected a collective that is counted (got {func}). Do add it to COLLECTIVES.")
        return func(*args, **(kwargs or {}))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _gathered(part: Tensor, ranks: int, *_: Any) -> tuple[int, int]:
    return _size(part) * ranks, ranks


def _scattered(whole: Tensor, operation: str, ranks: int, *_: Any) -> tuple[int, int]:
    return _size(whole), ranks


def _reduced(value: Tensor, operation: str, group: Any) -> tuple[int, int]:
    ranks = group if hasattr(group, "size") else distributed_c10d._resolve_process_group(group)
    return _size(value), ranks.size()


def _base_gathered(whole: Tensor, part: Tensor, *_: Any) -> tuple[int, int]:
    return _size(whole), whole.numel() // max(1, part.numel())


def _base_scattered(part: Tensor, whole: Tensor, *_: Any) -> tuple[int, int]:
    return _size(whole), whole.numel() // max(1, part.numel())


def _all_reduced(values: list[Tensor], group: Any, *_: Any) -> tuple[int, int]:
    return sum(map(_size, values)), torch.distributed.ProcessGroup.unbox(group).size()


COLLECTIVES: dict[Any, tuple[str, Callable[..., tuple[int, int]]]] = {
    functional.all_gather_into_tensor: ("all-gather", _gathered),
    functional.reduce_scatter_tensor: ("reduce-scatter", _scattered),
    functional.all_reduce: ("all-reduce", _reduced),
    direct._allgather_base_: ("all-gather", _base_gathered),
    direct._reduce_scatter_base_: ("reduce-scatter", _base_scattered),
    direct.allreduce_: ("all-reduce", _all_reduced),
}
# Those that nothing here calls.
OTHERS = {
    functional.all_gather_into_tensor_coalesced,
    functional.all_reduce_coalesced,
    functional.all_to_all_single,
    functional.broadcast,
    functional.reduce_scatter_tensor_coalesced,
    direct.allgather_,
    direct.alltoall_base_,
    direct.broadcast_,
    direct.reduce_scatter_,
}
