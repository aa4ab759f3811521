"""Every way to compute messages over features against the product with the whole adjacency."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gohgraph as goh
from gohgraph.graphs import chunked, conv, dense, token_edges, ways
from gohgraph.graphs.chunked import add_in_chunks
from gohgraph.graphs.edge_tables import num_runs
from gohgraph.graphs.token_edges import TokenEdges

B, T, H, D, M = 2, 13, 6, 5, 7
CHUNKED = {
    "full": {},
    "linear": {"activation": None},
    "low rank": {"rank": 3},
    "norm": {"norm": True},
    "groups": {"topology": "groups"},
    "of three": {"topology": "groups", "num_groups": 3},
}
GATHERED = {
    "ring": {"topology": "ring"},
    "ring of three": {"topology": "ring", "hops": 2},
    "random": {"topology": "random"},
    "star": {"topology": "star"},
    "no loops": {"topology": "ring", "self_loops": False},
    "top edges": {"topology": "ring", "hops": 2, "top_edges": 2},
    "norm": {"topology": "ring", "norm": True},
    "rounds": {"topology": "ring", "rounds": 2},
    "layers": {"topology": "ring", "cross_layer": 1, "norm": True},
    "routed": {"topology": "ring"},
}


def make(topology="complete", num_heads=H, head_dim=D, **settings):
    torch.manual_seed(0)
    options = {name: settings.pop(name) for name in ("hops", "num_groups", "self_loops") if name in settings}
    graph = goh.head_graph(num_heads, topology, **options)
    made = goh.HeadGraphConv(graph, head_dim, M, **settings).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def inputs(made, dtype=torch.float64):
    z, x = torch.randn(B, T, made.num_heads, made.head_dim, dtype=dtype), torch.randn(B, T, M, dtype=dtype)
    earlier = [torch.randn_like(z) for _ in range(made.cross_layer)]
    return z.requires_grad_(), x.requires_grad_(), earlier


def values_and_gradients(made, z, x, *rest):
    y = made(z, x, *rest)
    torch.manual_seed(5)
    leaves = [z, x, *made.parameters()]
    return [y, *torch.autograd.grad((y * torch.randn_like(y)).sum(), leaves, allow_unused=True)]


def assert_equal(ones, others):
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-11)


def spied(monkeypatch, name):
    calls, function = [], getattr(conv, name)
    monkeypatch.setattr(conv, name, lambda *arguments: calls.append(1) or function(*arguments))
    return calls


@pytest.fixture
def in_chunks(monkeypatch):
    """Small graphs in chunks of four tokens; yields how often."""
    monkeypatch.setattr(ways, "FROM_WEIGHTS", 0)
    monkeypatch.setattr(ways, "KEPT_NUMBERS", 0)
    monkeypatch.setattr(token_edges, "CHUNK_NUMBERS", 1)
    monkeypatch.setattr(token_edges, "FEWEST_TOKENS", 4)
    return spied(monkeypatch, "add_in_chunks")


@pytest.fixture
def gathered(monkeypatch):
    monkeypatch.setattr(ways, "FROM_WEIGHTS", 0)
    monkeypatch.setattr(ways, "CELLS_A_NUMBER", 0)
    return spied(monkeypatch, "add_gathered")


# 7 * M numbers a token: of 36 edges those of the first 7 tokens of every 13, one chunk of four and more.
@pytest.mark.parametrize("kept", [0, 3, 100])
@pytest.mark.parametrize("case", CHUNKED)
def test_in_chunks_of_tokens(monkeypatch, in_chunks, case, kept):
    monkeypatch.setattr(chunked, "KEPT_NUMBERS", kept)
    made = make(**CHUNKED[case])
    z, x, _ = inputs(made)
    results = values_and_gradients(made, z, x)
    made.backend = "pyg"
    assert_equal(results, values_and_gradients(made, z, x))
    assert len(in_chunks) == 1


@pytest.mark.parametrize("case", GATHERED)
def test_gathered_edge_by_edge(gathered, case):
    made = make(**GATHERED[case])
    z, x, earlier = inputs(made)
    active = torch.rand(B, T, H) < 0.6 if case == "routed" else None
    results = values_and_gradients(made, z, x, earlier, active)
    assert len(gathered) == made.rounds
    made.backend = "pyg"
    assert_equal(results, values_and_gradients(made, z, x, earlier, active))


@pytest.mark.parametrize("edges", ["token", "static"])
def test_groups_are_products_of_their_own(monkeypatch, edges):
    made = make("groups", num_groups=3, edges=edges)
    z, x, _ = inputs(made)
    shapes, function = [], dense.add_product
    monkeypatch.setattr(dense, "add_product", lambda z, a, s: shapes.append(a.shape[-3:]) or function(z, a, s))
    results = values_and_gradients(made, z, x)
    assert shapes == [(3, 2, 2)]
    made.backend = "pyg"
    for one, other in zip(results, values_and_gradients(made, z, x), strict=True):
        assert one is other is None or torch.allclose(one, other, atol=1e-11, rtol=1e-11)
    # One token without further dimensions, too.
    made.backend = "dense"
    one = made(z[0, 0], x[0, 0])
    made.backend = "pyg"
    assert_equal([one], [made(z[0, 0], x[0, 0])])


@pytest.mark.parametrize("way, case", [("in_chunks", "complete"), ("gathered", "ring")])
def test_fresh_graphs_change_no_bit_and_second_gradients_are_right(request, way, case):
    calls = request.getfixturevalue(way)
    made = make(case, num_heads=4, head_dim=3)
    z, x, _ = inputs(made)
    assert torch.autograd.gradgradcheck(lambda z, x: made(z, x), (z[:1, :2], x[:1, :2]))
    made.reset_parameters()
    assert torch.equal(made(z, x), z) and calls


@pytest.mark.parametrize("frozen", ["edges.weight", "edges.bias", "both", "nodes"])
def test_gradients_that_nobody_asks_for_are_left_out(in_chunks, frozen):
    made = make()
    z, x, _ = inputs(made)
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(frozen not in (name, "both"))
    nodes = z.detach() if frozen == "nodes" else z
    made(nodes, x).square().sum().backward()
    found = [x.grad, *(p.grad for p in made.parameters() if p.requires_grad)]
    x.grad = None
    made.zero_grad()
    made.backend = "pyg"
    made(nodes, x).square().sum().backward()
    assert_equal(found, [x.grad, *(p.grad for p in made.parameters() if p.requires_grad)])
    assert in_chunks and len(found) == {"both": 1, "nodes": 3}.get(frozen, 2)


@pytest.mark.parametrize("way, case", [("in_chunks", "complete"), ("gathered", "ring")])
@pytest.mark.parametrize("how", ["vmap", "func.grad", "jvp", "bfloat16", "autocast", "trace"])
def test_elsewhere_the_simple_way_runs(request, way, case, how):
    calls = request.getfixturevalue(way)
    made, slow = make(case).float(), None
    z, x, _ = (each if isinstance(each, list) else each.detach() for each in inputs(made, torch.float32))
    if how == "bfloat16":
        made, z, x = made.bfloat16(), z.bfloat16(), x.bfloat16()
    slow = copy.deepcopy(made)
    slow.backend = "pyg"

    def run(function):
        if how == "vmap":
            return torch.func.vmap(function)(z, x)
        if how == "func.grad":
            return torch.func.grad(lambda z: function(z, x).square().sum())(z)
        if how == "jvp":
            return torch.func.jvp(lambda z: function(z, x), (z,), (x.mean() * z,))[1]
        if how == "trace":
            return torch.jit.trace(function, (z, x), check_trace=False)(z, x)
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            return function(z, x)

    loose = {"atol": 0.1, "rtol": 0.1} if how in ("bfloat16", "autocast") else {}
    torch.testing.assert_close(run(made).float(), run(slow).float(), **loose)
    assert not calls


def test_hooks_on_edges_are_called(in_chunks):
    made = make()
    z, x, _ = inputs(made)
    seen = []
    made.edges.register_forward_hook(lambda module, arguments, alpha: seen.append(alpha.shape))
    made(z, x)
    assert seen == [(B, T, 1, H * H)] and not in_chunks


@pytest.mark.parametrize("heads, taken", [(2, 0), (6, 1)])
def test_chunks_are_for_more_edges_than_a_feed_forward_has_numbers(monkeypatch, heads, taken):
    monkeypatch.setattr(ways, "FROM_WEIGHTS", 1)
    calls = spied(monkeypatch, "add_in_chunks")
    made = make(num_heads=heads)
    made(*inputs(made)[:2])
    assert len(calls) == taken


def test_runs_are_found_where_edges_are_in_order():
    edges = [(j, i) for j, i in goh.head_graph(6, "groups", num_groups=2).edge_index.t().tolist()]
    assert num_runs(edges, 6, 6) == 2
    assert num_runs(edges[::-1], 6, 6) == num_runs(edges[1:], 6, 6) == num_runs(edges, 6, 12) == num_runs([], 6, 6) == 0


def test_memory_of_chunks_does_not_hold_all_weights():
    """64 heads over 256 numbers of context: of 4,096 edges a token those of a fourth of the tokens are kept."""
    z, x = torch.randn(2048, 64, 1, requires_grad=True), torch.randn(2048, 256)
    edges = TokenEdges(x, torch.randn(4096, 256), torch.randn(4096), True, 64)
    y = add_in_chunks(z, z, edges)
    saved = [each for each in y.grad_fn.next_functions[0][0].saved_tensors if each.shape[-1] == 4096]
    assert [each.shape for each in saved if each.dim() == 2] == [(512, 4096)]
