"""The loss a model has over batches: what ablation, attribution and pruning are measured by."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Of (model, batch): a scalar tensor, or an output with it as `.loss`, as in training.
Loss = Callable[[nn.Module, Any], Any]


def batch_loss(model: nn.Module, loss: Loss, batch: Any) -> Tensor:
    """Returns the scalar loss of one batch, without the losses of routers and experts where they are apart."""
    output = loss(model, batch)
    if isinstance(output, Tensor):
        return output
    return output.cross_entropy if hasattr(output, "cross_entropy") else output.loss


@torch.no_grad()
def mean_loss(model: nn.Module, loss: Loss, batches: Sequence[Any]) -> float:
    """Returns the mean loss over batches, at least one, which weigh the same."""
    check_batches(batches)
    return sum(batch_loss(model, loss, batch).item() for batch in batches) / len(batches)


def check_batches(batches: Sequence[Any]) -> None:
    """Raises `ValueError` where there are no batches; an iterator would be used up by the first pass."""
    if not isinstance(batches, Sequence) or not batches:
        raise ValueError(f"Expected a list of at least one batch (got {type(batches).__name__}). Do pass a list.")
