"""The modules at the sites of attention, made of their configurations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gohgraph.graphs.baselines import BASELINES
from gohgraph.graphs.chain import Chain
from gohgraph.graphs.protocol import SiteGraph
from gohgraph.graphs.site_config import BaselineConfig, Site, SiteConfig, parts_of
from gohgraph.graphs.wrapped import as_site_graph

if TYPE_CHECKING:
    from gohgraph.graphs.conv import HeadGraphConv


def build_graph(
    site: Site | None, sizes: tuple[int, int, int], *, layer: int | None = None, cross: bool = False
) -> SiteGraph | None:
    """Builds what stands at one site of attention; `None` where it is empty.

    A graph whose edges all come from earlier layers is left out where there are none before.

    Args:
        site: its configuration.
        sizes: H, D and M: nodes, their features, and the context.
        layer: index in the stack; graphs with `cross_layer` reach back at most so far. `None`: as far as they are to.
        cross: of cross attention, whose tokens have no values of their own: graphs that read these are left out.

    Example:
        >>> build_graph(SiteConfig.ring(2), (5, 3, 7)).edge_index.shape
        torch.Size([2, 10])
    """
    built = [_build(part, sizes, layer) for part in parts_of(site)]
    parts = [part for part in built if part is not None and not (cross and part.traits.reads_values)]
    return None if not parts else parts[0] if len(parts) == 1 else Chain(parts)


def _build(part: SiteConfig | BaselineConfig, sizes: tuple[int, int, int], layer: int | None) -> SiteGraph | None:
    if isinstance(part, BaselineConfig):
        graph = _baseline(part, sizes)
    else:
        graph = _graphs()[part.kind].from_config(part, *sizes, layer=layer)
        if part.cross_layer and not graph.edges.num_edges:
            return None
    graph.traits = graph.traits._replace(learning_rate_factor=float(part.learning_rate_factor))
    return graph


def _graphs() -> dict[str, type[HeadGraphConv]]:
    """The classes of head graphs by `SiteConfig.kind`; whoever builds none does not import PyG."""
    from gohgraph.graphs.conv import HeadGraphConv
    from gohgraph.graphs.experts import GraphExperts
    from gohgraph.graphs.keyed import KeyedGraphConv
    from gohgraph.graphs.learned_topology import LearnedTopologyConv

    return {"plain": HeadGraphConv, "experts": GraphExperts, "learned": LearnedTopologyConv, "keyed": KeyedGraphConv}


def _baseline(part: BaselineConfig, sizes: tuple[int, int, int]) -> SiteGraph:
    if part.kind not in BASELINES:
        raise ValueError(f"Expected a baseline of {list(BASELINES)} (got {part.kind!r}). Do choose one of them.")
    try:
        return as_site_graph(BASELINES[part.kind](*sizes, **part.options), sizes[0])
    except TypeError as error:
        raise ValueError(
            f"Expected options of the baseline {part.kind!r} (got {part.options}: {error}). Do drop the unknown ones."
        ) from error
