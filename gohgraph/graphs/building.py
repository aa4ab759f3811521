"""The modules at the sites of attention, made of their configurations."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from gohgraph.graphs.baselines import BASELINES
from gohgraph.graphs.conv import HeadGraphConv
from gohgraph.graphs.experts import GraphExperts
from gohgraph.graphs.keyed import KeyedGraphConv
from gohgraph.graphs.learned_topology import LearnedTopologyConv
from gohgraph.graphs.site_config import BaselineConfig, Site, SiteConfig, parts_of


class Chain(nn.ModuleList):
    """Modules of one site, one after another, each under the same context.

    Example:
        >>> import torch
        >>> from gohgraph.graphs.baselines import HeadNorm, SigmoidGate
        >>> chain = Chain([HeadNorm(5, 4, 20), SigmoidGate(5, 4, 20)])
        >>> chain(torch.randn(2, 3, 5, 4), torch.randn(2, 3, 20)).shape
        torch.Size([2, 3, 5, 4])
    """

    def forward(self, nodes: Tensor, context: Tensor, earlier: Sequence[Tensor] = (), **more: Tensor) -> Tensor:
        """Passes the nodes `[*, H, D]` through all modules; the heads of earlier layers go to those that ask."""
        for module in self:
            before = {"earlier": earlier} if getattr(module, "cross_layer", 0) else {}
            nodes = module(nodes, context, **before, **more)
        return nodes


def build_graph(
    site: Site | None, sizes: tuple[int, int, int], *, layer: int = 0, alignment: bool = False
) -> nn.Module | None:
    """Builds what stands at one site of attention.

    Args:
        site: its configuration.
        sizes: H, D and M: nodes, their features, and the context.
        layer: index in the stack; graphs with `cross_layer` reach back at most so far.
        alignment: graph experts give their alignment loss.

    Returns:
        The module, `None` where the site is empty.

    Raises:
        ValueError: an unknown baseline, or options it refuses.

    Example:
        >>> build_graph(SiteConfig.ring(2), (5, 3, 7)).edge_index.shape
        torch.Size([2, 10])
    """
    parts = [_build(part, sizes, layer, alignment) for part in parts_of(site)]
    return None if not parts else parts[0] if len(parts) == 1 else Chain(parts)


def _build(
    part: SiteConfig | BaselineConfig, sizes: tuple[int, int, int], layer: int, alignment: bool
) -> nn.Module:
    if isinstance(part, BaselineConfig):
        return _baseline(part, sizes)
    if part.num_shared is not None:
        return GraphExperts.from_config(part, *sizes, layer=layer, alignment=alignment)
    if part.in_degree is not None:
        return LearnedTopologyConv.from_config(part, *sizes, layer=layer, in_degree=part.in_degree)
    return (KeyedGraphConv if part.keyed else HeadGraphConv).from_config(part, *sizes, layer=layer)


def _baseline(part: BaselineConfig, sizes: tuple[int, int, int]) -> nn.Module:
    if part.kind not in BASELINES:
        raise ValueError(f"Expected a baseline of {list(BASELINES)} (got {part.kind!r}). Do choose one of them.")
    try:
        return BASELINES[part.kind](*sizes, **part.options)
    except TypeError as error:
        raise ValueError(
            f"Expected options of the baseline {part.kind!r} (got {part.options}: {error}). Do drop the unknown ones."
        ) from error
