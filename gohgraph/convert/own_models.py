"""Head graphs in the library's own models, whose configuration then names them."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from torch import nn

from gohgraph.attention.block import MultiHeadAttention
from gohgraph.graphs.config import HeadGraphConfig
from gohgraph.models.config import ClassifierConfig, TransformerConfig
from gohgraph.models.stacks import NO_GRAPHS, DecoderLayer, EncoderLayer, Stack, build_slots


def is_own(model: nn.Module) -> bool:
    """Whether the model is one of the library's, built from its configuration."""
    return isinstance(getattr(model, "config", None), (TransformerConfig, ClassifierConfig))


def attentions(model: nn.Module) -> dict[str, MultiHeadAttention]:
    """Returns the attention blocks by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MultiHeadAttention)}


def transformer_of(model: nn.Module) -> TransformerConfig:
    """Returns the configuration of the transformer in an own model."""
    config = _config(model)
    return config.transformer if isinstance(config, ClassifierConfig) else config


def give(model: nn.Module, config: HeadGraphConfig | None) -> list[str]:
    """Gives all attention blocks the graphs of `config`, in place; `None` takes them out. Returns their names."""
    changed = _with_graphs(_config(model), config)
    transformer = changed.transformer if isinstance(changed, ClassifierConfig) else changed
    weight = next(model.parameters())
    # All are built before any is put in: what cannot be built leaves the model as it was.
    blocks = [
        (block, build_slots(transformer, index, cross=is_cross))
        for stack in _stacks(model)
        for index, layer in enumerate(stack.layers)
        for block, is_cross in _blocks(cast("EncoderLayer | DecoderLayer", layer))
    ]
    for block, slots in blocks:
        block.fill_slots(**slots)
        for slot in (block.output_graph, block.score_graph, block.router, block.inner_graphs):
            if slot is not None:
                slot.to(weight.device, weight.dtype).train(model.training)
    for stack in _stacks(model):
        stack.graphs_changed(transformer.head_graph or NO_GRAPHS)
    cast(Any, model).config = changed
    return list(attentions(model))


def _blocks(layer: EncoderLayer | DecoderLayer) -> list[tuple[MultiHeadAttention, bool]]:
    """The attention blocks of a layer, and whether each is cross attention."""
    blocks = [(cast(MultiHeadAttention, layer.attention.object), False)]
    if isinstance(layer, DecoderLayer):
        blocks.append((cast(MultiHeadAttention, layer.cross_attention.object), True))
    return blocks


def _config(model: nn.Module) -> TransformerConfig | ClassifierConfig:
    return cast("TransformerConfig | ClassifierConfig", model.config)


def _stacks(model: nn.Module) -> list[Stack]:
    return [module for module in model.modules() if isinstance(module, Stack)]


def _with_graphs(
    config: TransformerConfig | ClassifierConfig, graphs: HeadGraphConfig | None
) -> TransformerConfig | ClassifierConfig:
    if isinstance(config, ClassifierConfig):
        transformer = dataclasses.replace(config.transformer, head_graph=graphs)
        return dataclasses.replace(config, transformer=transformer)
    return dataclasses.replace(config, head_graph=graphs)
