"""What the panels of a figure show, and how they are laid out on a page."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gohgraph.analysis.module_names import SITES, block_of, graph_titles, named_blocks, of_layer, site_of
from gohgraph.drawing.figures import WIDTH
from gohgraph.graphs.cross_layer import FIRST, Reach


@dataclass(frozen=True)
class Panel:
    """One head graph and round.

    Args:
        title: what stands above it.
        site: as `site_of` names it.
        num_heads: H.
        senders, receivers: `[E]`; senders of the l-th layer before are numbered from l*H.
        weights: `[E]`.
        loads: share of tokens a head is active for, `[H]`.
        num_shared: h_s of a router, or `None` without one.
        reach: which earlier layers send, as in `Traits`.
    """

    title: str
    site: str
    num_heads: int
    senders: np.ndarray
    receivers: np.ndarray
    weights: np.ndarray
    loads: np.ndarray
    num_shared: int | None = None
    reach: Reach = 0

    @property
    def rings(self) -> int:
        """How many layers before this one send to it."""
        return int(self.senders.max(initial=0)) // self.num_heads

    def ring_name(self, ring: int) -> str:
        """What the layer of an outer ring, from 1, is called."""
        return "layer 0" if self.reach == FIRST else f"\u2212{ring}"

    def is_shared(self, head: int) -> bool:
        """Whether a router never switches the head off."""
        return self.num_shared is not None and head < self.num_shared


def panels_of(heads: Mapping[str, Any]) -> list[Panel]:
    """Returns the panels of a recording, one for each graph and round.

    Args:
        heads: by module name, what has `edge_index [2, E]`, `num_heads` and `mean [R, E]`, and where known `load
            [H]`, `num_shared` and `reach`, as a `Recording` has.
    """
    if not len(heads):
        raise ValueError(
            f"Expected a recording with at least one head graph (got {heads!r}). "
            "Do record a forward pass of a model that has head_graph set."
        )
    if not any(getattr(recording, "tokens", 1) for recording in heads.values()):
        raise ValueError("Expected a recording of at least one token (got none). Do record a forward pass.")
    panels = []
    for title, (name, recording) in zip(graph_titles(list(heads)), heads.items(), strict=True):
        senders, receivers = recording.edge_index.cpu().numpy()
        means = recording.mean.detach().float().cpu().numpy()
        if not np.isfinite(means).all():
            raise ValueError(
                f"Expected finite edge weights (got NaN or infinity in {name}). Do check the training run."
            )
        loads = getattr(recording, "load", None)
        loads = np.ones(recording.num_heads) if loads is None else loads.cpu().numpy()
        shared, reach = getattr(recording, "num_shared", None), getattr(recording, "reach", 0)
        for number, weights in enumerate(means):
            label = title if len(means) == 1 else f"{title}, round {number + 1}"
            heads_of = (recording.num_heads, senders, receivers, weights, loads)
            panels.append(Panel(label, site_of(name), *heads_of, num_shared=shared, reach=reach))
    return panels


def strongest_weight(panels: list[Panel]) -> float:
    """Returns the largest |weight| of all panels."""
    return max(float(np.abs(panel.weights).max(initial=0.0)) for panel in panels)


def grid_of(panels: list[Panel], *, widest: int | None = None) -> tuple[list[list[Panel]], int, float]:
    """Returns rows of panels, each site on rows of its own, how many are in a row, and their size in inches."""
    groups = [[panel for panel in panels if panel.site == site] for site in SITES.values()]
    groups = [group for group in groups if group]
    most = max(map(len, groups))
    heads = max(panel.num_heads * (1 + 0.4 * panel.rings) for panel in panels)
    # Many layers are an overview: small circles side by side rather than pages of large ones.
    widest = min(most, widest or (4 if heads <= 16 or most > 6 else 3 if heads <= 32 else 2))
    columns = min(range((widest + 2) // 2, widest + 1), key=lambda count: (-most % count, -count))
    rows = [group[at : at + columns] for group in groups for at in range(0, len(group), columns)]
    return rows, columns, min(WIDTH / columns, 3.4 if heads <= 16 else 4.5)


def draw_panels(axes: np.ndarray, rows: list[list[Panel]], draw_panel: Callable[[Any, Panel], None]) -> None:
    """Calls `draw_panel(axis, panel)` for the rows of `grid_of` on axes `[rows, columns]`; further axes stay empty."""
    for row, row_axes in zip(rows, axes, strict=True):
        for axis in row_axes[len(row) :]:
            axis.set_axis_off()
        for panel, axis in zip(row, row_axes, strict=False):
            draw_panel(axis, panel)


def of_one_layer(heads: Mapping[str, Any], layer: int | str) -> dict[str, Any]:
    """Returns the part of a recording of a layer's number or a block's title; `ValueError` where there is none."""
    blocks = of_layer(named_blocks(map(block_of, heads)), layer)
    return {name: heads[name] for name in heads if block_of(name) in blocks}
