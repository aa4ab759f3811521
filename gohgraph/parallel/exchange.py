"""Which heads have to travel between the ranks that hold them, and by which collective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

NOTHING, GATHER, SCATTER = "nothing", "all-gather", "reduce-scatter"


@dataclass(frozen=True)
class Exchange:
    """What the ranks of a tensor-parallel group tell each other in one round of messages.

    Head i lives on rank i // h, h = H / ranks. With `"all-gather"` every rank sends the outputs of those of its heads
    that have a receiver elsewhere; with `"reduce-scatter"` it sends, for every head elsewhere that it has senders of,
    the sum of their messages. All ranks send equally many heads: those with fewer fill up.

    Args:
        num_heads: H.
        ranks: n, a divisor of H.
        kind: `"nothing"`, `"all-gather"` or `"reduce-scatter"`.
        heads: of every rank, the global indices of its heads that travel, equally many a rank.

    Example:
        >>> edges = [(0, 0), (0, 2), (0, 3), (1, 0)]
        >>> plan_exchange(4, 2, edges)
        Exchange(num_heads=4, ranks=2, kind='all-gather', heads=((0,), (2,)))
    """

    num_heads: int
    ranks: int
    kind: str = NOTHING
    heads: tuple[tuple[int, ...], ...] = ()

    @property
    def per_rank(self) -> int:
        """h, the heads of a rank."""
        return self.num_heads // self.ranks

    @property
    def width(self) -> int:
        """Heads that a rank sends, 0 where nothing travels."""
        return len(self.heads[0]) if self.heads else 0

    @property
    def order(self) -> list[int]:
        """Global indices of the heads in the order in which they lie behind a collective, rank after rank."""
        return [head for own in self.heads for head in own]

    def edges_of_ranks(self, edges: Sequence[tuple[int, int]]) -> list[list[int]]:
        """The indices of the (sender, receiver) edges that each rank computes: those into its heads, or out of them."""
        side = 0 if self.kind == SCATTER else 1
        owners = [edge[side] // self.per_rank for edge in edges]
        return [[e for e, owner in enumerate(owners) if owner == rank] for rank in range(self.ranks)]

    def of(self, rank: int) -> range:
        """The heads of a rank."""
        return range(rank * self.per_rank, (rank + 1) * self.per_rank)


def plan_exchange(
    num_heads: int, ranks: int, edges: Sequence[tuple[int, int]], *, may_scatter: bool = True
) -> Exchange:
    """Chooses the cheaper collective for (sender, receiver) edges: the one that moves fewer heads; all-gather in a tie.

    Args:
        num_heads: H, a multiple of `ranks`.
        ranks: n.
        edges: pairs of global head indices.
        may_scatter: False where partial sums do not do (queries and keys, edges that compete for their receiver).

    Raises:
        ValueError: the ranks cannot have equally many heads.

    Example:
        >>> plan_exchange(4, 2, [(0, 3), (1, 3), (2, 3)]).kind
        'reduce-scatter'
        >>> plan_exchange(4, 2, [(0, 1), (3, 2)]).kind
        'nothing'
    """
    if ranks < 1 or num_heads % ranks:
        raise ValueError(f"Expected ranks to divide {num_heads} heads (got {ranks}). Do change either.")
    per_rank = num_heads // ranks
    crossing = [(j, i) for j, i in edges if j // per_rank != i // per_rank]
    if not crossing:
        return Exchange(num_heads, ranks)
    senders = _by_rank({j for j, _ in crossing}, ranks, per_rank)
    receivers = _by_rank({i for _, i in crossing}, ranks, per_rank)
    scatter = may_scatter and len(receivers[0]) < len(senders[0])
    return Exchange(num_heads, ranks, *((SCATTER, receivers) if scatter else (GATHER, senders)))


def _by_rank(heads: set[int], ranks: int, per_rank: int) -> tuple[tuple[int, ...], ...]:
    runs = [range(rank * per_rank, (rank + 1) * per_rank) for rank in range(ranks)]
    width = max(sum(head in heads for head in run) for run in runs)
    # Those that travel first; any other head of the rank fills up, and nobody reads it.
    return tuple(tuple(sorted(run, key=lambda head: head not in heads)[:width]) for run in runs)


def gather_heads(own: Tensor, mesh: DeviceMesh) -> Tensor:
    """All-gathers `[*, b, D]` of every rank to `[*, n*b, D]`; backward is one reduce-scatter."""
    whole = DTensor.from_local(own, mesh, [Shard(own.dim() - 2)], run_check=False).redistribute(mesh, [Replicate()])
    return whole.to_local(grad_placements=[Partial()])


def scatter_heads(sums: Tensor, mesh: DeviceMesh) -> Tensor:
    """Adds `[*, n*c, D]` over ranks, each of which keeps its own `[*, c, D]`; backward is one all-gather."""
    whole = DTensor.from_local(sums, mesh, [Partial()], run_check=False)
    return whole.redistribute(mesh, [Shard(sums.dim() - 2)]).to_local()


def sum_gradient(value: Tensor, mesh: DeviceMesh) -> Tensor:
    """The same value; backward adds the gradients of all ranks: for what all hold and each uses for its heads only."""
    return DTensor.from_local(value, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def own_part(value: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """This rank's equal part of what all ranks hold; backward is one all-gather."""
    return DTensor.from_local(value, mesh, [Replicate()], run_check=False).redistribute(mesh, [Shard(dim)]).to_local()


def local(value: Tensor | None) -> Tensor | None:
    """The part of a tensor on this rank; of an input of all ranks, each rank's gradient is one summand."""
    if not isinstance(value, DTensor):
        return value
    return value.to_local(grad_placements=[Partial() if place.is_replicate() else place for place in value.placements])


def indices(heads: Sequence[int], device: torch.device) -> Tensor:
    """Head indices as a tensor."""
    return torch.tensor(list(heads), dtype=torch.long, device=device)
