"""Several graphs at one site, one after another."""

import math
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from gohgraph.graphs.cross_layer import joined, reached
from gohgraph.graphs.protocol import Losses, SiteGraph, Traits


class Chain(nn.ModuleList, SiteGraph):
    """Graphs of one site, one after another, each under the same context.

    Its `traits` are what all of them have in common: it may stand where each of them may, and is linear if all are.

    Args:
        graphs: at least one, over equally many heads; at most one may read the keys' tokens.

    Example:
        >>> import torch
        >>> from gohgraph.graphs.baselines import HeadNorm, SigmoidGate
        >>> chain = Chain([HeadNorm(5, 4, 20), SigmoidGate(5, 4, 20)])
        >>> chain(torch.randn(2, 3, 5, 4), torch.randn(2, 3, 20)).shape
        torch.Size([2, 3, 5, 4])
    """

    def __init__(self, graphs: Sequence[SiteGraph]) -> None:
        super().__init__(graphs)
        self.traits = _common_traits([graph.traits for graph in graphs])

    @property
    def graphs(self) -> list[SiteGraph]:
        """The graphs, in their order."""
        return [cast(SiteGraph, graph) for graph in self]

    def forward(
        self,
        nodes: Tensor,
        context: Tensor | None = None,
        earlier: Sequence[Tensor] = (),
        active: Tensor | None = None,
        *,
        keys: Tensor | None = None,
        losses: Losses | None = None,
        values: Tensor | None = None,
    ) -> Tensor:
        """Passes the nodes `[*, H, F]` through all graphs."""
        for graph in self.graphs:
            state = keys if graph.traits.keyed else None
            read = {"values": values} if graph.traits.reads_values else {}
            before = reached(earlier, graph.traits.reach)
            nodes = graph(nodes, context, before, active, keys=state, losses=losses, **read)
        return nodes

    def key_state(self, source: Tensor) -> Tensor | None:
        """Returns the state of the one keyed graph."""
        return next((graph.key_state(source) for graph in self.graphs if graph.traits.keyed), None)

    def matrix(self, context: Tensor | None = None, active: Tensor | None = None) -> Tensor:
        """Returns the product of all matrices, `[*, H, H]`."""
        first, *others = self.graphs
        product = first.matrix(context, active)
        for graph in others:
            product = graph.matrix(context, active) @ product  # [*, H, H]
        return product


def _common_traits(all_traits: Sequence[Traits]) -> Traits:
    heads = [traits.num_heads for traits in all_traits]
    if len(set(heads)) != 1:
        raise ValueError(f"Expected graphs over one number of heads in a chain (got {heads}). Do build them alike.")
    keyed = sum(traits.keyed for traits in all_traits)
    if keyed > 1:
        raise ValueError(f"Expected at most one graph of a chain to read the keys' tokens (got {keyed}). Do keep one.")
    if any(traits.joins_keys for traits in all_traits) and len(all_traits) > 1:
        raise ValueError(f"Expected a graph that joins keys alone (got {len(all_traits)} in a chain). Do keep one.")
    return Traits(
        heads[0],
        frozenset.intersection(*(traits.sites for traits in all_traits)),
        reach=joined([traits.reach for traits in all_traits]),
        linear=all(traits.linear for traits in all_traits),
        static=all(traits.static for traits in all_traits),
        keyed=any(traits.keyed for traits in all_traits),
        losses=tuple(dict.fromkeys(name for traits in all_traits for name in traits.losses)),
        weight_decay=all(traits.weight_decay for traits in all_traits),
        # With one among all heads, 0, the whole is among all.
        run=math.lcm(*(traits.run for traits in all_traits)),
        joins_keys=any(traits.joins_keys for traits in all_traits),
        reads_values=any(traits.reads_values for traits in all_traits),
    )
