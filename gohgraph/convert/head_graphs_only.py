"""The head graphs of a converted model without the model, as a checkpoint of gohgraph's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from gohgraph.attention.slots import HeadSlots
from gohgraph.common.checkpoint import PretrainedMixin
from gohgraph.common.config_base import Config
from gohgraph.convert.blocks import SLOTS, slots_at
from gohgraph.convert.description import FORMAT, Described, read_description
from gohgraph.convert.origin import weights_of
from gohgraph.graphs.config import HeadGraphConfig


@dataclass(frozen=True)
class ConversionConfig(Config):
    """What the head graphs of a converted model are and where they belong.

    Args:
        base: name or path of the model that was converted, empty where it has none.
        base_class: its class, as `module.Name`.
        head_graphs: their description, see `describe`.
    """

    base: str
    base_class: str
    head_graphs: dict[str, Any]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ConversionConfig:
        """Builds the configuration from `to_dict`'s form, also that of versions that spelled out every edge."""
        return super().from_dict(_upgraded(values) if isinstance(values, dict) else values)


class HeadGraphsOnly(PretrainedMixin, nn.Module):
    """The head graphs of a converted model, without the model.

    Args:
        config: what they are.
    """

    config_class = ConversionConfig

    def __init__(self, config: ConversionConfig) -> None:
        super().__init__()
        self.config = config
        self.described = read_description(config.head_graphs)
        self.blocks = nn.ModuleList(map(_slots, self.described.values()))

    @torch.no_grad()
    def take_from(self, model: nn.Module) -> None:
        """Takes the weights, and their dtype, of the converted model of this description."""
        for name, slots in zip(self.described, self.blocks, strict=True):
            weights = weights_of(slots_at(model, name).state_dict())
            dtype = next((tensor.dtype for tensor in weights.values() if tensor.is_floating_point()), None)
            slots.to(dtype).load_state_dict(weights)

    def put_into(self, model: nn.Module, names: dict[str, str]) -> None:
        """Gives the weights to a model that has head graphs of this description; `names` are its names by ours."""
        for name, slots in zip(self.described, self.blocks, strict=True):
            copy_weights(cast(HeadSlots, slots), slots_at(model, names[name]))


def copy_weights(source: HeadSlots, target: HeadSlots) -> None:
    """Copies the weights of slots, and nothing of the attention around them.

    Raises:
        ValueError: they are not of the same slots.
    """
    missing, unknown = target.load_state_dict(weights_of(source.state_dict()), strict=False)
    missing = [key for key in missing if key.split(".")[0] in SLOTS]
    if missing or unknown:
        raise ValueError(
            f"Expected the weights of these head graphs (got {missing} missing and {unknown} unknown). Do save them "
            "again."
        )


def _slots(described: Described) -> HeadSlots:
    return HeadSlots(described.origin.sizes[0], head_order=described.head_order, **described.build())


def _upgraded(values: dict[str, Any]) -> dict[str, Any]:
    if "blocks" not in values:
        return values
    blocks = {
        name: {
            "config": layer,
            "layer": layer,
            "sizes": [block["num_heads"], block["head_dim"], block["d_model"]],
            # Not written then: these are put in after a search.
            "family": "unknown",
            "path": "",
            "head_order": block["head_order"],
            "edges": block["edges"],
        }
        for layer, (name, block) in enumerate(values["blocks"].items())
    }
    config = HeadGraphConfig.from_dict(values["head_graph"])
    configs = [config.at_layer(layer, len(blocks)).to_dict() for layer in range(len(blocks))]
    description = {"format": FORMAT, "versions": values["versions"], "configs": configs, "blocks": blocks}
    return {"base": values["base"], "base_class": values["base_class"], "head_graphs": description}
