"""How much edges matter, estimated for all of them at once."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from gohgraph.analysis.interventions import check_intervention, fills, weights_of
from gohgraph.analysis.losses import Loss, batch_loss
from gohgraph.analysis.record import head_graphs
from gohgraph.common.checks import check_probability


def edge_attribution(
    model: nn.Module, loss: Loss, batches: Sequence[Any], *, replace: str = "zero", at: float = 0.5
) -> dict[str, Tensor]:
    r"""Estimates what `edge_ablation` measures, for all edges at once, by the slope of the loss.

    .. math::
        \Delta_e \approx \sum_t \big(\bar\alpha_e - \alpha_e(t)\big)\,
        \frac{\partial L}{\partial \alpha_e(t)} \Big|_{\alpha + \tau (\bar\alpha - \alpha)}

    alpha-bar is 0 or the mean over tokens; the slope is taken where all edges are a part tau of the way there. One
    forward and one backward pass a batch, and one more forward pass for the mean.

    Source: attribution patching between edges (Syed et al. 2023, arXiv 2310.10348, equation 2), at tau = 0; there the
    other value comes from a corrupted input, here it is the edge's absence. tau = 1/2 is the midpoint rule for the
    integrated gradient (Sundararajan et al. 2017, arXiv 1703.01365): it orders the edges of trained graphs much better,
    at no cost.

    Args:
        model, loss, batches, replace: as in `edge_ablation`.
        at: tau, where the slope is taken, in [0, 1].

    Example:
        >>> import gohgraph as goh
        >>> conv = goh.HeadGraphConv(goh.head_graph(2), head_dim=2, context_dim=3, edges="static")
        >>> edge_attribution(conv, lambda conv, z: conv(z).square().mean(), [torch.ones(5, 2, 2)])[""].tolist()
        [0.0, 0.0, 0.0, 0.0]
    """
    graphs = head_graphs(model)
    check_intervention(replace, None, batches)
    check_probability("at", at)
    fill = fills(graphs, model, loss, batches, replace)
    totals = {name: torch.zeros(conv.edges.num_edges).double() for name, conv in graphs.items()}
    seen: list[tuple[str, Tensor, Tensor]] = []
    with ExitStack() as hooks:
        for name, conv in graphs.items():
            for weights, value in zip(weights_of(conv), fill[name], strict=True):
                hooks.enter_context(weights.register_forward_hook(_moving(name, value, at, seen)))
        for batch in batches:
            seen.clear()
            with torch.enable_grad():
                value = batch_loss(model, loss, batch)
            grads = torch.autograd.grad(value, [zero for _, _, zero in seen], allow_unused=True)
            for (name, change, _), grad in zip(seen, grads, strict=True):
                if grad is not None:
                    rise = (change * grad).cpu().double().flatten(0, -2).sum(dim=0)  # [E]
                    totals[name] += rise / len(batches)
    return totals


def _moving(
    name: str, value: Tensor, at: float, seen: list[tuple[str, Tensor, Tensor]]
) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    # The gradient of a zero that is added counts the later contexts that the weight changes, too.
    def move(module: nn.Module, inputs: Any, alpha: Tensor) -> Tensor:
        zero = torch.zeros_like(alpha).requires_grad_()
        change = value.to(alpha.dtype) - alpha
        seen.append((name, change.detach(), zero))
        return alpha + at * change + zero

    return move
