"""Collecting what routers decide in a forward pass, so that their losses can be trained on."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gohgraph.attention.routing import HeadRouter, Routing
from gohgraph.common.modules import is_recomputed, working_modules


@contextmanager
def collect_routing(
    model: nn.Module, token_mask: Tensor | None = None, target_mask: Tensor | None = None
) -> Iterator[list[Routing]]:
    """Collects what the routers of a converted model decide while the block runs, whose outputs do not tell it.

    The list holds the decision of every call of a router, in order. Its losses can be trained on: see
    `gohgraph.models.model_output.model_output`. Gradient checkpointing is collected once, with its gradient.

    Args:
        model: with at least one router; gohgraph's own models return their routing, too.
        token_mask: bool `[B, T]`, True = a real token, for calls with so many tokens; others count all. Where the
            attention itself is told which tokens are padding, as torch's is, that counts.
        target_mask: the same for the decoder of an encoder-decoder, of which `token_mask` is the source's.

    Raises:
        ValueError: a model without routers.
        RuntimeError: gradient checkpointing with `use_reentrant=True`, which has no gradient here.

    Example:
        >>> import gohgraph as goh
        >>> attention = nn.TransformerEncoderLayer(8, 4, batch_first=True)
        >>> _ = goh.convert(attention, goh.HeadGraphConfig.moh(num_shared=1, top_k=2))
        >>> with collect_routing(attention) as routing:
        ...     _ = attention(torch.randn(2, 5, 8))
        >>> routing[0].active.shape, round(routing[0].load.sum().item(), 4)
        (torch.Size([2, 5, 4]), 3.0)
    """
    routers = [module for _, module in working_modules(model) if isinstance(module, HeadRouter)]
    if not routers:
        kind = type(model).__name__
        raise ValueError(f"Expected routers (got a {kind} without). Do convert it with HeadGraphConfig.moh(...).")
    collected: list[Routing] = []
    of_targets = _in_decoders(model)
    has_gradients = [False]

    def begin(module: nn.Module, inputs: Any) -> None:
        has_gradients[0] = torch.is_grad_enabled()

    def collect(router: nn.Module, inputs: Any, routing: Routing) -> None:
        # A deep copy of the model made inside the block carries this hook along.
        if any(router is one for one in routers) and not is_recomputed():
            if has_gradients[0] and not torch.is_grad_enabled() and router.routed.requires_grad:
                raise RuntimeError(
                    "Expected routers that are called with gradients (got gradient checkpointing of "
                    "use_reentrant=True, which loses those of the routing losses). Do set use_reentrant=False."
                )
            collected.append(routing)

    def tell_mask(router: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Any, ...] | None:
        mask = target_mask if id(router) in of_targets else token_mask
        is_told = len(inputs) > 1 and inputs[1] is not None
        return None if is_told or mask is None or inputs[0].shape[:-1] != mask.shape else (inputs[0], mask)

    with ExitStack() as hooks:
        hooks.enter_context(model.register_forward_pre_hook(begin))
        for router in routers:
            hooks.enter_context(router.register_forward_hook(collect))
            hooks.enter_context(router.register_forward_pre_hook(tell_mask))
        yield collected


def _in_decoders(model: nn.Module) -> set[int]:
    """The routers inside the decoders of encoder-decoders: their tokens are not those of the source."""
    found: set[int] = set()
    for module in model.modules():
        encoder, decoder = (getattr(module, name, None) for name in ("encoder", "decoder"))
        is_pair = getattr(getattr(module, "config", None), "is_encoder_decoder", True)
        if is_pair and isinstance(encoder, nn.Module) and isinstance(decoder, nn.Module):
            found |= {id(router) for router in decoder.modules()}
    return found
