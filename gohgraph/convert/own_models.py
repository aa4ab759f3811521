"""Head graphs in the library's own models, whose configuration then names them."""

from __future__ import annotations

import dataclasses

from torch import nn

from gohgraph.attention.block import MultiHeadAttention
from gohgraph.graphs.config import HeadGraphConfig
from gohgraph.models.config import ClassifierConfig, TransformerConfig
from gohgraph.models.stacks import Stack

SLOTS = ("output_graph", "score_graph", "router", "inner_graphs")


def is_own(model: nn.Module) -> bool:
    """Whether the model is one of the library's, built from its configuration."""
    return isinstance(getattr(model, "config", None), (TransformerConfig, ClassifierConfig))


def attentions(model: nn.Module) -> dict[str, MultiHeadAttention]:
    """Returns the attention blocks by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MultiHeadAttention)}


def give(model: nn.Module, config: HeadGraphConfig | None) -> list[str]:
    """Gives all attention blocks the graphs of `config`, in place; `None` takes them out. Returns their names."""
    changed = _with_graphs(model.config, config)
    weight = next(model.parameters())
    source = type(model)(changed).to(weight.device, weight.dtype).train(model.training)
    for mine, other in zip(_stacks(model), _stacks(source), strict=True):
        mine.cross_layer = other.cross_layer
    found = attentions(model)
    for attention, other in zip(found.values(), attentions(source).values(), strict=True):
        for name in SLOTS:
            setattr(attention, name, getattr(other, name))
    model.config = changed
    return list(found)


def _stacks(model: nn.Module) -> list[Stack]:
    return [module for module in model.modules() if isinstance(module, Stack)]


def _with_graphs(
    config: TransformerConfig | ClassifierConfig, graphs: HeadGraphConfig | None
) -> TransformerConfig | ClassifierConfig:
    if isinstance(config, ClassifierConfig):
        return dataclasses.replace(config, transformer=_with_graphs(config.transformer, graphs))
    return dataclasses.replace(config, head_graph=graphs)
