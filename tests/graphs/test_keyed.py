"""Score graphs with weights of the key's token: the wide form and the slow form against sums over edges."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_equal_to, trained_like

import gohgraph as goh
from gohgraph.attention.cache import KeyValueCache
from gohgraph.attention.call import Call
from gohgraph.attention.forms import explain
from gohgraph.graphs.keyed import KeyedGraphConv
from gohgraph.graphs.protocol import Messages
from gohgraph.models.embeddings import RotaryPositions

B, T, S, H, D = 2, 7, 11, 6, 4
M = H * D
GRAPHS = {
    "ring": ("ring", {"hops": 2}),
    "no loops": ("ring", {"hops": 1, "self_loops": False}),
    "star": ("star", {}),
    "complete": ("complete", {}),
    "own gate": ("empty", {}),
}


def conv(graph="ring", **options):
    topology, settings = GRAPHS[graph]
    return trained_like(KeyedGraphConv(goh.head_graph(H, topology, **settings), D, M, **options))


@pytest.mark.parametrize("options", [{}, {"rank": 3}, {"edges": "static"}, {"activation": None}], ids=str)
@pytest.mark.parametrize("graph", GRAPHS)
def test_equals_the_sum_over_edges(graph, options):
    graphs, maps = conv(graph, **options), torch.randn(B, T, H, S).double()
    x, source = torch.randn(B, T, M).double(), torch.randn(B, S, M).double()
    alpha, beta = graphs.edge_weight(x).expand(B, T, -1), graphs.key_state(source)
    expected = torch.zeros_like(maps)
    loops = {i for j, i in graphs.edge_index.t().tolist() if i == j}
    for head in set(range(H)) - loops:
        expected[:, :, head] = maps[:, :, head]
    for e, (j, i) in enumerate(graphs.edge_index.t().tolist()):
        w = alpha[..., e] + (1 if i == j else 0)  # [B, T]
        expected[:, :, i] += w.unsqueeze(-1) * (1 + beta[..., e]).unsqueeze(1) * maps[:, :, j]
    assert_equal_to(graphs(maps, x, keys=beta), expected)


@pytest.mark.parametrize("kv_heads", [None, 2])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("graph", ["ring", "no loops", "own gate"])
def test_wide_heads_equal_the_slow_form(graph, causal, kv_heads):
    settings = {"causal": causal, "rotary": RotaryPositions(D), "num_kv_heads": kv_heads}
    wide = trained_like(goh.MultiHeadAttention(M, H, score_graph=conv(graph), **settings))
    x, results = torch.randn(B, T, M).double().requires_grad_(), []
    for wide.form in ("wide", "maps"):
        y = wide(x)[0]
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *wide.parameters()])])
    for fast, slow in zip(*results, strict=True):
        assert_equal_to(fast, slow)


@pytest.mark.parametrize("graph", ["ring", "complete"])
@torch.no_grad()
def test_a_cache_keeps_the_weights_of_the_keys(graph):
    module = trained_like(goh.MultiHeadAttention(M, H, causal=True, score_graph=conv(graph)))
    x, cache = torch.randn(B, T, M).double(), KeyValueCache()
    steps = [module(x[:, a:b], cache=cache)[0] for a, b in ((0, 3), (3, 4), (4, T))]
    assert_equal_to(torch.cat(steps, dim=1), module(x)[0])
    assert cache.read()[2].shape == (B, T, 1, module.score_graph.edges.num_edges)


@pytest.mark.parametrize("graph", ["ring", "complete"])
def test_a_fresh_graph_changes_nothing(graph):
    topology, settings = GRAPHS[graph]
    fresh = KeyedGraphConv(goh.head_graph(H, topology, **settings), D, M)
    maps, x = torch.randn(B, T, H, S), torch.randn(B, T, M)
    assert torch.equal(fresh(maps, x, keys=fresh.key_state(torch.randn(B, S, M))), maps)


def test_weights_of_keys_learn_from_the_start_on_self_loops():
    """The product w u opens from zero: where w is 1, u has a gradient."""
    module = goh.MultiHeadAttention(M, H, score_graph=KeyedGraphConv(goh.head_graph(H, "ring"), D, M)).double()
    module(torch.randn(B, T, M).double())[0].square().sum().backward()
    graph = module.score_graph
    loops = graph.edge_index[0] == graph.edge_index[1]
    moved = graph.key_edges.weight.grad.abs().sum(dim=(0, 2)) > 0
    assert torch.equal(moved, loops) and graph.edges.weight.grad.abs().sum(dim=(0, 2)).gt(0).all()


@pytest.mark.parametrize("options", [{"rounds": 2}, {"cross_layer": 1}, {"norm": True}, {"top_edges": 2}], ids=str)
def test_only_plain_rounds(options):
    with pytest.raises(ValueError, match="Expected keyed edges of one plain round"):
        KeyedGraphConv(goh.head_graph(H), D, M, **options)


@pytest.mark.parametrize(("graph", "form"), [("ring", "wide"), ("complete", "maps")])
def test_sparse_graphs_run_wide_and_dense_ones_on_maps(graph, form):
    graphs, x, q = conv(graph), torch.randn(B, T, M).double(), torch.randn(B, T, H, D).double()
    assert explain(Call(q, q, q, scores=Messages(graphs, x, keys=graphs.key_state(x))))[form] == "taken"
