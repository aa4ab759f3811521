"""The order of heads: which of them a router keeps for all tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gohgraph.attention.block import MultiHeadAttention
from gohgraph.common.modules import check_writable
from gohgraph.convert import own_models
from gohgraph.convert.blocks import converted, slots_at


def share_important_heads(model: nn.Module, importance: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Lets the routers of a model share the most important heads, instead of the first.

    Blocks of gohgraph's own models get their heads in the order of importance, weights and all; in converted models the
    router's places are assigned so. What the model computes while all heads work does not change.

    Args:
        model: with routers, or about to get them.
        importance: of `head_importance`, measured before the conversion.

    Returns:
        The heads of each attention module, most important first, by their old indices.

    Raises:
        ValueError: grouped key heads in a model of gohgraph's own or weights that are not its own to write into, or
            names that are not the model's.

    Example:
        >>> import gohgraph as goh
        >>> model = goh.LanguageModel(goh.TransformerConfig(9, d_model=8, num_heads=4, num_layers=1, d_ff=8))
        >>> share_important_heads(model, {"decoder.layers.0.attention.object": torch.tensor([0.0, 3.0, 2.0, 1.0])})
        {'decoder.layers.0.attention.object': [1, 2, 3, 0]}
    """
    orders = {name: values.argsort(descending=True, stable=True).tolist() for name, values in importance.items()}
    if own_models.is_own(model):
        attentions = own_models.attentions(model)
        _check_names(orders, attentions)
        check_permutable(model, [attentions[name] for name in orders])
        for name, order in orders.items():
            permute_heads(attentions[name], order)
        return orders
    inner, conversion = converted(model)
    _check_names(orders, conversion.sizes)
    for name, order in orders.items():
        slots_at(inner, name).order_heads(order)
    return orders


def check_permutable(model: nn.Module, attentions: Iterable[MultiHeadAttention]) -> None:
    """Raises `ValueError` unless all projections are plain ones, whose weights are their own to write into."""
    parts = [part for each in attentions for part in (each.query, each.key, each.value, each.output)]
    for part in parts:
        if type(part) is not nn.Linear:
            raise ValueError(
                f"Expected Linear projections (got {type(part).__module__}.{type(part).__name__}). Do merge adapters "
                "and parametrizations first."
            )
    check_writable(model, parts, ("weight", "bias"))


@torch.no_grad()
def permute_heads(attention: MultiHeadAttention, order: list[int]) -> None:
    """Puts the heads of an attention block into another order, without changing what it computes.

    Args:
        attention: without head graphs that have been trained: their edges stay where they are.
        order: the old index of each new head, a permutation of 0..H-1.

    Raises:
        ValueError: grouped key heads, or no permutation.
    """
    if attention.num_kv_heads != attention.num_heads or sorted(order) != list(range(attention.num_heads)):
        raise ValueError(
            f"Expected a permutation of {attention.num_heads} heads that have keys of their own (got {order}, "
            f"{attention.num_kv_heads} key heads). Do leave the order as it is."
        )
    rows = torch.arange(attention.d_model).view(attention.num_heads, -1)[order].flatten()  # [M]
    for linear in (attention.query, attention.key, attention.value):
        linear.weight.copy_(linear.weight[rows])
        if linear.bias is not None:
            linear.bias.copy_(linear.bias[rows])
    attention.output.weight.copy_(attention.output.weight[:, rows])


def _check_names(given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"Expected names among {sorted(known)} (got {unknown}). Do measure this very model.")
