from __future__ import annotations

import itertools

import networkx as nx
import numpy as np
import pytest
import torch
from torch_geometric.data import Data

from gohgraph import head_graph
from gohgraph.graphs.topologies import TOPOLOGIES


def edges_of(graph):
    return [tuple(edge) for edge in graph.edge_index.t().tolist()]


def both_ways(pairs):
    return {edge for j, i in pairs for edge in ((j, i), (i, j)) if j != i}


def cycle(num_heads, hops):
    return {(j, i) for j in range(num_heads) for i in range(num_heads) if 1 <= (i - j) % num_heads <= hops}


EXPECTED = [
    ("complete", 7, {}, set(nx.complete_graph(7, nx.DiGraph).edges)),
    ("complete", 1, {}, set()),
    ("ring", 7, {}, set(nx.cycle_graph(7, nx.DiGraph).edges)),
    ("ring", 7, {"hops": 3}, cycle(7, 3)),
    ("ring", 7, {"hops": 6}, set(nx.complete_graph(7, nx.DiGraph).edges)),
    ("ring", 2, {}, {(0, 1), (1, 0)}),
    ("ring", 1, {"hops": 0}, set()),
    ("star", 7, {}, both_ways(nx.star_graph(6).edges)),
    ("star", 7, {"center": 3}, both_ways((3, i) for i in range(7))),
    ("star", 1, {}, set()),
    ("bipartite", 7, {}, both_ways(nx.complete_bipartite_graph(3, 4).edges)),
    ("bipartite", 7, {"num_shared": 2}, both_ways(nx.complete_bipartite_graph(2, 5).edges)),
    ("bipartite", 7, {"num_shared": 0}, set()),
    ("bipartite", 1, {}, set()),
    ("groups", 6, {}, both_ways(nx.disjoint_union_all([nx.complete_graph(3)] * 2).edges)),
    ("groups", 6, {"num_groups": 3}, both_ways([(0, 1), (2, 3), (4, 5)])),
    ("groups", 7, {"num_groups": 7}, set()),
    ("groups", 6, {"ranks": 3}, both_ways([(0, 1), (2, 3), (4, 5)])),
    ("groups", 6, {"ranks": 2, "num_groups": 6}, set()),
    ("small-world", 11, {}, both_ways(nx.watts_strogatz_graph(11, 4, 0.1, seed=0).edges)),
    (
        "small-world",
        11,
        {"neighbors": 6, "rewire": 0.7, "seed": 5},
        both_ways(nx.watts_strogatz_graph(11, 6, 0.7, seed=5).edges),
    ),
    ("small-world", 1, {"neighbors": 0}, set()),
    ("empty", 7, {}, set()),
]
NAMES = [f"{name}-{num_heads}-{options}" for name, num_heads, options, _ in EXPECTED]


@pytest.mark.parametrize("self_loops", [True, False])
@pytest.mark.parametrize("name,num_heads,options,expected", EXPECTED, ids=NAMES)
def test_topologies_equal_their_definition(name, num_heads, options, expected, self_loops):
    graph = head_graph(num_heads, name, self_loops=self_loops, **options)
    edges = edges_of(graph)
    assert set(edges) == expected | ({(i, i) for i in range(num_heads)} if self_loops else set())
    assert edges == sorted(set(edges), key=lambda edge: edge[::-1])
    assert graph.num_nodes == num_heads
    assert graph.edge_index.dtype == torch.int64 and graph.edge_index.shape == (2, len(edges))
    assert graph.edge_index.is_contiguous() and graph.validate()


def test_every_topology_is_tested():
    assert {name for name, *_ in EXPECTED} | {"random"} == set(TOPOLOGIES)


@pytest.mark.parametrize("in_degree", [0, 1, 3, 6])
def test_random_draws_distinct_senders(in_degree):
    edges = edges_of(head_graph(7, "random", in_degree=in_degree, self_loops=False))
    receivers = [i for _, i in edges]
    assert [receivers.count(i) for i in range(7)] == [in_degree] * 7
    assert len(set(edges)) == len(edges) and all(j != i for j, i in edges)


def test_random_reaches_every_edge_and_follows_its_seed():
    drawn = [edges_of(head_graph(5, "random", seed=seed, self_loops=False)) for seed in range(40)]
    assert set(itertools.chain(*drawn)) == set(itertools.permutations(range(5), 2))
    assert drawn[3] == edges_of(head_graph(5, "random", seed=3, self_loops=False)) != drawn[4]


def test_building_a_graph_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    np.random.seed(3)
    expected = np.random.rand()
    np.random.seed(3)
    for name in ("random", "small-world"):
        head_graph(7, name)
    assert torch.equal(torch.get_rng_state(), state) and np.random.rand() == expected


PAIRS = [(2, 0), (0, 1), (4, 1), (3, 3)]
SAME_GRAPH = {
    "pairs": PAIRS,
    "lists": [list(pair) for pair in PAIRS],
    "generator": lambda: (pair for pair in PAIRS),
    "array": np.array(PAIRS),
    "tensor": torch.tensor(PAIRS).t(),
    "int32": torch.tensor(PAIRS, dtype=torch.int32).t(),
    "data": lambda: Data(edge_index=torch.tensor(PAIRS).t(), num_nodes=5),
    "digraph": lambda: add_edges(nx.DiGraph()),
    "multidigraph": lambda: add_edges(nx.MultiDiGraph()),
}


def add_edges(graph, pairs=PAIRS, num_heads=5):
    graph.add_nodes_from(range(num_heads))
    graph.add_edges_from(pairs)
    return graph


@pytest.mark.parametrize("form", SAME_GRAPH)
def test_given_edges_go_from_sender_to_receiver_in_one_order(form):
    topology = SAME_GRAPH[form]
    build = topology if callable(topology) else lambda: topology
    assert edges_of(head_graph(5, build(), self_loops=False)) == [(2, 0), (0, 1), (4, 1), (3, 3)]
    with_loops = edges_of(head_graph(5, build()))
    assert with_loops == [(0, 0), (2, 0), (0, 1), (1, 1), (4, 1), (2, 2), (3, 3), (4, 4)]


def test_undirected_networkx_edges_carry_both_ways():
    graph = add_edges(nx.Graph(), [(0, 3), (1, 1)])
    assert edges_of(head_graph(5, graph, self_loops=False)) == [(3, 0), (1, 1), (0, 3)]


def test_given_data_is_not_changed():
    data = Data(edge_index=torch.tensor(PAIRS).t(), num_nodes=5)
    before = data.edge_index.clone()
    head_graph(5, data).edge_index.zero_()
    assert torch.equal(data.edge_index, before)


REFUSED = [
    (ValueError, 0, "complete", {}),
    (ValueError, -3, "complete", {}),
    (TypeError, 5.0, "complete", {}),
    (TypeError, True, "complete", {}),
    (TypeError, "5", "complete", {}),
    (ValueError, 5, "circle", {}),
    (ValueError, 5, "ring", {"hop": 1}),
    (ValueError, 5, "complete", {"hops": 1}),
    (ValueError, 5, [(0, 1)], {"hops": 1}),
    (ValueError, 1, "ring", {}),
    *((ValueError, 5, "ring", {"hops": hops}) for hops in (-1, 5, 1.5, True, None)),
    *((ValueError, 5, "star", {"center": center}) for center in (-1, 5, 0.5)),
    *((ValueError, 5, "bipartite", {"num_shared": shared}) for shared in (-1, 6, 2.0)),
    *((ValueError, 6, "groups", {"num_groups": groups}) for groups in (0, 4, 7, 2.0)),
    *((ValueError, 8, "groups", {"ranks": ranks}) for ranks in (0, 3, 9, 2.0, None)),
    (ValueError, 8, "groups", {"num_groups": 2, "ranks": 4}),
    *((ValueError, 5, "small-world", {"neighbors": neighbors}) for neighbors in (-2, 6, 2.5, None)),
    *((ValueError, 5, "small-world", {"rewire": rewire}) for rewire in (-0.1, 1.1, float("nan"), "0.1", None)),
    *((ValueError, 5, "random", {"in_degree": in_degree}) for in_degree in (-1, 5, 1.5, None)),
    *((ValueError, 5, name, {"seed": seed}) for name in ("random", "small-world") for seed in (1.5, None, "a", -1)),
    (ValueError, 5, [(0, 5)], {}),
    (ValueError, 5, [(-1, 0)], {}),
    (ValueError, 5, [(0, 1), (2, 1), (0, 1)], {}),
    (ValueError, 5, torch.tensor([[0, 0], [1, 1]]), {}),
    (ValueError, 5, torch.tensor([0, 1]), {}),
    (ValueError, 5, torch.zeros(3, 2, dtype=torch.long), {}),
    *((TypeError, 5, torch.zeros(2, 1, dtype=dtype), {}) for dtype in (torch.bool, torch.float32)),
    (TypeError, 5, [(0.0, 1)], {}),
    (TypeError, 5, [(True, 0)], {}),
    (TypeError, 5, [(0, 1, 2)], {}),
    (TypeError, 5, [3], {}),
    (TypeError, 5, ["01"], {}),
    (TypeError, 5, None, {}),
    (TypeError, 5, 3, {}),
    (TypeError, 5, np.eye(5), {}),
    (ValueError, 5, Data(edge_index=torch.tensor([[0], [1]]), num_nodes=6), {}),
    (TypeError, 5, Data(num_nodes=5), {}),
    (ValueError, 5, nx.path_graph(4), {}),
    (ValueError, 5, nx.relabel_nodes(nx.path_graph(5), {0: "a"}), {}),
    (ValueError, 5, nx.relabel_nodes(nx.path_graph(5), {0: 5}), {}),
    (ValueError, 2, add_edges(nx.MultiDiGraph(), [(0, 1), (0, 1)], 2), {}),
]


@pytest.mark.parametrize("error,num_heads,topology,options", REFUSED)
def test_wrong_graphs_are_refused(error, num_heads, topology, options):
    # What is not a number at all is a TypeError.
    with pytest.raises((error, TypeError), match=r"(?s)^Expected .*\(got .*\)\. Do "):
        head_graph(num_heads, topology, **options)
