"""Where the edges of a head graph lie: in its adjacency, at every receiver and at every sender."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class EdgeTables(NamedTuple):
    """Index tables between the edges of a graph, the cells of its adjacency, and the ends of its edges.

    Args:
        edge_of_cell: `[H*S]`, of every cell of the adjacency its edge, E where there is none.
        cell_of_edge: `[E]`, the inverse.
        senders: `[H, k]`, the senders of every receiver, itself first; one with fewer repeats itself.
        edge_of_sender: `[H, k]`, their edges, E where there is none.
        receivers: `[S, k']`, the receivers of every sender; one with fewer repeats the first head.
        edge_of_receiver: `[S, k']`, their edges, E where there is none.
        place_of_edge: `[E]`, where an edge stands in `edge_of_sender`, counted through.
    """

    edge_of_cell: Tensor
    cell_of_edge: Tensor
    senders: Tensor
    edge_of_sender: Tensor
    receivers: Tensor
    edge_of_receiver: Tensor
    place_of_edge: Tensor


def edge_tables(edges: Sequence[tuple[int, int]], num_heads: int, num_senders: int) -> EdgeTables:
    """Returns the tables of (sender, receiver) edges, on the CPU.

    Example:
        >>> edge_tables([(0, 0), (1, 0)], num_heads=2, num_senders=2).senders.tolist()
        [[0, 1], [1, 1]]
    """
    none = len(edges)
    numbers = {edge: number for number, edge in enumerate(edges)}
    into: list[list[int]] = [[receiver] for receiver in range(num_heads)]
    out_of: list[list[int]] = [[] for _ in range(num_senders)]
    for sender, receiver in edges:
        out_of[sender].append(receiver)
        if sender != receiver:
            into[receiver].append(sender)
    edge_of_sender = [[numbers.get((j, i), none) for j in senders] for i, senders in enumerate(into)]
    edge_of_receiver = [[numbers[j, i] for i in receivers] for j, receivers in enumerate(out_of)]
    # Built on the CPU whatever the default device is: on meta there would be nothing to build from.
    with torch.device("cpu"):
        cell_of_edge = torch.tensor([receiver * num_senders + sender for sender, receiver in edges], dtype=torch.long)
        edge_of_cell = torch.full((num_heads * num_senders,), none)
        edge_of_cell[cell_of_edge] = torch.arange(none)
        places = torch.empty(none + 1, dtype=torch.long)
        at_sender = _padded(edge_of_sender, [none] * num_heads)  # [H, k]
        places[at_sender.flatten()] = torch.arange(at_sender.numel())
        return EdgeTables(
            edge_of_cell,
            cell_of_edge,
            _padded(into, range(num_heads)),
            at_sender,
            _padded(out_of, [0] * num_senders),
            _padded(edge_of_receiver, [none] * num_senders),
            places[:none],
        )


def num_runs(edges: Sequence[tuple[int, int]], num_heads: int, num_senders: int) -> int:
    """Returns g, if the edges are those of g complete graphs over equal runs of heads, in order; 0 otherwise.

    Example:
        >>> num_runs([(0, 0), (1, 0), (0, 1), (1, 1)], 2, 2), num_runs([(0, 0), (1, 1)], 2, 2), num_runs([(1, 0)], 2, 2)
        (1, 2, 0)
    """
    width = sum(receiver == 0 for _, receiver in edges)
    if not width or num_heads != num_senders or num_heads % width:
        return 0
    runs = [(start + j, i) for i in range(num_heads) for start in (i // width * width,) for j in range(width)]
    return num_heads // width if list(edges) == runs else 0


def _padded(rows: Sequence[Sequence[int]], fill: Sequence[int]) -> Tensor:
    """Rows of unequal length as one tensor, each filled up with a number of its own."""
    width = max(map(len, rows), default=0)
    filled = [[*row, *[rest] * (width - len(row))] for row, rest in zip(rows, fill, strict=True)]
    return torch.tensor(filled, dtype=torch.long).view(len(rows), width)
