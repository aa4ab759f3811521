"""Taking edges out of trained head graphs."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gohgraph.analysis.losses import Loss, mean_loss
from gohgraph.analysis.record import head_graphs
from gohgraph.analysis.strength import edge_strength
from gohgraph.common.checks import check_probability
from gohgraph.common.modules import check_writable

Module = TypeVar("Module", bound=nn.Module)
KEEP = (1.0, 0.8, 0.6, 0.4, 0.3, 0.2, 0.1, 0.05, 0.0)


def prune(model: Module, keep: float = 0.2, scores: Mapping[str, Tensor] | None = None) -> Module:
    """Returns a copy of a model whose head graphs have lost their weakest edges, for good.

    The edges of all graphs are ordered together, ties by their place in the model; `edge_index` and the weights of the
    copy have the kept ones alone. It trains on, and `save_pretrained` and `from_pretrained` keep it as it is.

    Args:
        model: with head graphs; left as it is.
        keep: share of edges that stay, in [0, 1].
        scores: of edges, `[E]` by head graph, those of the highest stay: `edge_strength` of a recording,
            `edge_attribution`, `edge_ablation`, ... `None` for `edge_strength(model)`, which needs no data. A strong
            edge need not be an important one: where there is data, attribution prunes much better.

    Raises:
        ValueError: a model without head graphs, a share out of [0, 1], scores of another model or NaN among them, or
            edges whose weights are computed anew before every call, shared, quantised, on meta or offloaded.

    Example:
        >>> import gohgraph as goh
        >>> shape = dict(d_model=20, num_heads=5, num_layers=2, d_ff=8)
        >>> model = goh.LanguageModel(goh.TransformerConfig(9, **shape, head_graph=goh.HeadGraphConfig()))
        >>> goh.head_graph_of(model).num_edges, goh.head_graph_of(prune(model, keep=0.2)).num_edges
        (50, 10)
    """
    graphs = head_graphs(model)
    check_probability("keep", keep)
    check_writable(model, [conv.edges for conv in graphs.values()], ("bias", "weight"))
    scores = edge_strength(model) if scores is None else scores
    numbers = [conv.edges.num_edges for conv in graphs.values()]
    if {name: len(values) for name, values in scores.items()} != dict(zip(graphs, numbers, strict=True)):
        raise ValueError(f"Expected a score for each edge of {list(graphs)} (got {list(scores)}). Do score this model.")
    values = torch.cat([scores[name].cpu().double() for name in graphs])  # [edges]
    if values.isnan().any():
        raise ValueError("Expected scores of all edges (got NaN at some). Do score every edge, without a sample.")
    stays = torch.zeros(len(values), dtype=torch.bool)
    stays[values.argsort(descending=True, stable=True)[: round(keep * len(values))]] = True
    pruned = deepcopy(model)
    for conv, edges in zip(head_graphs(pruned).values(), stays.split(numbers), strict=True):
        conv.keep_edges(edges)
    return pruned


def pruning_curve(
    model: nn.Module,
    loss: Loss,
    batches: Sequence[Any],
    orders: Mapping[str, Mapping[str, Tensor]],
    keep: Sequence[float] = KEEP,
) -> dict[str, list[tuple[float, float]]]:
    """Measures the loss of pruned models: by order of edges, the (share of edges kept, loss) of each.

    Args:
        model: used as it is; call `model.eval()` first.
        loss, batches: as in `edge_ablation`.
        orders: name of each order and its scores, as `prune` takes them.
        keep: shares of edges that stay.

    Example:
        >>> import gohgraph as goh
        >>> conv = goh.HeadGraphConv(goh.head_graph(4, "ring"), head_dim=2, context_dim=3, edges="static")
        >>> loss = lambda conv, z: conv(z).square().mean()
        >>> pruning_curve(conv, loss, [torch.ones(5, 4, 2)], {"random": random_scores(conv)}, (1, 0.5))
        {'random': [(1, 1.0), (0.5, 1.0)]}
    """
    points = [(name, share) for name in orders for share in keep]
    curves: dict[str, list[tuple[float, float]]] = {name: [] for name in orders}
    for name, share in tqdm(points, desc="pruning", unit="model", disable=None, leave=False):
        curves[name].append((share, mean_loss(prune(model, share, orders[name]), loss, batches)))
    return curves


def random_scores(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Returns random scores of a model's edges, `[E]` by head graph: the order any other has to beat."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(conv.edges.num_edges, generator=generator) for name, conv in head_graphs(model).items()}
