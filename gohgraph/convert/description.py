"""All head graphs of a converted model in plain JSON values, beside its weights: what they are and where they stand.

A description holds for the model it was made of, under the names its attention has there. Made of a part of a model,
or of a larger model around it, it is another one: what it says is found in the modules themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any, NamedTuple

from torch import nn

from gohgraph.attention.slots import HeadSlots, Slots
from gohgraph.convert.blocks import head_slots
from gohgraph.convert.origin import Origin, check_rebuilds, keep_edges, kept_edges
from gohgraph.graphs.config import HeadGraphConfig

FORMAT = 1
VERSIONED = ("gohgraph", "torch", "transformers")


class Described(NamedTuple):
    """The head graphs of one attention module.

    Args:
        origin: what they were built from.
        head_order: as in `HeadSlots`.
        edges: of graphs that were pruned, by name in the slots, as (sender, receiver) pairs.
    """

    origin: Origin
    head_order: list[int] | None
    edges: dict[str, list[list[int]]]

    def build(self) -> Slots:
        """Builds the slots anew, pruned as they were."""
        slots = self.origin.build()
        keep_edges(slots, self.edges)
        return slots


def origins(model: nn.Module) -> dict[str, HeadSlots]:
    """Returns all slots that a conversion put into a model, by their own names."""
    return {name: slots for name, slots in head_slots(model).items() if isinstance(slots.origin, Origin)}


def describe(model: nn.Module) -> dict[str, Any] | None:
    """Describes the head graphs of a converted model, or of one that contains a converted one; `None` without any.

    Raises:
        ValueError: slots that are not what their configuration builds, so that their weights could not be loaded again.
    """
    configs: list[HeadGraphConfig] = []
    blocks: dict[str, dict[str, Any]] = {}
    for place, slots in origins(model).items():
        origin = slots.origin
        name = origin.attention_of(place)
        built = origin.build()
        edges = kept_edges(built, slots)
        keep_edges(built, edges)
        check_rebuilds(name, built, slots)
        if origin.config not in configs:
            configs.append(origin.config)
        block = {"config": configs.index(origin.config), "layer": origin.layer, "sizes": list(origin.sizes)}
        block |= {"family": origin.family, "path": origin.path, "projection": origin.projection}
        block |= {"head_order": slots.head_order, "edges": edges}
        blocks[name] = {key: value for key, value in block.items() if value not in (None, {})}
    if not blocks:
        return None
    written = [config.to_dict() for config in configs]
    return {"format": FORMAT, "versions": versions(), "configs": written, "blocks": blocks}


def read_description(values: Any) -> dict[str, Described]:
    """Returns what `describe` wrote, by the name of each attention module.

    Raises:
        ValueError: it is damaged, or of another format.
    """
    try:
        if values["format"] != FORMAT:
            by = values.get("versions", {}).get("gohgraph", "of another version")
            raise ValueError(f"format {values['format']!r}, written by gohgraph {by}")
        configs = [HeadGraphConfig.from_dict(config) for config in values["configs"]]
        return {name: _described(block, configs) for name, block in values["blocks"].items()}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"Expected a description of head graphs of format {FORMAT} (got {type(error).__name__}: {error}). Do load "
            "it with the gohgraph that wrote it, or save the model again."
        ) from error


def versions() -> dict[str, str]:
    """Returns the versions of the libraries that are there."""
    installed = {}
    for name in VERSIONED:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def _described(block: Mapping[str, Any], configs: list[HeadGraphConfig]) -> Described:
    num_heads, head_dim, d_model = block["sizes"]
    sizes, places = (num_heads, head_dim, d_model), (block["family"], block["path"], block.get("projection"))
    origin = Origin(configs[block["config"]], block["layer"], sizes, *places)
    return Described(origin, block.get("head_order"), block.get("edges", {}))
