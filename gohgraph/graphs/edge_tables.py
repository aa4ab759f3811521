"""Where the edges of a head graph lie: in its adjacency, and at every receiver."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class EdgeTables(NamedTuple):
    """Index tables between the edges of a graph, the cells of its adjacency, and the senders of every receiver.

    Args:
        edge_of_cell: `[H*S]`, of every cell of the adjacency its edge, E where there is none.
        cell_of_edge: `[E]`, the inverse.
        senders: `[H, k]`, the senders of every receiver, itself first; one with fewer repeats itself.
        edge_of_sender: `[H, k]`, their edges, E where there is none.
    """

    edge_of_cell: Tensor
    cell_of_edge: Tensor
    senders: Tensor
    edge_of_sender: Tensor


def edge_tables(edges: Sequence[tuple[int, int]], num_heads: int, num_senders: int) -> EdgeTables:
    """Returns the tables of (sender, receiver) edges, on the CPU.

    Example:
        >>> edge_tables([(0, 0), (1, 0)], num_heads=2, num_senders=2).senders.tolist()
        [[0, 1], [1, 1]]
    """
    none = len(edges)
    numbers = {edge: number for number, edge in enumerate(edges)}
    lists: list[list[int]] = [[receiver] for receiver in range(num_heads)]
    for sender, receiver in edges:
        if sender != receiver:
            lists[receiver].append(sender)
    width = max(map(len, lists))
    edge_of_sender = [
        [numbers.get((sender, receiver), none) for sender in senders] + [none] * (width - len(senders))
        for receiver, senders in enumerate(lists)
    ]
    # Built on the CPU whatever the default device is: on meta there would be nothing to build from.
    with torch.device("cpu"):
        cell_of_edge = torch.tensor([receiver * num_senders + sender for sender, receiver in edges], dtype=torch.long)
        edge_of_cell = torch.full((num_heads * num_senders,), none)
        edge_of_cell[cell_of_edge] = torch.arange(none)
        senders = torch.tensor([heads + [heads[0]] * (width - len(heads)) for heads in lists])  # [H, k]
        return EdgeTables(edge_of_cell, cell_of_edge, senders, torch.tensor(edge_of_sender))
