"""How much edges matter, by taking them out one after the other."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gohgraph.analysis.interventions import check_intervention, fills, weights_of
from gohgraph.analysis.losses import Loss, mean_loss
from gohgraph.analysis.record import head_graphs
from gohgraph.graphs.edge_graph import EdgeGraph


def edge_ablation(
    model: nn.Module,
    loss: Loss,
    batches: Sequence[Any],
    *,
    replace: str = "zero",
    sample: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    r"""Measures what the loss becomes without an edge, for one edge after the other.

    .. math:: \Delta_e = L(\alpha_e := 0) - L

    An edge is taken out in all rounds of its graph. One pass over the batches for every edge: `edge_attribution`
    estimates all of them at once.

    Args:
        model: used as it is; call `model.eval()` first.
        loss: of `(model, batch)`: a scalar, or an output with `.loss`.
        batches: a list of what `loss` takes.
        replace: `"zero"` takes the edge out, `"mean"` leaves it its mean over the tokens of the batches, so that only
            what it does differently from token to token is lost.
        sample: measures so many edges, drawn evenly from all with `seed`; `None` for all.

    Returns:
        The rise of the loss, `[E]` by head graph; NaN where it was not measured.

    Example:
        >>> import gohgraph as goh
        >>> conv = goh.HeadGraphConv(goh.head_graph(2), head_dim=2, context_dim=3, edges="static")
        >>> edge_ablation(conv, lambda conv, z: conv(z).square().mean(), [torch.ones(5, 2, 2)])[""].tolist()
        [0.0, 0.0, 0.0, 0.0]
    """
    graphs = head_graphs(model)
    check_intervention(replace, sample, batches)
    edges = [(name, e) for name, conv in graphs.items() for e in range(conv.edges.num_edges)]
    effects = {name: torch.full((conv.edges.num_edges,), torch.nan).double() for name, conv in graphs.items()}
    if sample is not None and sample < len(edges):
        drawn = torch.randperm(len(edges), generator=torch.Generator().manual_seed(seed))[:sample]
        edges = [edges[number] for number in sorted(drawn.tolist())]
    fill = fills(graphs, model, loss, batches, replace)
    base = mean_loss(model, loss, batches)
    for name, e in tqdm(edges, desc="ablation", unit="edge", disable=None, leave=False):
        with _without(graphs[name], e, fill[name]):
            effects[name][e] = mean_loss(model, loss, batches) - base
    return effects


@contextmanager
def _without(conv: EdgeGraph, edge: int, fill: Sequence[Tensor]) -> Iterator[None]:
    def replace(value: Tensor, module: nn.Module, inputs: Any, alpha: Tensor) -> Tensor:
        alpha = alpha.clone()
        alpha[..., edge] = value[:, edge].to(alpha.dtype)
        return alpha

    with ExitStack() as hooks:
        for weights, value in zip(weights_of(conv), fill, strict=True):
            hooks.enter_context(weights.register_forward_hook(partial(replace, value)))
        yield
