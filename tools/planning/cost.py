"""What head graphs cost at scale: parameters, products and bytes between ranks of a step, from a description alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from gohgraph.attention.forms import WIDEST_IN_DEGREE
from gohgraph.graphs.config import HeadGraphConfig
from gohgraph.graphs.cross_layer import CrossLayer
from gohgraph.graphs.graph import head_graph
from gohgraph.graphs.site_config import Site, SiteConfig, parts_of
from gohgraph.parallel.exchange import SCATTER, plan_exchange
from gohgraph.parallel.sharded_graph import are_equal_runs


@dataclass(frozen=True)
class Workload:
    """A decoder-only model and its batch.

    Args:
        num_heads, num_layers, d_model, d_ff, vocab_size: H, L, M, F, V.
        length: T, tokens of a sequence.
        batch_size: B, sequences a step on each data-parallel rank.
        number_bytes: of an activation and of a gradient, 2 for bfloat16.
    """

    num_heads: int
    num_layers: int
    d_model: int
    d_ff: int
    vocab_size: int = 32_000
    length: int = 4096
    batch_size: int = 1
    number_bytes: float = 2

    @property
    def tokens(self) -> int:
        """B * T."""
        return self.batch_size * self.length

    @property
    def parameters(self) -> int:
        """Of the model without head graphs, biases and norms left out."""
        return self.num_layers * (4 * self.d_model**2 + 2 * self.d_model * self.d_ff) + self.vocab_size * self.d_model


@dataclass(frozen=True)
class Cluster:
    """The ranks and what joins them.

    Args:
        tensor, pipeline, data: ranks of each kind of parallelism.
        is_sharded: data-parallel ranks shard parameters (FSDP) instead of adding gradients (DDP).
        tflops: of a rank as reached in training, 10^12 a second.
        tensor_gigabytes, pipeline_gigabytes, data_gigabytes: a second, that a rank sends over each kind of link.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    is_sharded: bool = False
    tflops: float = 400.0
    tensor_gigabytes: float = 400.0
    pipeline_gigabytes: float = 50.0
    data_gigabytes: float = 50.0


@dataclass(frozen=True)
class Cost:
    """Of one training step on one rank, forward and backward; of head graphs what they add.

    Args:
        parameters: of the whole model.
        flops: two a product and sum.
        tensor_bytes, pipeline_bytes, data_bytes: sent by a rank, see `Traffic`.
    """

    parameters: float = 0
    flops: float = 0
    tensor_bytes: float = 0
    pipeline_bytes: float = 0
    data_bytes: float = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def seconds(self, cluster: Cluster) -> float:
        """Time of a step where nothing overlaps: the upper end."""
        links = (
            (self.tensor_bytes, cluster.tensor_gigabytes),
            (self.pipeline_bytes, cluster.pipeline_gigabytes),
            (self.data_bytes, cluster.data_gigabytes),
        )
        return self.flops / (cluster.tflops * 1e12) + sum(sent / (speed * 1e9) for sent, speed in links)


def plain_cost(model: Workload, cluster: Cluster) -> Cost:
    """Returns the cost of the model without head graphs: matrices 6 a parameter and token, causal attention half.

    Example:
        >>> model = Workload(num_heads=32, num_layers=32, d_model=4096, d_ff=16384)
        >>> round(plain_cost(model, Cluster()).parameters / 1e9, 1)
        6.6
    """
    attention = 6 * model.num_layers * model.length * model.d_model
    flops = model.tokens * (6 * model.parameters + attention) / (cluster.tensor * cluster.pipeline)
    # Attention and feed-forward each add over ranks once forward and once backward.
    block = model.tokens * model.d_model * model.number_bytes
    tensor = 4 * _all_reduce(block, cluster.tensor) * model.num_layers / cluster.pipeline
    pipeline = 2 * block / cluster.tensor if cluster.pipeline > 1 else 0
    return Cost(model.parameters, flops, tensor, pipeline, _data_bytes(model.parameters, model, cluster))


def graph_cost(graphs: HeadGraphConfig, model: Workload, cluster: Cluster) -> Cost:
    """Returns what head graphs at outputs and scores and a router add to `plain_cost`.

    Raises:
        ValueError: heads or layers that the ranks do not divide.

    Example:
        >>> model = Workload(num_heads=32, num_layers=32, d_model=4096, d_ff=16384)
        >>> ring = HeadGraphConfig(SiteConfig.ring(4))
        >>> round(100 * graph_cost(ring, model, Cluster()).parameters / model.parameters, 2)
        0.26
    """
    if model.num_layers % cluster.pipeline:
        raise ValueError(
            f"Expected pipeline ranks to divide {model.num_layers} layers (got {cluster.pipeline}). Do change either."
        )
    total = Cost()
    outputs, scores = _graphs(graphs.outputs), _graphs(graphs.scores)
    for parts, over_maps in ((outputs, False), (scores, True)):
        for part in parts:
            total += _site_cost(part, model, cluster, over_maps)
    if graphs.routing is not None:
        total += _router_cost(model, cluster)
    layers = model.num_layers
    here = layers / cluster.pipeline
    parameters = total.parameters * layers
    waits = sum(_layers_before(part, model) for part in outputs) if cluster.pipeline > 1 else 0
    later = 2 * waits * model.tokens * model.d_model * model.number_bytes / cluster.tensor
    data = _data_bytes(parameters, model, cluster)
    return Cost(parameters, total.flops * here, total.tensor_bytes * here, later, data)


def _graphs(site: Site | None) -> list[SiteConfig]:
    """The modules of a site; raises `ValueError` where one is no head graph."""
    parts = [part for part in parts_of(site) if isinstance(part, SiteConfig)]
    if others := [part for part in parts_of(site) if not isinstance(part, SiteConfig)]:
        raise ValueError(f"Expected head graphs to plan (got {others[0]!r}). Do leave baselines out.")
    return parts


def _site_cost(site: SiteConfig, model: Workload, cluster: Cluster, over_maps: bool) -> Cost:
    """Of one site in one layer."""
    heads, width, ranks = model.num_heads, model.d_model // model.num_heads, cluster.tensor
    graph = head_graph(heads, site.topology, self_loops=site.self_loops, **site.options)
    edges = [(j, i) for j, i in graph.edge_index.t().tolist()]
    before, rounds, of_token = _layers_before(site, model), site.rounds, site.edges == "token"
    across = CrossLayer.of(site.cross_layer).pairs(edges, heads) if before else []
    layers, count = 1 + before, (len(edges) + len(across) * before) * rounds
    inner = model.d_model if site.rank is None else site.rank
    down = rounds * site.rank * model.d_model if of_token and site.rank is not None else 0
    own = count * (of_token * inner + (site.edges != "frozen"))
    shared = down + (rounds if rounds > 1 else 0) + (layers * width * heads if site.norm else 0)
    exchange = plan_exchange(heads, ranks, [*edges, *across], may_scatter=not over_maps and site.top_edges is None)
    # Where every rank has not equally many edges, all hold all of them and add up their gradients.
    by_receiver = sorted([*edges, *((j + heads, i) for j, i in across)], key=lambda edge: edge[::-1])
    is_split = are_equal_runs(exchange.edges_of_ranks(by_receiver))
    reduced = shared + (0 if is_split or site.edges == "frozen" else own)
    features = 2 * width if over_maps else width * (1 if exchange.kind == SCATTER else layers)
    # Forward and backward: an all-gather and a reduce-scatter, in whichever order.
    moved = 2 * rounds * ranks * exchange.width * features * model.tokens
    sent = (moved * (ranks - 1) / ranks + 2 * reduced * (ranks - 1) / ranks) * model.number_bytes
    flops = 2 * (count * inner * of_token + down) + _message_flops(site, model, len(edges), over_maps)
    return Cost(own + shared, 3 * model.tokens * flops / ranks, sent)


def _layers_before(site: SiteConfig, model: Workload) -> float:
    """How many earlier layers send to a layer, on average."""
    cross = CrossLayer.of(site.cross_layer)
    return sum(cross.at(layer).count for layer in range(model.num_layers)) / model.num_layers


def _message_flops(site: SiteConfig, model: Workload, edges: int, over_maps: bool) -> float:
    """Forward, of a token: the dense product of an adjacency with the nodes; wide heads where these stand in for it."""
    heads, width = model.num_heads, model.d_model // model.num_heads
    if not over_maps:
        return 2 * site.rounds * heads * heads * (1 + _layers_before(site, model)) * width
    in_degree = edges / heads
    if site.rounds == 1 and in_degree <= WIDEST_IN_DEGREE:
        return (in_degree - 1) * 4 * model.d_model * model.length / 2
    return 2 * site.rounds * heads * heads * model.length


def _router_cost(model: Workload, cluster: Cluster) -> Cost:
    """Every rank decides for all heads; the gradients of its gates are gathered, in float32."""
    parameters = (model.num_heads + 2) * model.d_model
    gates = max(4, model.number_bytes) * model.tokens * model.num_heads
    return Cost(parameters, 6 * model.tokens * parameters, gates * (cluster.tensor - 1) / cluster.tensor)


def _data_bytes(parameters: float, model: Workload, cluster: Cluster) -> float:
    held = parameters * model.number_bytes / (cluster.tensor * cluster.pipeline)
    # Sharded, parameters are gathered forward and backward, and gradients scattered: half as much again.
    return _all_reduce(held, cluster.data) * (1.5 if cluster.is_sharded else 1)


def _all_reduce(size: float, ranks: int) -> float:
    return 2 * size * (ranks - 1) / ranks
