"""Where the head graphs of one attention module come from: all that is needed to build them again, without weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gohgraph.attention.slots import HeadSlots, Slots
from gohgraph.convert.arrival import arrive
from gohgraph.convert.blocks import SLOTS, slots_of
from gohgraph.graphs.config import HeadGraphConfig
from gohgraph.graphs.edge_graph import EdgeGraph


@dataclass(frozen=True)
class Origin:
    """What `convert` put into one attention module; its `HeadSlots` carry it as `origin`.

    Args:
        config: the head graphs, as `HeadGraphConfig.at_layer` gives them.
        layer: index among the attention modules that were converted together.
        sizes: H, D and M.
        family: how the slots stand in the module, a name of `restoring.FAMILIES`.
        path: from the attention module to its slots, e.g. `"head_graphs"`; empty where the slots are the module.
        projection: from the attention module to its output projection, with a dot for every level up, e.g.
            `".output.dense"`; `None` where it was not found.
    """

    config: HeadGraphConfig
    layer: int
    sizes: tuple[int, int, int]
    family: str
    path: str
    projection: str | None = None

    def __post_init__(self) -> None:
        arrive()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Unpickled, the model may be the first of its kind in this process.
        self.__dict__.update(state)
        arrive()

    def build(self) -> Slots:
        """Builds the slots anew, on the CPU; the random state stays as it is."""
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            return slots_of(self.config, self.sizes, self.layer)

    def attention_of(self, name: str) -> str:
        """Returns the name of the attention module whose slots stand at `name`.

        Raises:
            ValueError: something stands around the slots.
        """
        if not self.path or name == self.path:
            return name.removesuffix(self.path)
        if not name.endswith("." + self.path):
            raise ValueError(
                f"Expected head graphs under their own names (got {name}, inside another module). Do merge or unload "
                "adapters before you save the model."
            )
        return name.removesuffix("." + self.path)

    def projection_of(self, attention: str) -> str | None:
        """Returns the name of the output projection of the attention module of that name."""
        if self.projection is None:
            return None
        path = self.projection.lstrip(".")
        above = attention.split(".")[: len(attention.split(".")) - (len(self.projection) - len(path))]
        return ".".join(filter(None, (*above, path)))


def path_between(attention: str, projection: str) -> str:
    """Returns the path from one module to another, both named in one model, as `Origin.projection` has it.

    Example:
        >>> path_between("layer.0.attention.self", "layer.0.attention.output.dense")
        '.output.dense'
    """
    here, there = attention.split("."), projection.split(".")
    shared = 0
    while shared < min(len(here), len(there)) and here[shared] == there[shared]:
        shared += 1
    return "." * (len(here) - shared) + ".".join(there[shared:])


def kept_edges(slots: Slots, present: HeadSlots) -> dict[str, list[list[int]]]:
    """Returns the edges of graphs that have others than those built for their configuration, by name in the slots."""
    changed: dict[str, list[list[int]]] = {}
    for name, conv in _convolutions(slots).items():
        try:
            here = present.get_submodule(name)
        except AttributeError:
            continue
        edges = here.edge_index.t().tolist() if isinstance(here, EdgeGraph) else None
        if edges is not None and edges != conv.edge_index.t().tolist():
            changed[name] = edges
    return changed


def keep_edges(slots: Slots, edges: dict[str, list[list[int]]]) -> None:
    """Prunes new graphs to the edges `kept_edges` returned.

    Raises:
        ValueError: there is no such graph, or it has never had such edges.
    """
    convolutions = _convolutions(slots)
    for name, kept in edges.items():
        # On the CPU whatever the default device is: a model may be built on meta around them.
        with torch.device("cpu"):
            tensor = torch.tensor(kept, dtype=torch.long).reshape(-1, 2).t()  # [2, E]
            if name in convolutions:
                convolutions[name].prune_to_saved({"edge_index": tensor}, "")
        if name not in convolutions or convolutions[name].edge_index.t().tolist() != kept:
            raise ValueError(
                f"Expected edges of the graph at {name!r} (got {len(kept)} that are not all its own). Do save the "
                "model again."
            )


def weights_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns what a state dict of slots holds of the slots alone, without the attention around them."""
    return {name: tensor for name, tensor in state.items() if name.split(".")[0] in SLOTS}


def check_rebuilds(name: str, slots: Slots, present: HeadSlots) -> None:
    """Raises `ValueError` where slots that are built anew could not take the weights of those present."""
    new = HeadSlots(present.num_heads, **slots)
    wanted, given = (_shapes(weights_of(module.state_dict())) for module in (new, present))
    if wanted != given:
        changed = sorted(dict(wanted.items() ^ given.items()))[:4]
        raise ValueError(
            f"Expected the head graphs of {name!r} as their configuration builds them (got others: {changed}). Do "
            "merge adapters, or save the state dict yourself."
        )


def _shapes(state: dict[str, Tensor]) -> dict[str, Any]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _convolutions(slots: Slots) -> dict[str, EdgeGraph]:
    return {
        f"{slot}.{name}" if name else slot: module
        for slot, graph in slots.items()
        if isinstance(graph, nn.Module)
        for name, module in graph.named_modules()
        if isinstance(module, EdgeGraph)
    }
