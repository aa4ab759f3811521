"""Does a circuit carry a behaviour? What is left of it when only the strongest edges do, and all others another run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gohgraph.analysis.against import Against, other_trace
from gohgraph.analysis.architectures import Wiring, wiring_of
from gohgraph.analysis.attribution_graph import Metric, metric_value
from gohgraph.analysis.circuit_run import run_patched
from gohgraph.analysis.learned_edges import learned_graphs
from gohgraph.analysis.traces import Trace, check_trace, evaluating, trace
from gohgraph.analysis.unit_network import OTHERS, UnitNodes
from gohgraph.common.checks import check_int, check_probability
from gohgraph.common.tables import markdown_table

if TYPE_CHECKING:
    from gohgraph.analysis.network import HeadNetwork

# Of MIB (Mueller et al. 2025, arXiv 2504.13151).
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
RANDOM = "random"
RESAMPLES = 1000


class Interval(NamedTuple):
    """A number and the bounds of its 95 % interval over examples (percentile bootstrap, 1,000 resamples, seed 0)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Faithfulness:
    """What `faithfulness` measured.

    Attributes:
        shares: of edges kept, `[S]`, rising.
        values: the metric, `[S, B]`, by the name of each order of edges.
        everything, nothing: the metric of the model as it is, and with all edges patched, `[B]`.
    """

    shares: tuple[float, ...]
    values: Mapping[str, Tensor]
    everything: Tensor
    nothing: Tensor

    def at(self, share: float, order: str = "network") -> Interval:
        """Returns f where a share of edges is kept."""
        place = self.shares.index(share)
        return self._interval(order, lambda f: f[place])

    def curve(self, order: str = "network") -> list[Interval]:
        """Returns f at every share."""
        return [self.at(share, order) for share in self.shares]

    def cpr(self, order: str = "network") -> Interval:
        """Returns the area under f over the share of edges: how much of the behaviour few edges carry."""
        return self._interval(order, self._area)

    def cmd(self, order: str = "network") -> Interval:
        """Returns the area between f and 1: how far the circuits are from the model, 0 the best."""
        return self._interval(order, lambda f: self._area((1 - f).abs()))

    def table(self) -> str:
        """Returns f at every share, CPR and CMD with their intervals as a table of Markdown, an order a column."""
        rows: list[tuple[str, Any]] = [(f"{share:.1%}", partial(self.at, share)) for share in self.shares]
        rows += [("CPR (1 is best)", self.cpr), ("CMD (0 is best)", self.cmd)]
        lines = [["edges kept", *self.values]]
        for label, measure in rows:
            cells = (measure(order) for order in self.values)
            lines.append([label, *(f"{value:.2f} [{low:.2f}, {high:.2f}]" for value, low, high in cells)])
        return markdown_table(lines)

    def _area(self, f: Tensor) -> Tensor:
        return torch.trapezoid(f, torch.tensor(self.shares, dtype=f.dtype), dim=0)

    def _interval(self, order: str, measure: Any) -> Interval:
        generator = torch.Generator().manual_seed(0)
        count = len(self.everything)
        draws = torch.randint(count, (RESAMPLES, count), generator=generator)
        again = measure(self._f(order, draws)).quantile(torch.tensor([0.025, 0.975], dtype=torch.double))
        value = measure(self._f(order, torch.arange(count)[None]))[0]
        return Interval(value.item(), *again.tolist())

    def _f(self, order: str, draws: Tensor) -> Tensor:
        """f of examples drawn, `[S, draws]`: a ratio of means, as single examples may have nothing to restore."""
        kept = self.values[order][:, draws].mean(dim=-1)  # [S, draws]
        whole, none = (values[draws].mean(dim=-1) for values in (self.everything, self.nothing))
        return (kept - none) / (whole - none)


def faithfulness(
    model: nn.Module, network: HeadNetwork, inputs: Any, *, against: Against, metric: Metric,
    shares: Sequence[float] = SHARES, beside: Mapping[str, HeadNetwork] | None = None, random: int = 3,
) -> Faithfulness:  # fmt: skip
    r"""Measures what is left of a behaviour when only a network's strongest edges carry it.

    .. math:: f = \frac{m(\text{kept}) - m(\text{none})}{m(\text{all}) - m(\text{none})}

    For every share, the edges of largest |mean| are kept; over all others, what their senders wrote under `against`
    arrives. Each reader has its own input for that. What is no node of the network (feed-forwards, if
    `attribution_graph` was not asked for them) hears everything, so that f of heads alone is f of the edges between
    heads.

    Source: f, CPR and CMD as in MIB, Mueller et al. 2025, arXiv 2504.13151; the areas are over the share itself.

    Args:
        model, inputs, against, metric: as in `attribution_graph`; best on other examples than the network was made of.
        network: of `attribution_graph` or `composition_graph`. Edges of head graphs that it has are patched as the
            others are: the message of the other run arrives. Their weights' contexts hear everything.
        shares: of edges kept, each in [0, 1].
        beside: networks of the same edges whose order is measured too, by name, e.g. `{"composition": ...}`.
        random: so many random orders (seeds 0, 1, ...), whose mean is "random"; 0 for none.

    Returns:
        Values under "network", the names in `beside`, and "random".

    Raises:
        ValueError: a network of another model or of other edges; shares that are none.

    Example:
        >>> import gohgraph as goh
        >>> model = goh.LanguageModel(goh.TransformerConfig(9, d_model=8, num_heads=2, num_layers=2, d_ff=8))
        >>> task = dict(against=torch.tensor([[4, 2, 3, 1]]), metric=lambda output: output.logits[:, -1, 2])
        >>> network = goh.attribution_graph(model, torch.tensor([[1, 2, 3, 1]]), **task)
        >>> measured = faithfulness(model, network, torch.tensor([[1, 2, 3, 1]]), **task, shares=(0.5, 1.0))
        >>> round(measured.at(1.0).value, 4), sorted(measured.values)
        (1.0, ['network', 'random'])
    """
    check_int("random", random, low=0)
    for share in shares:
        check_probability("a share", share)
    shares = tuple(sorted(set(shares)))
    orders = _orders(network, beside or {}, random)
    circuit = Circuit(model, network, inputs, against, metric)
    nothing = circuit.value(torch.zeros(network.num_edges, dtype=torch.bool))
    runs = [(name, share, score) for name, scores in orders.items() for share in shares for score in scores]
    kept_values: dict[tuple[str, float], list[Tensor]] = {}
    for name, share, score in tqdm(runs, desc="faithfulness", unit="run", disable=None, leave=False):
        kept_values.setdefault((name, share), []).append(circuit.value(strongest_share(score, share)))
    means = {key: torch.stack(values).mean(dim=0) for key, values in kept_values.items()}  # [B]
    values = {name: torch.stack([means[name, share] for share in shares]) for name in orders}  # [S, B]
    return Faithfulness(shares, values, circuit.everything, nothing)


def _orders(network: HeadNetwork, beside: Mapping[str, HeadNetwork], random: int) -> dict[str, list[Tensor]]:
    """Scores of edges `[E]` by name of their order; several of the random one."""
    orders = {"network": [network.mean.abs()]}
    for name, other in beside.items():
        if not torch.equal(other.edge_index, network.edge_index) or other.site != network.site:
            raise ValueError(f"Expected the same edges as {name!r} has (got others). Do make both of one model.")
        orders[name] = [other.mean.abs()]
    if random:
        generators = (torch.Generator().manual_seed(seed) for seed in range(random))
        orders[RANDOM] = [torch.rand(network.num_edges, generator=generator) for generator in generators]
    return orders


def edge_minimality(
    model: nn.Module, network: HeadNetwork, inputs: Any, *, against: Against, metric: Metric, share: float
) -> tuple[Tensor, Tensor]:
    """Returns what every kept edge is worth to a circuit: how far f falls when it is patched as well, one run an edge.

    Args:
        share: of the strongest edges, kept; the other arguments as in `faithfulness`.

    Returns:
        The numbers of the kept edges, strongest first, and the fall of f for each, `[K]`: near 0, it is not needed.
    """
    check_probability("share", share)
    circuit = Circuit(model, network, inputs, against, metric)
    kept = strongest_share(network.mean.abs(), share)
    chosen = network.mean.abs().argsort(descending=True, stable=True)[: int(kept.sum())]
    whole = circuit.value(kept).mean()
    span = circuit.everything.mean() - circuit.value(torch.zeros_like(kept)).mean()
    falls = []
    for edge in tqdm(chosen.tolist(), desc="minimality", unit="edge", disable=None, leave=False):
        without = kept.clone()
        without[edge] = False
        falls.append((whole - circuit.value(without).mean()) / span)
    return chosen, torch.stack(falls) if falls else torch.zeros(0)


def strongest_share(scores: Tensor, share: float) -> Tensor:
    """Returns which edges are the share of highest scores, bool `[E]`."""
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[scores.argsort(descending=True, stable=True)[: round(share * len(scores))]] = True
    return kept


class Circuit:
    """A model and a behaviour, to be run with any set of a network's edges.

    Attributes:
        everything: the metric of the model as it is, `[B]`.
    """

    def __init__(self, model: nn.Module, network: HeadNetwork, inputs: Any, against: Against, metric: Metric) -> None:
        self.model, self.inputs, self.metric = model, inputs, metric
        self.wiring: Wiring = wiring_of(model)
        named = set(network.graph) - {unit.name for unit in self.wiring.units}
        graphs = [one for one in learned_graphs(model, self.wiring) if one.name in named] if named else []
        self.table = UnitNodes(self.wiring, [kind for kind in OTHERS if kind in network.kind], graphs)
        self.blocks = edge_blocks(network, self.table)
        with evaluating(model):
            clean, output = trace(model, self.wiring, inputs, graphs=graphs)
            check_trace(clean, model, self.wiring)
            self.examples = len(clean.read[self.wiring.streams[0].name, -1])
            self.everything = self._metric(output)
            self.other: Trace = other_trace(model, self.wiring, inputs, against, clean, graphs)

    def value(self, kept: Tensor) -> Tensor:
        """Returns the metric `[B]` where only the kept edges, bool `[E]`, carry this run."""
        if kept.all():
            return self.everything
        patched = {key: ~kept[start:end].view(shape) for key, (start, end, shape) in self.blocks.items()}
        with evaluating(self.model):
            output = run_patched(self.model, self.wiring, self.table, self.inputs, self.other, patched)
        return self._metric(output)

    def _metric(self, output: Any) -> Tensor:
        with torch.no_grad():
            return metric_value(self.metric, output, self.examples).cpu().double()


def edge_blocks(
    network: HeadNetwork, table: UnitNodes
) -> dict[tuple[str, str], tuple[int, int, tuple[int, int]]]:
    """Returns where each reader's edges lie in a network, and their shape `[W, R]`; refuses one of another model."""
    blocks, start = {}, 0
    for reader in table.readers:
        shape = sum(len(writer.nodes) for writer in table.edges_into(reader)), len(reader.nodes)
        end = start + shape[0] * shape[1]
        # A composition graph may lack some kinds.
        if shape[0] and (network.graph[start:end], network.site[start:end]) == (
            [reader.unit] * (end - start), [reader.site] * (end - start)
        ):  # fmt: skip
            blocks[reader.unit, reader.site] = (start, end, shape)
            start = end
    for graph in table.learned:
        shape = (graph.edges.shape[1], 1)
        end = start + shape[0]
        if network.graph[start:end] == [graph.name] * shape[0]:
            blocks[graph.name, graph.site] = (start, end, shape)
            start = end
    if start != network.num_edges or network.label != table.columns["label"]:
        raise ValueError(
            f"Expected a network of this model (got {network.num_nodes} nodes and {network.num_edges} edges, of which "
            f"{start} are this model's). Do make it by attribution_graph or composition_graph."
        )
    return blocks


