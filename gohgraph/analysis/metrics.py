"""Metrics of a behaviour: one number for each example, from what a model returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

IGNORED = -100


def logit_difference(right: Tensor, wrong: Tensor, *, at: Tensor | int = -1) -> Callable[[Any], Tensor]:
    """Returns the metric logit(right) - logit(wrong).

    Args:
        right, wrong: tokens or classes, `[B]` each.
        at: the token whose logits count, a number or one for each example, `[B]`; of a classifier they are all.

    Example:
        >>> from types import SimpleNamespace
        >>> output = SimpleNamespace(logits=torch.tensor([[[0.0, 0.0, 0.0], [1.0, 5.0, 2.0]]]))
        >>> logit_difference(torch.tensor([1]), torch.tensor([0]))(output).tolist()
        [4.0]
    """

    def metric(output: Any) -> Tensor:
        logits = _at(logits_of(output), at)  # [B, V]
        tokens = torch.stack([right, wrong], dim=1).to(logits.device)  # [B, 2]
        first, second = logits.gather(1, tokens).unbind(dim=1)
        return first - second

    return metric


def log_probability(labels: Tensor, *, shift: bool = True) -> Callable[[Any], Tensor]:
    """Returns the metric of the mean log probability of given tokens, in nats.

    Args:
        labels: `[B, T]`, tokens at their own places and -100 elsewhere; or classes `[B]`.
        shift: the logits before a token predict it (causal models); else those at its place (masked models).

    Example:
        >>> from types import SimpleNamespace
        >>> output = SimpleNamespace(logits=torch.zeros(1, 2, 4))
        >>> round(log_probability(torch.tensor([[-100, 3]]))(output).item(), 4)
        -1.3863
    """

    def metric(output: Any) -> Tensor:
        logits = logits_of(output)
        tokens = labels.to(logits.device)
        if tokens.dim() == 1:
            return logits.log_softmax(dim=-1).gather(1, tokens[:, None]).squeeze(1)
        if shift:
            logits, tokens = logits[:, :-1], tokens[:, 1:]
        known = tokens != IGNORED  # [B, T]
        likelihoods = logits.log_softmax(dim=-1).gather(2, tokens.clamp(min=0).unsqueeze(-1)).squeeze(-1)  # [B, T]
        return torch.where(known, likelihoods, 0.0).sum(dim=1) / known.sum(dim=1).clamp(min=1)

    return metric


def label_loss(labels: Tensor, *, shift: bool = True) -> Callable[[Any], Tensor]:
    """Returns the metric of each example's mean cross entropy in nats: minus `log_probability`."""
    likelihood = log_probability(labels, shift=shift)
    return lambda output: -likelihood(output)


def embedding_share(own: Tensor, other: Tensor, pool: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    r"""Returns the metric of how far an encoder's embedding has come from another input's to this one's.

    .. math:: m = \frac{\langle e - e',\; e_0 - e' \rangle}{\| e_0 - e' \|^2}

    It is 1 where the embedding is that of this input, 0 where it is the other's.

    Args:
        own, other: e_0 and e', the embeddings of both inputs, `[B, M]`.
        pool: what the model returns -> embeddings e, `[B, M]`.

    Example:
        >>> metric = embedding_share(torch.tensor([[2.0, 0.0]]), torch.zeros(1, 2), pool=lambda output: output)
        >>> metric(torch.tensor([[1.0, 5.0]])).tolist()
        [0.5]
    """
    way = own - other  # [B, M]
    return lambda output: ((pool(output) - other) * way).sum(dim=-1) / way.square().sum(dim=-1)


def logits_of(output: Any) -> Tensor:
    """Returns the logits of what a model returned: an object, or a dictionary as for transformers' Trainer."""
    return output["logits"] if isinstance(output, dict) else output.logits


def _at(logits: Tensor, at: Tensor | int) -> Tensor:
    if logits.dim() == 2:
        return logits
    if isinstance(at, int):
        return logits[:, at]
    return logits[torch.arange(len(logits), device=logits.device), at.to(logits.device)]
