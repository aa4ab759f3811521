"""Training of learned topologies: edges fall away until every head has its budget of them."""

from typing import TYPE_CHECKING, cast

from torch import nn

from gohgraph.graphs.edge_graph import EdgeGraph
from gohgraph.learning.router_training import annealed_top_k

if TYPE_CHECKING:
    from gohgraph.graphs.learned_topology import LearnedTopologyConv


class TopologyTraining:
    """What a training step does with the learned topologies of a model; nothing where it has none.

    Args:
        model: its `LearnedTopologyConv`s are pruned.
        anneal_in_degree: steps over which the in-degree falls from all edges to each graph's own budget, linearly,
            rounded; 0 leaves all edges. A model without learned topologies has nothing to anneal.
    """

    def __init__(self, model: nn.Module, anneal_in_degree: int = 0) -> None:
        self.anneal_in_degree = anneal_in_degree
        graphs = (module for module in model.modules() if isinstance(module, EdgeGraph))
        self.graphs = [cast("LearnedTopologyConv", graph) for graph in graphs if graph.traits.learned]
        if anneal_in_degree and not self.graphs:
            kind = type(model).__name__
            raise ValueError(
                f"Expected learned topologies for anneal_in_degree = {anneal_in_degree} (got a {kind} without). "
                "Do set it to 0."
            )
        self._last: list[int] = [0] * len(self.graphs)

    def begin(self, step: int) -> None:
        """Prunes the graphs whose budget has fallen; the first step sees all edges."""
        if not self.anneal_in_degree or step == 0:
            return
        for place, graph in enumerate(self.graphs):
            largest = graph.largest_in_degree
            k = annealed_top_k(step, self.anneal_in_degree, largest, min(graph.in_degree, largest))
            if k != self._last[place]:
                graph.prune(k)
                self._last[place] = k
