"""Collecting what routers decide in a forward pass, so that their losses can be trained on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from gohgraph.attention.routing import HeadRouter, Routing


@contextmanager
def collect_routing(model: nn.Module, token_mask: Tensor | None = None) -> Iterator[list[Routing]]:
    """Collects what the routers of a converted model decide while the block runs, whose outputs do not tell it.

    The list holds the decision of every call of a router, in order. Its losses can be trained on: see
    `gohgraph.models.model_output.model_output`.

    Args:
        model: with at least one router; gohgraph's own models return their routing, too.
        token_mask: bool `[B, T]`, True = a real token, for calls with so many tokens; others count all.

    Example:
        >>> import torch
        >>> import gohgraph as goh
        >>> attention = nn.TransformerEncoderLayer(8, 4, batch_first=True)
        >>> _ = goh.convert(attention, goh.HeadGraphConfig.moh(num_shared=1, top_k=2))
        >>> with collect_routing(attention) as routing:
        ...     _ = attention(torch.randn(2, 5, 8))
        >>> routing[0].active.shape, round(routing[0].load.sum().item(), 4)
        (torch.Size([2, 5, 4]), 3.0)
    """
    routers = [module for module in model.modules() if isinstance(module, HeadRouter)]
    if not routers:
        kind = type(model).__name__
        raise ValueError(f"Expected routers (got a {kind} without). Do convert it with HeadGraphConfig.moh(...).")
    collected: list[Routing] = []

    def collect(router: nn.Module, inputs: Any, routing: Routing) -> None:
        # A deep copy of the model made inside the block carries this hook along.
        if any(router is one for one in routers):
            collected.append(routing)

    def tell_mask(router: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Any, ...] | None:
        fits = token_mask is not None and inputs[0].shape[:-1] == token_mask.shape
        return (inputs[0], token_mask) if fits else None

    hooks = [router.register_forward_hook(collect) for router in routers]
    hooks += [router.register_forward_pre_hook(tell_mask) for router in routers]
    try:
        yield collected
    finally:
        for hook in hooks:
            hook.remove()
