"""What models return: predictions, what to minimise, and what the routers did."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gohgraph.attention.routing import Routing
from gohgraph.graphs.config import HeadGraphConfig
from gohgraph.graphs.protocol import ALIGNMENT, Losses
from gohgraph.models.stacks import StackOutput

if TYPE_CHECKING:
    from gohgraph.models.models import LanguageModel, Transformer


class ModelOutput(NamedTuple):
    """What a model returns.

    Args:
        logits: `[B, T, V]`, or `[B, classes]` of a classifier.
        loss: what training minimises: `cross_entropy` plus, where there is one, `auxiliary_loss`; `None` without
            targets.
        routing: the `Routing` of every routed attention, in model order; empty without routers.
        auxiliary_loss: scalar, the weighted losses of routers and graph experts, each a mean over its blocks; `None`
            where the configuration gives none a weight.

    Example:
        >>> output = ModelOutput(torch.zeros(1, 3, 7), loss=torch.tensor(2.5), auxiliary_loss=torch.tensor(0.5))
        >>> output.cross_entropy.item()
        2.0
    """

    logits: Tensor
    loss: Tensor | None = None
    routing: tuple[Routing, ...] = ()
    auxiliary_loss: Tensor | None = None

    @property
    def cross_entropy(self) -> Tensor | None:
        """Mean cross entropy in nats; targets of -100 do not count. `None` without targets."""
        return self.loss if self.loss is None or self.auxiliary_loss is None else self.loss - self.auxiliary_loss


def model_output(
    logits: Tensor, cross_entropy: Tensor | None, stacks: Sequence[StackOutput], config: HeadGraphConfig | None
) -> ModelOutput:
    """Joins predictions and the auxiliary losses of the stacks that made them, under the weights of `config`."""
    routing = tuple(routing for stack in stacks for routing in stack.routings)
    auxiliary = None if config is None else _auxiliary_loss(routing, stacks, config)
    loss = cross_entropy if cross_entropy is None or auxiliary is None else cross_entropy + auxiliary
    return ModelOutput(logits, loss, routing, auxiliary)


def _auxiliary_loss(
    routing: Sequence[Routing], stacks: Sequence[StackOutput], config: HeadGraphConfig
) -> Tensor | None:
    # What a graph adds under a name of its own, it weighs itself.
    weights = {ALIGNMENT: config.alignment}
    added: Losses = {}
    for stack in stacks:
        for name, losses in stack.losses.items():
            added.setdefault(name, []).extend(losses)
    weighted: list[tuple[float, Sequence[Tensor | None]]] = [
        (weights.get(name, 1.0), losses) for name, losses in added.items()
    ]
    if config.routing is not None:
        weighted.append((config.routing.balance_loss, [decision.balance_loss for decision in routing]))
        weighted.append((config.routing.z_loss, [decision.z_loss for decision in routing]))
    # Decoding gives no losses.
    known = [(weight, [loss for loss in losses if loss is not None]) for weight, losses in weighted if weight]
    terms = [weight * torch.stack(losses).mean() for weight, losses in known if losses]
    return reduce(torch.add, terms) if terms else None


def logits_of(model: LanguageModel | Transformer, x: Tensor) -> Tensor:
    """Returns the logits `[*, V]` of the last hidden states `[*, M]`."""
    logits = F.linear(x, model.embedding.tokens.weight) if model.head is None else model.head(x)  # [B, T, V]
    cap = model.config.logit_cap
    return logits if cap is None else cap * torch.tanh(logits / cap)
