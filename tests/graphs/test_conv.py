"""Head-graph convolution against its definition, written out edge by edge."""

from __future__ import annotations

import copy

import networkx
import pytest
import torch
from helpers import compiled
from torch import nn
from torch.utils.checkpoint import checkpoint

import gohgraph as goh

B, T, H, D, M = 2, 7, 5, 3, 11
GRAPHS = {
    "complete": ("complete", {}),
    "ring": ("ring", {"hops": 2}),
    "random": ("random", {"in_degree": 3, "seed": 1}),
    "star": ("star", {"center": 1}),
    "empty": ("empty", {}),
}
EDGES = [
    {"edges": "token"},
    {"edges": "token", "activation": None},
    {"edges": "token", "rank": 2},
    {"edges": "static"},
    {"edges": "frozen"},
    {"edges": "token", "norm": True},
    {"edges": "token", "rounds": 3},
    {"edges": "token", "rounds": 2, "rank": 2, "norm": True},
    {"edges": "token", "cross_layer": 2},
    {"edges": "token", "cross_layer": 1, "rounds": 2, "norm": True},
]
TOP_EDGES = {"edges": "token", "top_edges": 2}


def make(topology="complete", options=None, *, fresh=False, dtype=torch.float64, self_loops=True, **settings):
    graph = goh.head_graph(H, topology, self_loops=self_loops, **(options or {}))
    conv = goh.HeadGraphConv(graph, head_dim=D, context_dim=M, **settings).to(dtype)
    if not fresh:
        for parameter in conv.parameters():
            nn.init.normal_(parameter, std=0.5)
    return conv


def inputs(conv, dtype=torch.float64):
    z, x = torch.randn(B, T, H, D, dtype=dtype), torch.randn(B, T, M, dtype=dtype)
    earlier = [torch.randn(B, T, H, D, dtype=dtype) for _ in range(conv.cross_layer)]
    return z.requires_grad_(), x.requires_grad_(), earlier


def reference(conv, z, x, earlier):
    """The formula of the docstring, one edge and one round at a time."""
    senders, receivers = conv.edge_index.tolist()
    out, nodes = z.clone(), z
    for r in range(conv.rounds):
        weights = conv.edges
        alpha = weights.bias[r].expand(B, T, -1)
        if weights.weight is not None:
            low = x if weights.down is None else x @ weights.down[r].T
            alpha = alpha + low @ weights.weight[r].T
        alpha = alpha.tanh() if weights.activation == "tanh" else alpha
        pool = torch.cat([nodes, *earlier[: conv.cross_layer]], dim=2)
        if conv.gain is not None:
            eps = torch.finfo(z.dtype).eps
            pool = pool / (pool.square().mean(-1, keepdim=True) + eps).sqrt() * conv.gain
        message = torch.zeros_like(z)
        for e, (j, i) in enumerate(zip(senders, receivers, strict=True)):
            message[:, :, i] += alpha[:, :, e, None] * pool[:, :, j]
        fusion = 1.0 if conv.fusion is None else 1.0 + conv.fusion[r]
        out, nodes = out + fusion * message, nodes + message
    return out


def values_and_gradients(conv, function, z, x, earlier):
    leaves = [z, x, *conv.parameters()]
    out = function(z, x, earlier)
    torch.manual_seed(5)
    gradients = torch.autograd.grad((out * torch.randn_like(out)).sum(), leaves, allow_unused=True)
    return [out, *(torch.zeros(()) if g is None else g for g in gradients)]


@pytest.mark.parametrize("backend", ["dense", "pyg"])
@pytest.mark.parametrize("settings", EDGES, ids=str)
@pytest.mark.parametrize("graph", ["complete", "random"])
def test_equals_definition_in_value_and_gradient(graph, settings, backend):
    conv = make(*GRAPHS[graph], backend=backend, **settings)
    z, x, earlier = inputs(conv)
    expected = values_and_gradients(conv, lambda *a: reference(conv, *a), z, x, earlier)
    actual = values_and_gradients(conv, conv, z, x, earlier)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("self_loops", [True, False])
def test_backends_agree_on_every_topology(graph, self_loops):
    dense = make(*GRAPHS[graph], self_loops=self_loops)
    pyg = copy.deepcopy(dense)
    pyg.backend = "pyg"
    z, x, earlier = inputs(dense)
    a, b = (values_and_gradients(conv, conv, z, x, earlier) for conv in (dense, pyg))
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


def test_pyg_backend_calls_propagate(monkeypatch):
    conv = make(backend="pyg")
    calls = []
    monkeypatch.setattr(conv, "propagate", lambda *a, **k: calls.append(k) or torch.zeros(B, T, H, D))
    z, x, _ = inputs(conv)
    conv(z, x)
    assert calls[0]["size"] == (H, H)


@pytest.mark.parametrize("backend", ["dense", "pyg"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [s for s in [*EDGES, TOP_EDGES] if s["edges"] != "frozen"], ids=str)
def test_fresh_graph_returns_its_input_bit_for_bit(settings, dtype, backend):
    conv = make(fresh=True, dtype=dtype, backend=backend, **settings)
    z, x, earlier = inputs(conv, dtype)
    assert torch.equal(conv(z, x, earlier), z)


@pytest.mark.parametrize("settings", [{}, {"rank": 2}, {"top_edges": 1}], ids=str)
def test_fresh_graph_learns(settings):
    conv = make(fresh=True, **settings)
    z, x, _ = inputs(conv)
    conv(z, x).square().sum().backward()
    assert conv.edges.bias.grad.abs().min() > 0
    assert conv.edges.weight.grad.abs().max() > 0
    torch.optim.SGD(conv.parameters(), lr=1e-3).step()
    assert not torch.equal(conv(z, x), z)


def test_gradcheck():
    conv = make("ring", rank=2, norm=True)
    z, x, _ = inputs(conv)
    assert torch.autograd.gradcheck(lambda z, x: conv(z, x), (z[:1, :2], x[:1, :2]))


@pytest.mark.parametrize("graph", ["ring", "random", "star"])
def test_messages_follow_edges_and_stay_in_their_token(graph):
    conv = make(*GRAPHS[graph])
    z, x, _ = inputs(conv)
    jacobian = torch.autograd.functional.jacobian(lambda z: conv(z, x), z)  # [B, T, H, D, B, T, H, D]
    linked = jacobian.abs().sum(dim=(3, 7)).permute(2, 5, 0, 1, 3, 4)  # [receiver, sender, B, T, B, T]
    edges = set(map(tuple, conv.edge_index.t().tolist()))
    same_token = torch.eye(B * T, dtype=torch.bool).reshape(B, T, B, T)
    for i in range(H):
        for j in range(H):
            assert linked[i, j][~same_token].eq(0).all()
            assert linked[i, j][same_token].ne(0).all() == ((j, i) in edges or i == j)


def test_permuting_heads_permutes_the_result():
    conv = make(*GRAPHS["random"])
    order = torch.tensor([3, 0, 4, 1, 2])  # new head n is old head order[n]
    place = order.argsort()
    edges = [(int(place[j]), int(place[i])) for j, i in conv.edge_index.t().tolist()]
    permuted = make(edges, self_loops=False)
    where = {edge: e for e, edge in enumerate(map(tuple, permuted.edge_index.t().tolist()))}
    with torch.no_grad():
        for e, edge in enumerate(edges):
            permuted.edges.bias[:, where[edge]] = conv.edges.bias[:, e]
            permuted.edges.weight[:, where[edge]] = conv.edges.weight[:, e]
    z, x, _ = inputs(conv)
    torch.testing.assert_close(permuted(z[:, :, order], x), conv(z, x)[:, :, order])


def test_edge_weight_and_adjacency_agree_with_edge_index():
    conv = make("random", {"in_degree": 2}, cross_layer=1, rounds=2)
    x = torch.randn(B, T, M, dtype=torch.float64)
    for index in range(2):
        alpha, adjacency = conv.edge_weight(x, index), conv.adjacency(x, index)
        assert alpha.shape == (B, T, conv.edge_index.shape[1]) and adjacency.shape == (B, T, H, 2 * H)
        j, i = conv.edge_index
        assert torch.equal(adjacency[..., i, j], alpha)
        assert adjacency.count_nonzero() == alpha.numel()


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("is_routed", [False, True])
def test_matrix_is_the_map_of_all_rounds(is_routed, rounds):
    conv = make("ring", rounds=rounds)
    z, x, _ = inputs(conv)
    active = torch.rand(B, T, H) < 0.6 if is_routed else None
    torch.testing.assert_close(conv.matrix(x, active) @ z, conv(z, x, (), active))


def test_the_matrix_of_static_edges_needs_no_context():
    conv = make("ring", edges="static")
    assert conv.matrix().shape == (H, H) and conv.traits.static


@pytest.mark.parametrize("leading", [(), (T,), (2, 3, T)])
def test_any_leading_dimensions(leading):
    conv = make("ring")
    z, x = torch.randn(*leading, H, D).double(), torch.randn(*leading, M).double()
    flat = conv(z.reshape(-1, H, D), x.reshape(-1, M))
    torch.testing.assert_close(conv(z, x), flat.reshape(z.shape))


def test_deepcopy_and_state_dict_round_trip():
    conv, other = make("ring"), make("ring", fresh=True)
    z, x, _ = inputs(conv)
    other.load_state_dict(conv.state_dict())
    assert torch.equal(other(z, x), conv(z, x))
    assert torch.equal(copy.deepcopy(conv)(z, x), conv(z, x))


def test_weights_of_another_graph_are_refused():
    ring, other = make("ring"), make("random", {"in_degree": 1, "seed": 3})
    assert ring.edges.num_edges == other.edges.num_edges
    with pytest.raises(RuntimeError, match="Expected weights of this head graph"):
        other.load_state_dict(ring.state_dict())


def test_gradient_checkpointing_gives_the_same_gradients():
    conv = make(rounds=2)
    z, x, _ = inputs(conv)
    plain = torch.autograd.grad(conv(z, x).square().sum(), [z, x])
    saved = torch.autograd.grad(checkpoint(conv, z, x, use_reentrant=False).square().sum(), [z, x])
    for a, b in zip(plain, saved, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("settings", EDGES[:8], ids=str)
def test_autocast_bfloat16(settings):
    conv = make(dtype=torch.float32, **settings)
    z, x, earlier = inputs(conv, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        low = conv(z, x, earlier)
    low.float().sum().backward()
    torch.testing.assert_close(low.float(), conv(z, x, earlier), atol=0.3, rtol=0.1)
    assert all(p.grad.dtype == torch.float32 for p in conv.parameters())


def strongest_of(alpha, conv, count):
    """Edges kept, `[*, E]`: the `count` of largest |alpha| into each head, one token and one receiver at a time."""
    kept = torch.zeros_like(alpha, dtype=torch.bool)
    for own, marks in zip(alpha.reshape(-1, alpha.shape[-1]), kept.view(-1, alpha.shape[-1]), strict=True):
        for i in range(H):
            into = [e for e, receiver in enumerate(conv.edge_index[1].tolist()) if receiver == i]
            marks[sorted(into, key=lambda e: -own[e].abs())[:count]] = True
    return kept


TOP = [{}, {"edges": "static"}, {"rounds": 2}, {"cross_layer": 1}, {"rank": 2, "norm": True, "activation": None}]


@pytest.mark.parametrize("backend", ["dense", "pyg"])
@pytest.mark.parametrize("top_edges", [1, 2])
@pytest.mark.parametrize("settings", TOP, ids=str)
@pytest.mark.parametrize("graph", ["complete", "random", "star"])
def test_only_the_strongest_edges_carry_messages(graph, settings, top_edges, backend):
    conv = make(*GRAPHS[graph], top_edges=top_edges, backend=backend, **settings)
    whole = copy.deepcopy(conv)
    whole.top_edges = None
    z, x, earlier = inputs(conv)
    for r in range(conv.rounds):
        alpha = whole.edge_weight(x, r)
        kept = strongest_of(alpha, conv, top_edges)
        assert torch.equal(conv.edge_weight(x, r), torch.where(kept, alpha, 0.0))
        into = torch.zeros(*alpha.shape[:-1], H, dtype=torch.long)
        into.index_add_(-1, conv.edge_index[1], kept.long())
        assert (into == conv.edge_index[1].bincount(minlength=H).clamp(max=top_edges)).all()
    if conv.rounds == 1:
        cut = copy.deepcopy(whole)
        cut.edges.forward = lambda context: torch.where(kept, alpha, 0.0).unsqueeze(-2)
        assert torch.equal(conv(z, x, earlier), cut(z, x, earlier))
        assert not torch.allclose(conv(z, x, earlier), whole(z, x, earlier))


@pytest.mark.parametrize("backend", ["dense", "pyg"])
def test_dropped_edges_are_zero_in_the_jacobian_and_still_learn(backend):
    conv = make(top_edges=2, backend=backend)
    z, x, _ = inputs(conv)
    jacobian = torch.autograd.functional.jacobian(lambda z: conv(z, x), z)
    size = torch.einsum("btidbtje->btij", jacobian.abs())  # [B, T, H, H]
    kept = conv.adjacency(x).ne(0) | torch.eye(H, dtype=torch.bool)
    assert torch.equal(size > 0, kept) and not kept.all()
    # The gradient of an edge is that of the sum with all its edges, dropped or not.
    own = torch.autograd.grad((conv(z, x) ** 2).sum(), conv.edges.bias)[0]
    alpha, y = conv.edges(x).squeeze(-2), conv(z, x).detach()
    j, i = conv.edge_index
    expected = (2 * (y[:, :, i] * z[:, :, j]).sum(-1) * (1 - alpha**2)).sum(dim=(0, 1))
    torch.testing.assert_close(own[0], expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("settings", TOP, ids=str)
@pytest.mark.parametrize("graph", ["complete", "random"])
def test_as_many_top_edges_as_there_are_change_no_bit(graph, settings):
    conv = make(*GRAPHS[graph], top_edges=2 * H, **settings)
    whole = copy.deepcopy(conv)
    whole.top_edges = None
    z, x, earlier = inputs(conv)
    for own, expected in zip(
        values_and_gradients(conv, conv, z, x, earlier), values_and_gradients(whole, whole, z, x, earlier), strict=True
    ):
        assert torch.equal(own, expected)


def test_top_edges_compete_among_active_heads():
    conv = make(top_edges=2)
    z, x, _ = inputs(conv)
    active = (torch.arange(H) != 3).expand(B, T, H)
    linked = active[..., conv.edge_index[0]] & active[..., conv.edge_index[1]]
    alpha = torch.where(linked, conv.edges(x).squeeze(-2), 0.0)
    weight = conv.edge_weight(x, active=active)
    assert torch.equal(weight, torch.where(strongest_of(alpha, conv, 2), alpha, 0.0))
    into = torch.zeros(B, T, H, dtype=torch.long).index_add_(-1, conv.edge_index[1], weight.ne(0).long())
    assert into[0, 0].tolist() == [2, 2, 2, 0, 2]
    assert torch.equal(conv(z, x, active=active)[:, :, 3], z[:, :, 3])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["dense", "pyg"])
def test_compiles_to_one_graph(backend):
    conv = make("ring", rounds=2, backend=backend)
    z, x, _ = inputs(conv)
    # Machine code of the form that trains is built in every run.
    built = torch.compile(conv, fullgraph=True) if backend == "dense" else compiled(conv)
    torch.testing.assert_close(built(z, x), conv(z, x))
    gradients = (torch.autograd.grad(f(z, x).square().sum(), [z, x]) for f in (built, conv))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["dense", "pyg"])
def test_exports(backend):
    conv = make("ring", backend=backend).eval()
    z, x, _ = inputs(conv)
    program = torch.export.export(conv, (z.detach(), x.detach()))
    torch.testing.assert_close(program.module()(z.detach(), x.detach()), conv(z, x).detach())


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"edges": "learned"}, ValueError, "Expected edges of"),
        ({"rank": 0}, ValueError, "Expected rank to be an int >= 1"),
        ({"rank": 2, "edges": "static"}, ValueError, "Expected rank=None"),
        ({"activation": "relu"}, ValueError, "Expected activation"),
        ({"rounds": 0}, ValueError, "Expected rounds to be an int >= 1"),
        ({"cross_layer": -1}, ValueError, "Expected cross_layer"),
        ({"backend": "cuda"}, ValueError, "Expected backend"),
        ({"top_edges": 0}, ValueError, "Expected top_edges"),
        ({"top_edges": True}, TypeError, "Expected top_edges"),
    ],
)
def test_impossible_options(settings, error, match):
    with pytest.raises(error, match=match):
        make(**settings)


def test_wrong_inputs():
    conv = make(cross_layer=1)
    z, x, earlier = inputs(conv)
    with pytest.raises(ValueError, match=r"Expected nodes of shape \[\*, 5, D\]"):
        conv(z[:, :, :4], x, earlier)
    with pytest.raises(ValueError, match="Expected a context of shape"):
        conv(z, x[..., :4], earlier)
    with pytest.raises(ValueError, match="Expected a context of shape"):
        conv(z, None, earlier)
    with pytest.raises(ValueError, match="Expected the nodes of 1 layers before"):
        conv(z, x)
    with pytest.raises(TypeError, match="Expected a PyG Data"):
        goh.HeadGraphConv(networkx.complete_graph(H), D, M)
    with pytest.raises(ValueError, match="Expected a graph that is linear in the nodes"):
        conv.matrix(x)
