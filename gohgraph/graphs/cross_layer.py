"""Heads of earlier layers as senders: of which layers, over which edges, and how loud."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from gohgraph.common.checks import check_choice, check_int, check_number
from gohgraph.common.config_base import Config

FIRST, ALL = "first", "all"
EDGES = ("topology", "same-head", "all-pairs")
# Which earlier layers are read: so many before, the first, all of them; or what several graphs read together.
Reach = int | str | tuple[int | str, ...]
Of = TypeVar("Of")


@dataclass(frozen=True)
class CrossLayer(Config):
    r"""The senders that a head graph has in earlier layers: the same token's heads at the same site.

    .. math:: z_i' = z_i + \sum_{j \to i} \alpha_{ji}\, z_j + s \sum_{l} \sum_{j \to i} \alpha^{(l)}_{ji}\, z_j^{(l)}

    z^(l) are the nodes of layer l as its attention used them: after its own messages, before rotary positions.

    Args:
        layers: w >= 0 for the w layers before, nearest first; `"first"` for the first layer; `"all"` for all before.
        edges: `"topology"`, those of the layer's own graph; `"same-head"`, j -> j; `"all-pairs"`.
        scale: start of the learned factor s, one number a graph; `None` for s = 1. At 0 the edges it weighs start at
            in_degree^-0.5 instead of 0: two zero factors would never open. Either way a new graph sends nothing.

    Raises:
        TypeError, ValueError: other layers, edges or a scale that is no number.

    Example:
        >>> CrossLayer("all").at(3).layers, CrossLayer(2).at(1).layers, CrossLayer("first").at(0).layers
        (3, 1, 0)
    """

    layers: int | str = FIRST
    edges: str = "topology"
    scale: float | None = None

    def __post_init__(self) -> None:
        if self.layers not in (FIRST, ALL):
            if isinstance(self.layers, str):
                raise ValueError(
                    f"Expected cross_layer to be a number of layers, {FIRST!r} or {ALL!r} (got {self.layers!r}). Do "
                    "choose one of them."
                )
            check_int("cross_layer", self.layers, low=0)
        check_choice("edges of cross_layer", self.edges, EDGES)
        if self.scale is not None:
            check_number("scale of cross_layer", self.scale)

    @classmethod
    def of(cls, value: int | str | CrossLayer) -> CrossLayer:
        """Returns what a number of layers or a name of them stands for."""
        return value if isinstance(value, CrossLayer) else cls(value)

    @property
    def count(self) -> int:
        """How many layers send; `ValueError` where that depends on a layer that is not known."""
        if self.layers == ALL:
            raise ValueError(
                "Expected a number of earlier layers, or 'first', where a graph is built by itself (got "
                "cross_layer='all'). Do pass the number; in gohgraph's own models every layer knows it."
            )
        return self.layers if isinstance(self.layers, int) else 1

    def at(self, layer: int | None) -> CrossLayer:
        """Returns the senders that there are for the layer of that index; `None` leaves them as they are."""
        if layer is None:
            return self
        there = layer if self.layers == ALL else min(layer, self.count)
        return self if self.layers == FIRST and there else dataclasses.replace(self, layers=there)

    def pairs(self, edges: Sequence[tuple[int, int]], num_heads: int) -> list[tuple[int, int]]:
        """Returns the (sender, receiver) edges from each earlier layer, of a graph that has `edges` itself."""
        heads = range(num_heads)
        if self.edges == "topology":
            return list(edges)
        return [(j, i) for i in heads for j in (heads if self.edges == "all-pairs" else (i,))]

    def joined(self, edge_index: Tensor, num_heads: int) -> Tensor:
        """Returns a graph's edges `[2, E]` with those from earlier layers, `[2, E']`: sender j + l*H, by receiver."""
        local = [(j, i) for j, i in edge_index.t().tolist()]
        pairs = self.pairs(local, num_heads)
        edges = local + [(j + layer * num_heads, i) for layer in range(1, self.count + 1) for j, i in pairs]
        edges.sort(key=lambda edge: (edge[1], edge[0]))
        # On the CPU whatever the default device is, as `head_graph` does.
        return torch.tensor(edges, dtype=torch.long, device="cpu").reshape(-1, 2).t().contiguous()  # [2, E']


def reached(earlier: Sequence[Of], reach: Reach) -> Sequence[Of]:
    """Returns, of what all earlier layers have, nearest first, what a graph of this reach is handed.

    Several graphs that read different layers are handed all, and choose by this themselves.

    Example:
        >>> [reached(("third", "second", "first"), reach) for reach in (2, "first", 0)]
        [('third', 'second'), ('first',), ()]
    """
    if isinstance(reach, int):
        return earlier[:reach]
    return earlier[-1:] if reach == FIRST else earlier


def layers_read(reach: Reach, layer: int) -> tuple[int, ...]:
    """Returns the indices of the layers that a graph in the layer of that index reads, nearest first.

    Example:
        >>> layers_read("first", 3), layers_read((1, "first"), 3), layers_read("all", 3), layers_read(2, 1)
        ((0,), (2, 0), (2, 1, 0), (0,))
    """
    before = range(layer - 1, -1, -1)
    parts = reach if isinstance(reach, tuple) else (reach,)
    return tuple(index for index in before if any(index in reached(before, part) for part in parts))


def joined(reaches: Sequence[Reach]) -> Reach:
    """Returns the reach of several graphs together.

    Example:
        >>> joined([1, 0, 2]), joined(["first", 0]), joined(["first", 1]), joined([])
        (2, 'first', ('first', 1), 0)
    """
    parts = [part for reach in reaches for part in (reach if isinstance(reach, tuple) else (reach,))]
    names = tuple(dict.fromkeys(part for part in parts if isinstance(part, str)))
    nearest = max((part for part in parts if isinstance(part, int)), default=0)
    every: tuple[int | str, ...] = (*names, nearest) if nearest else names
    return every if len(every) > 1 else every[0] if every else 0

