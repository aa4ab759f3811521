"""The modules at the sites of attention, made of their configurations."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from gohgraph.baselines import BASELINES
from gohgraph.config import TransformerConfig
from gohgraph.conv import HeadGraphConv
from gohgraph.experts import GraphExperts
from gohgraph.keyed import KeyedGraphConv
from gohgraph.learned_topology import LearnedTopologyConv
from gohgraph.site_config import BaselineConfig, Site, SiteConfig, parts_of


class Chain(nn.ModuleList):
    """Modules of one site, one after another, each under the same context.

    Example:
        >>> import torch
        >>> from gohgraph.baselines import HeadNorm, SigmoidGate
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


def build_site(
    site: Site | None, config: TransformerConfig, *, num_heads: int | None = None, layer: int = 0
) -> nn.Module | None:
    """Builds the module of one site of an attention block.

    Args:
        site: its configuration.
        config: of the transformer, for its sizes.
        num_heads: nodes at this site, `None` for the query heads.
        layer: index in the stack; graphs with `cross_layer` reach back at most so far.

    Returns:
        The module, `None` where the site is empty.

    Raises:
        ValueError: an unknown baseline, or options it refuses.

    Example:
        >>> build_site(BaselineConfig("norm"), TransformerConfig(7, d_model=20, num_heads=5)).gain.shape
        torch.Size([5, 4])
    """
    heads = config.num_heads if num_heads is None else num_heads
    alignment = config.head_graph is not None and config.head_graph.alignment > 0
    return site_module(site, (heads, config.head_dim, config.d_model), layer=layer, alignment=alignment)


def site_module(
    site: Site | None, sizes: tuple[int, int, int], *, layer: int = 0, alignment: bool = False
) -> nn.Module | None:
    """Builds the module of one site over nodes of given sizes (H, D, M), `None` where the site is empty.

    Example:
        >>> site_module(SiteConfig.ring(2), (5, 3, 7)).edge_index.shape
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
