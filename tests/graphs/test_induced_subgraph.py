"""Under a router a token's head graph is the induced subgraph of its active heads: by exact zeros, and by networkx."""

from __future__ import annotations

import copy

import pytest
import torch
from networkx import DiGraph
from torch import nn

import gohgraph as goh
from gohgraph.attention.cache import KeyValueCache
from gohgraph.graphs.experts import GraphExperts

B, T, H, D, M = 2, 3, 7, 5, 35
TOPOLOGIES = {
    "complete": ("complete", {}),
    "ring": ("ring", {"hops": 2}),
    "random": ("random", {"in_degree": 3, "seed": 1}),
    "bipartite": ("bipartite", {"num_shared": 3}),
}
SETTINGS = [
    {},
    {"edges": "static"},
    {"activation": None, "rank": 2},
    {"rounds": 2},
    {"rounds": 3, "edges": "static", "norm": True},
    {"cross_layer": 1, "norm": True},
    {"cross_layer": 1, "rounds": 3},
    {"top_edges": 2, "rounds": 2},
    {"experts": True},
    {"experts": True, "rounds": 3, "norm": True},
    {"experts": True, "cross_layer": 1},
]
settings = pytest.mark.parametrize("settings", SETTINGS, ids=str)
backends = pytest.mark.parametrize("backend", ["dense", "pyg"])


def drawn(module):
    """Weights as after training, small enough that tanh tells edges apart."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module.double()


def make(topology="ring", *, experts=False, **settings):
    name, options = TOPOLOGIES[topology]
    graph = goh.head_graph(H, name, **options)
    if experts:
        return drawn(GraphExperts(graph, D, M, num_shared=3, **settings))
    return drawn(goh.HeadGraphConv(graph, D, M, **settings))


def inputs(conv):
    """Nodes, context, earlier heads of which some were off, and active heads: between none and all of them."""
    z, x = torch.randn(B, T, H, D).double(), torch.randn(B, T, M).double()
    earlier = [z.roll(1, 0) * (torch.rand(B, T, H, 1) < 0.6) for _ in range(conv.cross_layer)]
    active = torch.rand(B, T, H) < 0.6
    active[0, 0], active[0, 1], active[0, 2] = True, False, torch.arange(H) == 3
    return z, x, earlier, active


def embeddings_of(conv):
    kinds = (torch.arange(H) >= conv.num_shared).long()
    return conv.kind_embedding[kinds] + conv.head_embedding


def slowly(conv, z, x, earlier, active):
    """One token at a time: networkx takes the induced subgraph, then its edges are summed one by one."""
    whole = DiGraph(conv.edge_index.t().tolist())
    whole.add_nodes_from(range(conv.num_senders))
    number = {edge: e for e, edge in enumerate(map(tuple, conv.edge_index.t().tolist()))}
    out = z.clone()
    for b in range(B):
        for t in range(T):
            on = [i for i in range(H) if active[b, t, i]]
            older = [H + n for n in range(conv.num_senders - H)]
            graph = whole.subgraph([*on, *older])
            alpha = conv.edges(x[b, t])  # [R, E]
            past = [e[b, t] for e in earlier]
            nodes = z[b, t]
            for r in range(conv.rounds):
                pool = torch.cat([nodes, *past])  # [S, D]
                off = [n for n in older if pool[n].eq(0).all()]
                if conv.gain is not None:
                    pool = pool / (pool.square().mean(-1, keepdim=True) + torch.finfo(z.dtype).eps).sqrt() * conv.gain
                if isinstance(conv, GraphExperts):
                    pool = pool + embeddings_of(conv).repeat(1 + conv.cross_layer, 1)
                received = torch.zeros(H, D).double()
                for i in on:
                    edges = [number[j, i] for j in graph.predecessors(i) if j not in off]
                    edges = sorted(edges, key=lambda e: -alpha[r, e].abs())[: conv.top_edges]
                    for e in edges:
                        received[i] += alpha[r, e] * pool[conv.edge_index[0, e]]
                fusion = 1.0 if conv.fusion is None else 1 + conv.fusion[r]
                out[b, t] += fusion * received
                nodes = nodes + received
    return out


@backends
@settings
@pytest.mark.parametrize("topology", ["random", "bipartite"])
@torch.no_grad()
def test_equals_sums_over_the_induced_subgraph(topology, settings, backend):
    conv = make(topology, backend=backend, **settings)
    given = inputs(conv)
    torch.testing.assert_close(conv(*given), slowly(conv, *given), rtol=0, atol=1e-10)


@backends
@settings
@torch.no_grad()
def test_all_heads_active_changes_no_bit(settings, backend):
    conv = make(backend=backend, **settings)
    z, x, earlier, active = inputs(conv)
    assert torch.equal(conv(z, x, earlier, torch.ones_like(active)), conv(z, x, earlier))
    none = conv(z, x, earlier, torch.zeros_like(active))
    assert torch.equal(none, z)


@pytest.mark.parametrize("index", [0, 1])
def test_edge_weights_and_adjacency_show_the_subgraph(index):
    conv = make("random", rounds=2)
    _, x, _, active = inputs(conv)
    senders, receivers = conv.edge_index
    linked = active[..., senders] & active[..., receivers]
    alpha = conv.edge_weight(x, index, active)
    assert torch.equal(alpha, torch.where(linked, conv.edge_weight(x, index), 0.0))
    assert torch.equal(conv.adjacency(x, index, active)[..., receivers, senders], alpha)
    assert make("random", edges="static").edge_weight(None, 0, active).shape == linked.shape


def reach(jacobian):
    """Whether head i depends on head j of the same token, `[B, T, H, H]`; other tokens must have no part in it."""
    linked = jacobian.abs().sum(dim=(3, 7)).permute(0, 1, 3, 4, 2, 5).flatten(0, 1).flatten(1, 2)  # [N, N, H, H]
    same = torch.eye(len(linked), dtype=torch.bool)
    assert linked[~same].eq(0).all()
    return linked[same].gt(0).unflatten(0, jacobian.shape[:2])


def steps(conv, active):
    """Whether a walk of at most R steps leads from j to i in a token's subgraph, `[B, T, H, H]` rows receive."""
    link = torch.zeros(H, conv.num_senders).double()
    link[conv.edge_index[1], conv.edge_index[0]] = 1.0
    both = (active.unsqueeze(-1) & active.unsqueeze(-2)).double()  # [B, T, H, H]
    return torch.linalg.matrix_power(torch.eye(H).double() + link[:, :H] * both, conv.rounds) > 0


@backends
@settings
@pytest.mark.parametrize("topology", ["complete", "ring"])
def test_jacobian_blocks_of_inactive_heads_are_exactly_zero(topology, settings, backend):
    conv = make(topology, backend=backend, **settings)
    z, x, earlier, active = inputs(conv)
    linked = reach(torch.autograd.functional.jacobian(lambda z: conv(z, x, earlier, active), z))
    expected = steps(conv, active)
    if conv.top_edges is None:
        assert torch.equal(linked, expected)
    else:
        assert (linked <= expected).all() and linked.sum() < expected.sum()


@backends
@pytest.mark.parametrize("settings", [s for s in SETTINGS if "cross_layer" in s], ids=str)
def test_earlier_heads_reach_active_heads_only(settings, backend):
    conv = make("complete", backend=backend, **settings)
    z, x, (past,), active = inputs(conv)
    jacobian = torch.autograd.functional.jacobian(lambda past: conv(z, x, [past], active), past)
    linked = reach(jacobian)
    was_on = past.ne(0).any(-1)
    assert not linked[~active].any()
    assert (linked | ~active.unsqueeze(-1))[was_on.unsqueeze(-2).expand_as(linked)].all()
    off = z.clone(), x, [torch.zeros_like(past)], active
    same_layer = copy.deepcopy(conv)
    with torch.no_grad():
        # Edges from earlier layers cut: what is left is the layer itself.
        older = conv.edge_index[0] >= H
        same_layer.edges.bias[:, older] = 0.0
        same_layer.edges.weight[:, older] = 0.0
        assert torch.equal(conv(*off), same_layer(*off))


# Experts know the order of their heads: the first ones are of one kind.
@pytest.mark.parametrize("settings", [s for s in SETTINGS if "experts" not in s], ids=str)
def test_permuting_heads_permutes_the_result(settings):
    conv = make("random", **settings)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])  # new head n is old head order[n]
    place = torch.cat([order.argsort() + layer * H for layer in range(1 + conv.cross_layer)])
    within = conv.edge_index[:, conv.edge_index[0] < H]
    edges = [(int(place[j]), int(place[i])) for j, i in within.t().tolist()]
    permuted = drawn(goh.HeadGraphConv(goh.head_graph(H, edges, self_loops=False), D, M, **settings))
    where = {edge: e for e, edge in enumerate(map(tuple, permuted.edge_index.t().tolist()))}
    moved = [where[int(place[j]), int(place[i])] for j, i in conv.edge_index.t().tolist()]
    with torch.no_grad():
        for name, value in conv.edges.named_parameters():
            target = getattr(permuted.edges, name)
            if name == "down":
                target.copy_(value)
            else:
                target[:, moved] = value
        if conv.fusion is not None:
            permuted.fusion.copy_(conv.fusion)
        if conv.gain is not None:
            permuted.gain.copy_(conv.gain[place.argsort()])
    z, x, earlier, active = inputs(conv)
    got = permuted(z[:, :, order], x, [e[:, :, order] for e in earlier], active[..., order])
    torch.testing.assert_close(got, conv(z, x, earlier, active)[:, :, order], rtol=0, atol=1e-10)


@pytest.mark.parametrize("settings", [{}, {"rounds": 2}, {"experts": True}], ids=str)
def test_inactive_heads_leave_no_gradient_in_their_edges(settings):
    conv = make("complete", **settings)
    z, x, _, _ = inputs(conv)
    active = (torch.arange(H) % 3 != 1).expand(B, T, H)
    conv(z, x, active=active).square().sum().backward()
    linked = active[0, 0][conv.edge_index[0]] & active[0, 0][conv.edge_index[1]]
    assert conv.edges.bias.grad[:, ~linked].eq(0).all() and conv.edges.bias.grad[:, linked].ne(0).all()


def router():
    return drawn(goh.HeadRouter(M, H, 2, 2))


def jacobian_through(submodule, run, value, replace):
    """Jacobian of `run()` in a value that a hook on `submodule` puts in place of what is there."""

    def function(value):
        handle = replace(submodule, value)
        try:
            return run()
        finally:
            handle.remove()

    return torch.autograd.functional.jacobian(function, value)


@backends
@settings
def test_attention_reads_out_the_subgraph(settings, backend):
    graph = make(backend=backend, **settings)
    module = goh.MultiHeadAttention(M, H, causal=True, router=router(), output_graph=graph).double()
    x = torch.randn(B, T, M).double()
    earlier = [torch.randn(B, T, H, D).double() for _ in range(graph.cross_layer)]
    heads = module(x, earlier=earlier)[1]
    active = heads.routing.active
    linked = reach(
        jacobian_through(
            graph,
            lambda: module(x, earlier=earlier)[1].outputs,
            torch.randn(B, T, H, D).double(),
            lambda conv, z: conv.register_forward_pre_hook(lambda _, inputs: (z, *inputs[1:])),
        )
    )
    expected = steps(graph, active) & active.unsqueeze(-1) & active.unsqueeze(-2)
    if graph.top_edges is None:
        assert torch.equal(linked, expected)
    assert (linked <= expected).all() and linked.sum(dim=(-1, -2)).gt(4).all()
    assert heads.outputs[~active].eq(0).all() and heads.outputs[active].ne(0).all()


@pytest.mark.parametrize("form", ["wide", "maps", "decode"])
def test_scores_of_inactive_heads_reach_no_head(form):
    graph = make("ring")
    module = goh.MultiHeadAttention(M, H, causal=True, router=router(), score_graph=graph).double()
    module.form = None if form == "decode" else form
    x, cache = torch.randn(B, 2 + T, M).double(), KeyValueCache()
    tokens = 1 if form == "decode" else T
    with torch.no_grad():
        module(x[:, :-tokens], cache=cache)

    def run():
        return module(x[:, -tokens:], cache=copy.deepcopy(cache))[1]

    linked = jacobian_through(
        module.query,
        lambda: run().outputs,
        torch.randn(B, tokens, H, D).double(),
        lambda query, q: query.register_forward_hook(lambda *_: q.flatten(-2)),
    )
    active = run().routing.active
    expected = steps(graph, active) & active.unsqueeze(-1) & active.unsqueeze(-2)
    assert torch.equal(reach(linked), expected)
