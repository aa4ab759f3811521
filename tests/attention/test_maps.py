"""Messages between attention scores: wide, eager and decode forms against `propagate` on scores."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gohgraph as goh
from gohgraph.attention.cache import KeyValueCache
from gohgraph.attention.call import Call, Mask
from gohgraph.attention.forms import attend, explain
from gohgraph.attention.maps import mixed_attention
from gohgraph.graphs.protocol import Messages
from gohgraph.models.embeddings import RotaryPositions

B, T, H, D = 2, 7, 6, 4
M = H * D
GRAPHS = {
    "ring 2": ("ring", {"hops": 1}),
    "ring 4": ("ring", {"hops": 3}),
    "irregular": ("star", {"center": 2}),
    "random": ("random", {"in_degree": 2}),
    "own gate": ("empty", {}),
}


def attention(topology, options, *, backend="dense", self_loops=True, fresh=False, rounds=1, **settings):
    torch.manual_seed(1)
    graph = goh.head_graph(H, topology, self_loops=self_loops, **options)
    conv = goh.HeadGraphConv(graph, D, M, backend=backend, rounds=rounds)
    if not fresh:
        for parameter in conv.parameters():
            nn.init.normal_(parameter, std=0.3)
    torch.manual_seed(2)
    return goh.MultiHeadAttention(M, H, score_graph=conv, **settings).double()


def values_and_gradients(module, x, **masks):
    x = x.clone().requires_grad_()
    y, _ = module(x, **masks)
    torch.manual_seed(5)
    return [y, *torch.autograd.grad((y * torch.randn_like(y)).sum(), [x, *module.parameters()])]


def assert_same(first, second, tolerance=1e-10):
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def padding_mask():
    keep = torch.ones(B, 1, 1, T, dtype=torch.bool)
    keep[1, ..., 5:] = False
    return keep


@pytest.mark.parametrize("mask", ["none", "padding"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [3])
@pytest.mark.parametrize("self_loops", [True, False])
@pytest.mark.parametrize("graph", GRAPHS)
def test_wide_equals_propagate_on_scores(graph, self_loops, kv_heads, causal, mask):
    settings = {"num_kv_heads": kv_heads, "causal": causal, "rotary": RotaryPositions(D), "self_loops": self_loops}
    fast = attention(*GRAPHS[graph], **settings)
    definition = attention(*GRAPHS[graph], backend="pyg", **settings)
    fast.form, definition.form = "wide", "maps"
    x = torch.randn(B, T, M).double()
    masks = {} if mask == "none" else {"keep_mask": padding_mask()}
    assert_same(values_and_gradients(fast, x, **masks), values_and_gradients(definition, x, **masks))


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("graph", ["ring 4", "complete"])
def test_eager_equals_propagate_on_scores(graph, rounds):
    topology = GRAPHS.get(graph, (graph, {}))
    fast = attention(*topology, rounds=rounds, causal=True)
    definition = attention(*topology, backend="pyg", rounds=rounds, causal=True)
    fast.form = definition.form = "maps"
    x = torch.randn(B, T, M).double()
    assert_same(values_and_gradients(fast, x), values_and_gradients(definition, x))


def test_definition_written_out():
    """softmax over s of the sum over edges of w_ji(t) a_j(t, s), by loops."""
    module = attention("ring", {"hops": 2}, causal=True)
    x = torch.randn(B, T, M).double()
    q, k, v = (f(x).unflatten(-1, (H, D)) for f in (module.query, module.key, module.value))
    alpha = module.score_graph.edge_weight(x)
    z = torch.zeros(B, T, H, D).double()
    for t in range(T):
        scores = torch.einsum("bhd,bshd->bhs", q[:, t], k[:, : t + 1]) / D**0.5
        mixed = scores.clone()
        for e, (j, i) in enumerate(module.score_graph.edge_index.t().tolist()):
            mixed[:, i] += alpha[:, t, e, None] * scores[:, j]
        z[:, t] = torch.einsum("bhs,bshd->bhd", mixed.softmax(-1), v[:, : t + 1])
    torch.testing.assert_close(module(x)[0], module.output(z.flatten(-2)), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kv_heads", [None, 2])
@pytest.mark.parametrize("graph", ["ring 2", "irregular", "complete"])
def test_decode_mixes_one_row_and_equals_the_whole(graph, kv_heads):
    module = attention(*GRAPHS.get(graph, (graph, {})), num_kv_heads=kv_heads, causal=True, rotary=RotaryPositions(D))
    x = torch.randn(B, T, M).double()
    whole, _ = module(x)
    cache = KeyValueCache()
    parts = [module(x[:, :3], cache=cache)[0]]
    parts += [module(x[:, t : t + 1], cache=cache)[0] for t in range(3, T)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-10, rtol=1e-10)
    assert cache.read()[0].shape == (B, T, kv_heads or H, D)


def test_cross_attention_with_more_keys_than_queries():
    fast, definition = attention("ring", {}), attention("ring", {}, backend="pyg")
    definition.form = "maps"
    x, memory = torch.randn(B, T, M).double(), torch.randn(B, 11, M).double()
    torch.testing.assert_close(fast(x, memory)[0], definition(x, memory)[0], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("form", ["wide", "maps"])
def test_rows_without_any_key_give_zeros(form):
    module = attention("ring", {})
    module.form = form
    keep = torch.ones(B, 1, T, T, dtype=torch.bool)
    keep[0, :, 2] = False
    x = torch.randn(B, T, M).double().requires_grad_()
    heads = module(x, keep_mask=keep)[1].outputs
    heads.sum().backward()
    assert heads[0, 2].eq(0).all() and x.grad.isfinite().all()


def test_fresh_wide_form_is_plain_attention_bit_for_bit():
    """The added products are exact zeros; at these sizes the kernel sums the others in the same order."""
    x = torch.randn(2, 64, 128)
    conv = goh.HeadGraphConv(goh.head_graph(2, "ring"), 64, 128)
    module = goh.MultiHeadAttention(128, 2, causal=True, score_graph=conv)
    plain = copy.deepcopy(module)
    plain.score_graph, module.form = None, "wide"
    assert torch.equal(module(x)[0], plain(x)[0])


@pytest.mark.parametrize("graph", [*GRAPHS, "complete"])
def test_fresh_score_graph_is_plain_attention(graph):
    module = attention(*GRAPHS.get(graph, (graph, {})), fresh=True, causal=True)
    plain = copy.deepcopy(module)
    plain.score_graph = None
    x = torch.randn(B, T, M).double()
    torch.testing.assert_close(module(x)[0], plain(x)[0], atol=1e-14, rtol=1e-13)


def test_fresh_eager_form_equals_eager_attention_bit_for_bit():
    conv = goh.HeadGraphConv(goh.head_graph(H), D, M)
    q, k, v = (torch.randn(B, T, H, D) for _ in range(3))
    x = torch.randn(B, T, M)
    plain = mixed_attention(q, k, v)
    assert torch.equal(mixed_attention(q, k, v, partial(conv, context=x)), plain)


def test_eager_dropout_keeps_the_mean():
    conv = goh.HeadGraphConv(goh.head_graph(H), D, M)
    q, k, x = torch.randn(1, 5, H, D), torch.randn(1, 300, H, D), torch.randn(1, 5, M)
    v = torch.ones(1, 300, H, D)
    z = mixed_attention(q, k, v, partial(conv, context=x), dropout=0.5)
    assert 0.8 < z.mean() < 1.2 and z.std() > 0.01


def test_sparse_graphs_run_wide_and_dense_ones_eagerly():
    q, x = torch.randn(B, T, H, D).double(), torch.randn(B, T, M).double()

    def taken(*topology, **settings):
        reasons = explain(Call(q, q, q, scores=Messages(attention(*topology, **settings).score_graph, x)))
        return next(form for form, reason in reasons.items() if reason == "taken")

    assert taken("ring", {"hops": 3}) == "wide" and taken("ring", {"hops": 4}) == "maps"
    assert taken("complete", {}) == taken("ring", {}, rounds=2) == taken("ring", {}, backend="pyg") == "maps"


CHOICES = {
    "four heads over few keys": ((16, 64, 4, 16), "complete", "maps"),
    "four heads, large maps": ((16, 1024, 4, 16), "complete", "tiled"),
    "in-degree 3 and thin heads": ((2, 128, 8, 8), "ring", "wide"),
    "in-degree 3": ((2, 128, 8, 16), "ring", "tiled"),
    "in-degree 3, small maps": ((1, 128, 8, 16), "ring", "maps"),
    "in-degree 2, thin heads": ((2, 256, 8, 16), "pairs", "wide"),
    "in-degree 2, thin heads, many keys": ((2, 512, 8, 16), "pairs", "tiled"),
    "talking heads over few keys": ((16, 64, 4, 16), "talking", "maps"),
    "talking heads, maps of half a tile": ((4, 128, 4, 16), "talking", "tiled"),
}


@pytest.mark.parametrize("size, graph, expected", CHOICES.values(), ids=CHOICES)
def test_what_is_chosen_is_what_was_measured_to_be_fastest(size, graph, expected):
    q, x = torch.empty(size), torch.empty(*size[:2], size[2] * size[3])
    shape = ("ring", {"hops": 1 if graph == "pairs" else 2}) if graph in ("ring", "pairs") else ("complete", {})
    conv = goh.HeadGraphConv(goh.head_graph(size[2], shape[0], **shape[1]), size[3], x.shape[-1])
    messages = Messages(conv, x)
    found = explain(Call(q, q, q, Mask(causal=True), 0.0, messages, messages if graph == "talking" else None))
    assert found[expected] == "taken"


def test_wide_form_never_holds_a_map_of_scores(monkeypatch):
    widths = []
    original = F.scaled_dot_product_attention

    def spy(q, k, v, *args, **kwargs):
        widths.append((q.shape[-1], k.shape[-1], v.shape[-1], kwargs["scale"]))
        return original(q, k, v, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    attention("ring", {"hops": 2}, causal=True)(torch.randn(B, T, M).double())
    assert widths == [(3 * D, 3 * D, 3 * D, D**-0.5)]


def test_gradcheck_of_wide_form():
    conv = goh.HeadGraphConv(goh.head_graph(3, "ring"), 2, 6).double()
    for parameter in conv.parameters():
        nn.init.normal_(parameter, std=0.5)
    q, k, v = (torch.randn(1, 3, 3, 2).double().requires_grad_() for _ in range(3))
    x = torch.randn(1, 3, 6).double().requires_grad_()

    def wide(q, k, v, x):
        return attend(Call(q, k, v, Mask(causal=True), scores=Messages(conv, x)), "wide")[0]

    assert torch.autograd.gradcheck(wide, (q, k, v, x))


def test_autocast_bfloat16():
    module = attention("ring", {"hops": 2}, causal=True).float()
    x = torch.randn(B, T, M)
    with torch.autocast("cpu", torch.bfloat16):
        low = module(x)[0]
    torch.testing.assert_close(low.float(), module(x)[0], atol=0.05, rtol=0.05)


def test_wide_refuses_what_is_not_linear():
    module = goh.MultiHeadAttention(M, H, score_graph=nn.Identity())
    module.form = "wide"
    with pytest.raises(ValueError, match="'wide' takes .got messages that are no matrix over heads"):
        module(torch.randn(B, T, M))
