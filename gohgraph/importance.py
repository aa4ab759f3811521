"""How much a trained model needs each of its heads, and which of them a router should keep for all tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gohgraph.convert import own_models
from gohgraph.convert.blocks import converted, sites_at
from gohgraph.convert.conversion import find_blocks
from gohgraph.objects import MultiHeadAttention


def head_importance(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    example: dict[str, Any] | None = None,
) -> dict[str, Tensor]:
    r"""Measures the importance of every head: how much the loss answers to a gate on its output.

    .. math:: I_i = \mathrm{mean}_t \Big| \frac{\partial L}{\partial \xi_i(t)} \Big|
        = \mathrm{mean}_t \Big| \sum_d z_{id}(t)\, \frac{\partial L}{\partial z_{id}(t)} \Big|

    xi_i(t) is a gate on head i at token t, 1 in the model. Source: Michel et al. 2019 (arXiv 1905.10650, equation 2),
    who take the magnitude once for a sequence; here it is taken for each token, as a router chooses heads by token.

    Args:
        model: one of gohgraph's own without head graphs, or one that `convert` takes; used in eval mode and left as it
            was.
        batches: each is handed to `loss`.
        loss: of `(model, batch)`, a scalar.
        example: as in `convert`.

    Returns:
        Importance `[H]` by the name of each attention module, divided by its mean over the heads of the module.

    Raises:
        ValueError: no batches, or no attention whose output projection is known.

    Example:
        >>> import gohgraph as goh
        >>> model = goh.LanguageModel(goh.TransformerConfig(9, d_model=8, num_heads=4, num_layers=1, d_ff=8))
        >>> tokens = torch.randint(9, (2, 5))
        >>> found = head_importance(model, [tokens], lambda model, x: model(x, targets=x).loss)
        >>> found["decoder.layers.0.attention.object"].shape
        torch.Size([4])
    """
    projections = _projections(model, example)
    if not projections:
        raise ValueError("Expected attention with a known output projection (got none). Do see what convert finds.")
    sums = {name: torch.zeros(heads) for name, (_, heads) in projections.items()}
    count = 0
    with _eval(model), _outputs_of_heads(projections) as outputs:
        for batch in batches:
            outputs.clear()
            found = loss(model, batch)
            names = list(outputs)
            gradients = torch.autograd.grad(found, [outputs[name] for name in names])
            for name, gradient in zip(names, gradients, strict=True):
                each = (outputs[name].detach() * gradient).unflatten(-1, (projections[name][1], -1)).sum(-1)  # [*, H]
                sums[name] += each.flatten(0, -2).abs().mean(dim=0).float().cpu()
            count += 1
    if not count:
        raise ValueError("Expected at least one batch (got none). Do pass some text to measure on.")
    return {name: total / total.mean().clamp(min=torch.finfo(total.dtype).tiny) for name, total in sums.items()}


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
        ValueError: grouped key heads in a model of gohgraph's own, or names that are not the model's.

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
        for name, order in orders.items():
            permute_heads(attentions[name], order)
        return orders
    inner, conversion = converted(model)
    _check_names(orders, conversion.sizes)
    for name, order in orders.items():
        sites_at(inner, name).order_heads(order)
    return orders


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


def _projections(model: nn.Module, example: dict[str, Any] | None) -> dict[str, tuple[nn.Module, int]]:
    """Output projection and number of heads of every attention module."""
    if own_models.is_own(model):
        return {name: (block.output, block.num_heads) for name, block in own_models.attentions(model).items()}
    blocks = find_blocks(model, example).blocks.values()
    return {block.name: (block.projection, block.num_heads) for block in blocks if block.projection is not None}


@contextmanager
def _outputs_of_heads(projections: dict[str, tuple[nn.Module, int]]):
    """Keeps what each output projection reads, `[B, T, H*D]`."""
    outputs: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable[..., Any]:
        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            # A frozen model has no gradients of its own here.
            outputs[name] = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
            return (outputs[name], *args[1:])

        return keep

    hooks = [module.register_forward_pre_hook(keeper(name)) for name, (module, _) in projections.items()]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _eval(model: nn.Module):
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _check_names(given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"Expected names among {sorted(known)} (got {unknown}). Do measure this very model.")
