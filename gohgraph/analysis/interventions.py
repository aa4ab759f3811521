"""What ablation and attribution put in the place of an edge's weight."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

from torch import Tensor, nn

from gohgraph.analysis.losses import Loss, check_batches, mean_loss
from gohgraph.analysis.running_stats import Moments
from gohgraph.common.checks import check_choice, check_int
from gohgraph.graphs.edge_graph import EdgeGraph
from gohgraph.graphs.edges import EdgeWeights

REPLACEMENTS = ("zero", "mean")


def weights_of(conv: EdgeGraph) -> list[EdgeWeights]:
    """Returns what gives a graph's weights: one module, and that of the keys' side where edges are keyed."""
    return [conv.edges, cast(EdgeWeights, conv.key_edges)] if conv.traits.keyed else [conv.edges]


def fills(
    graphs: Mapping[str, EdgeGraph], model: nn.Module, loss: Loss, batches: Sequence[Any], replace: str
) -> dict[str, list[Tensor]]:
    """Returns what takes the place of every edge's weight, `[R, E]` for each of `weights_of`."""
    moments = {
        name: [Moments((weights.rounds, weights.num_edges)) for weights in weights_of(conv)]
        for name, conv in graphs.items()
    }
    if replace == "mean":
        with ExitStack() as hooks:
            for name, conv in graphs.items():
                for weights, seen in zip(weights_of(conv), moments[name], strict=True):
                    observe = weights.register_forward_hook(lambda _, inputs, alpha, seen=seen: seen.update(alpha))
                    hooks.enter_context(observe)
            mean_loss(model, loss, batches)
    device = next(iter(graphs.values())).edge_index.device
    return {name: [part.mean.float().to(device) for part in parts] for name, parts in moments.items()}


def check_intervention(replace: str, sample: int | None, batches: Sequence[Any]) -> None:
    """Refuses no batches, an unknown replacement, or a sample below 1."""
    check_batches(batches)
    check_choice("replace", replace, REPLACEMENTS)
    if sample is not None:
        check_int("sample", sample, low=1)
