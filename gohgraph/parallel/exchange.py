"""Which heads have to travel between the ranks that hold them, by which collective, and where they lie on arrival."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    def arrival_order(self) -> list[int]:
        """Global indices of the heads in the order in which they lie behind a collective, rank after rank."""
        return [head for travelling in self.heads for head in travelling]

    def heads_of(self, rank: int) -> range:
        """The heads of a rank."""
        return range(rank * self.per_rank, (rank + 1) * self.per_rank)

    def edges_of_ranks(self, edges: Sequence[tuple[int, int]]) -> list[list[int]]:
        """The indices of the (sender, receiver) edges that each rank computes: those into its heads, or out of them.

        Senders j + l*H of earlier layers live where head j does.
        """
        side = 0 if self.kind == SCATTER else 1
        owners = [edge[side] % self.num_heads // self.per_rank for edge in edges]
        return [[e for e, owner in enumerate(owners) if owner == rank] for rank in range(self.ranks)]

    def places(self, rank: int, edges: Sequence[tuple[int, int]], layers: int = 1) -> Places:
        """Returns where on `rank` the ends of its edges lie, of `edges_of_ranks`; see `Places`.

        Args:
            rank: whose edges these are.
            edges: pairs (j + l*H, i) of global indices, of head j in the l-th layer before.
            layers: that send, each with all its heads.
        """
        heads, behind = self.heads_of(rank), {head: place for place, head in enumerate(self.arrival_order)}
        here = {layer * self.num_heads + head: layer * len(heads) + head - heads.start
                for layer in range(layers) for head in heads}  # fmt: skip
        remote = sorted({j for j, _ in edges if j not in here})
        senders = here | {j: len(here) + place for place, j in enumerate(remote)}
        receivers = {i: i - heads.start if i in heads else len(heads) + behind[i] for _, i in edges}
        travelling = self.heads[rank] if self.heads else ()
        arrived = []
        for sender in remote:
            layer, head = divmod(sender, self.num_heads)
            origin, place = divmod(behind[head], self.width)
            arrived.append((origin * layers + layer) * self.width + place)
        return Places(
            edges=[(senders[j], receivers[i]) for j, i in edges],
            senders=list(here),
            sent=[here[layer * self.num_heads + head] for layer in range(layers) for head in travelling],
            arrived=arrived,
            summed=[head - heads.start for head in travelling],
            num_senders=len(senders),
            num_receivers=len(heads) + (len(behind) if self.kind == SCATTER else 0),
        )


@dataclass(frozen=True)
class Places:
    """Where on one rank the heads of its edges lie: its own first, behind them those of other ranks.

    Args:
        edges: the (sender, receiver) edges of this rank by place.
        senders: global indices of the senders that this rank holds, in their order here.
        sent: places of the senders that it hands to an all-gather.
        arrived: places, in what an all-gather brings, of the senders it needs; they follow its own.
        summed: places of its heads to which a reduce-scatter brings sums.
        num_senders: own and needed ones.
        num_receivers: own heads, and with a reduce-scatter all that sums travel to.

    Example:
        >>> exchange = plan_exchange(4, 2, [(0, 2), (0, 3), (3, 1)])
        >>> places = exchange.places(1, [(0, 2), (0, 3)])
        >>> places.edges, places.sent, places.arrived, places.num_senders
        ([(2, 0), (2, 1)], [1], [0], 3)
    """

    edges: list[tuple[int, int]]
    senders: list[int]
    sent: list[int]
    arrived: list[int]
    summed: list[int]
    num_senders: int
    num_receivers: int


def plan_exchange(
    num_heads: int, ranks: int, edges: Sequence[tuple[int, int]], *, may_scatter: bool = True
) -> Exchange:
    """Chooses the cheaper collective for (sender, receiver) edges: the one that moves fewer heads; all-gather in a tie.

    Args:
        num_heads: H, a multiple of `ranks`.
        ranks: n.
        edges: pairs of global head indices.
        may_scatter: False where partial sums do not do (queries and keys, edges that compete for their receiver).

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
