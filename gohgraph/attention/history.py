"""The nodes of earlier layers: what a block reads of them and hands on, and how long a stack keeps them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from gohgraph.attention.routing import Routing
from gohgraph.graphs.cross_layer import layers_read, reached
from gohgraph.graphs.protocol import SiteGraph

# By site, the nodes `[B, T, H, F]` of all earlier layers, nearest first; `None` for those that nobody reads any more.
Earlier = Mapping[str, Sequence[Tensor | None]]


class History:
    """What one call of a block has of earlier layers, and what it hands on to later ones.

    Args:
        earlier: by site; the block hands on its own nodes at these sites. A sequence: of outputs, nothing is handed on.

    Attributes:
        nodes: by site, what is handed on.
    """

    def __init__(self, earlier: Earlier | Sequence[Tensor]) -> None:
        self._earlier = earlier if isinstance(earlier, Mapping) else {"outputs": earlier}
        self._asked = set(earlier) if isinstance(earlier, Mapping) else set()
        self.nodes: dict[str, Tensor] = {}

    def of(self, site: str, graph: SiteGraph) -> Sequence[Tensor]:
        """Returns what a graph at the site reads of earlier layers."""
        # Of those that it reads none was let go.
        return cast(Sequence[Tensor], reached(self._earlier.get(site, ()), graph.traits.reach))

    def hand_on(self, site: str, nodes: Tensor, routing: Routing | None = None) -> None:
        """Takes in the block's nodes `[B, T, H, F]` at a site; heads that are off send zeros to later layers."""
        if site in self._asked:
            # Of the gates a tensor-parallel rank has those of its own heads.
            works = None if routing is None else routing.gates.unsqueeze(-1) != 0  # [B, T, H, 1]
            self.nodes[site] = nodes if works is None else torch.where(works, nodes, 0.0)


class Readers:
    """Who reads the nodes of which layer of a stack, so that none is kept longer than its last reader needs it.

    Args:
        graphs: of every layer, what stands at which site.

    Example:
        >>> import gohgraph as goh
        >>> graph = goh.HeadGraphConv(goh.head_graph(2), head_dim=3, context_dim=6, cross_layer="first")
        >>> readers = Readers([{}, {"values": graph}, {}])
        >>> first = readers.after(0, readers.nothing(), {"values": torch.zeros(1, 5, 2, 3)})
        >>> second = readers.after(1, first, {"values": torch.ones(1, 5, 2, 3)})
        >>> len(first["values"]), second["values"]
        (1, (None, None))
    """

    def __init__(self, graphs: Sequence[Mapping[str, SiteGraph]]) -> None:
        self._last: dict[str, dict[int, int]] = {}
        for reader, of_layer in enumerate(graphs):
            for site, graph in of_layer.items():
                for layer in layers_read(graph.traits.reach, reader):
                    self._last.setdefault(site, {})[layer] = reader

    def nothing(self) -> Earlier:
        """Returns what the first layer has before it: nothing, at all sites that are read."""
        return {site: () for site in self._last}

    def after(self, layer: int, earlier: Earlier, nodes: Mapping[str, Tensor]) -> Earlier:
        """Returns what the next layer has before it, of what this layer had and of its own nodes."""
        return {site: self._kept(site, layer, (nodes[site], *earlier[site])) for site in earlier}

    def _kept(self, site: str, layer: int, nodes: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        last = self._last[site]
        return tuple(each if last.get(layer - back, -1) > layer else None for back, each in enumerate(nodes))
