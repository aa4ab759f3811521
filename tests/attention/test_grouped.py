"""Attention by groups of tokens equals that of all heads for all tokens, in value and gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_equal_to, trained_like

import gohgraph as goh
from gohgraph.attention import grouped as grouping
from gohgraph.attention import routed_forms
from gohgraph.attention.cache import KeyValueCache
from gohgraph.attention.grouped import group_tokens
from gohgraph.models.embeddings import RotaryPositions

B, T, S, H, D = 3, 13, 7, 6, 10
M = H * D


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Several chunks of queries in a short sequence."""
    monkeypatch.setattr(grouping, "CHUNK", 3)


def attention(causal, shared=2, top_k=2, output=False, **settings):
    graph = goh.HeadGraphConv(goh.head_graph(H), D, M) if output else None
    router = goh.HeadRouter(M, H, shared, top_k)
    return trained_like(goh.MultiHeadAttention(M, H, causal=causal, output_graph=graph, router=router, **settings))


def assert_grouping_changes_nothing(module, x, memory=None, **arguments):
    results = []
    for form in ("plain", "grouped"):
        copied = copy.deepcopy(module)
        copied.form = form
        inputs = [x.clone().requires_grad_(), *([memory.clone().requires_grad_()] if memory is not None else [])]
        y, heads = copied(*inputs, **arguments)
        torch.manual_seed(0)
        (y * torch.randn_like(y)).sum().backward()
        gradients = [tensor.grad for tensor in (*inputs, *copied.parameters())]
        results.append([y, heads.outputs, *gradients])
    for expected, actual in zip(*results, strict=True):
        assert_equal_to(actual, expected)
    assert results[1][1][~heads.routing.active].eq(0).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"output": True},
        {"num_kv_heads": 3},
        {"num_kv_heads": 1, "bias": False},
        {"rotary": RotaryPositions(D)},
        {"shared": 0, "top_k": 1},
        {"shared": 1, "top_k": 4},
    ],
    ids=str,
)
def test_values_and_gradients_are_those_of_all_heads(settings, causal):
    assert_grouping_changes_nothing(attention(causal, **settings), torch.randn(B, T, M).double())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(B, 1, 1, T), (B, 1, T, T), (1, H, 1, T), (B, H, T, T)], ids=str)
def test_masks(shape, causal):
    keep = torch.rand(shape) < 0.7
    # No key at all gives zeros.
    keep[0, ..., 0, :] = False
    assert_grouping_changes_nothing(attention(causal), torch.randn(B, T, M).double(), keep_mask=keep)


def test_cross_attention():
    memory = torch.randn(B, S, M).double()
    keep = torch.rand(B, 1, 1, S) < 0.7
    assert_grouping_changes_nothing(attention(False), torch.randn(B, T, M).double(), memory, keep_mask=keep)


def test_more_causal_tokens_than_keys():
    assert_grouping_changes_nothing(attention(True), torch.randn(B, T, M).double(), torch.randn(B, 2, M).double())


@torch.no_grad()
def test_a_prompt_in_pieces():
    module, x = attention(True, rotary=RotaryPositions(D)), torch.randn(B, T, M).double()
    whole = module(x)[0]
    module.form, cache = "grouped", KeyValueCache()
    pieces = [module(x[:, start:end], cache=cache)[0] for start, end in ((0, 5), (5, 11), (11, T))]
    assert_equal_to(torch.cat(pieces, dim=1), whole)


@torch.no_grad()
def test_a_head_that_nobody_chose_and_one_that_all_chose():
    module, x = attention(True), torch.randn(B, T, M).double()
    module.router.routed[0], module.router.routed[3] = 0.0, 0.0
    module.router.bias_rate, module.router.balance_bias = 0.1, torch.tensor([-9.0, 0.0, 0.0, 9.0]).double()
    load = module.router(x).load
    assert load[2] == 0 and load[5] == 1
    assert_grouping_changes_nothing_without_gradients(module, x)


def assert_grouping_changes_nothing_without_gradients(module, x):
    outputs = []
    for module.form in ("plain", "grouped"):
        outputs.append(module(x)[0])
    assert_equal_to(outputs[1], outputs[0])


def test_groups_are_the_tokens_in_order():
    active = torch.rand(B, T, H) < 0.4
    groups = group_tokens(active, 2)
    for b in range(B):
        for head in range(H - 2):
            tokens = active[b, :, 2 + head].nonzero().flatten().tolist()
            assert groups.counts[b, head] == len(tokens)
            assert groups.order[b, : len(tokens), head].tolist() == tokens
            assert sorted(set(groups.order[b, :, head].tolist())) == sorted(groups.order[b, :, head].tolist())
    assert groups.order.shape[1] == active[:, :, 2:].sum(dim=1).max()
    assert groups.share(T) == pytest.approx((2 + 4 * groups.order.shape[1] / T) / H)


def test_where_tokens_are_grouped(monkeypatch):
    module = attention(True, dropout=0.1).eval()
    calls = []
    monkeypatch.setattr(
        routed_forms, "grouped_attention", lambda *inputs: calls.append(1) or grouping.grouped_attention(*inputs)
    )

    def grouped(module, x, **arguments):
        calls.clear()
        module(x, **arguments)
        return bool(calls)

    x = torch.randn(B, T, M).double()
    assert not grouped(module, x)
    monkeypatch.setattr(grouping, "FROM_KEYS", T)
    monkeypatch.setitem(grouping.LARGEST_SHARE, True, 1.0)
    assert grouped(module, x)
    # Backward would keep masks larger than all the rest; prefill keeps none.
    monkeypatch.setattr(grouping, "MOST_KEPT_KEYS", T - 1)
    assert not grouped(module, x)
    with torch.no_grad():
        assert grouped(module, x)
    monkeypatch.setattr(grouping, "MOST_KEPT_KEYS", T)
    assert grouped(module, x)
    # A router that sends nearly all tokens to one head leaves nothing to gain.
    monkeypatch.setitem(grouping.LARGEST_SHARE, True, 0.4)
    assert not grouped(module, x)
    module.form = "grouped"
    assert grouped(module, x)
    with pytest.raises(ValueError, match="'grouped' takes .got dropout"):
        module.train()(x)
    module.form = None
    monkeypatch.setitem(grouping.LARGEST_SHARE, True, 1.0)
    assert grouped(module.eval(), x) and not grouped(module.train(), x)
    module.eval().score_graph = goh.HeadGraphConv(goh.head_graph(H), D, M).double()
    assert not grouped(module, x)
    assert not grouped(trained_like(goh.MultiHeadAttention(M, H)), x)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(0, T, T), (B, 0, S), (B, T, 0)], ids=str)
@pytest.mark.parametrize("shared", [0, 2, H])
def test_nothing_to_attend_gives_zeros_and_no_gradient(shared, shape, causal):
    batch, tokens, keys = shape
    q, k, v = (torch.randn(batch, n, heads, D, requires_grad=True) for n, heads in ((tokens, H), (keys, 3), (keys, 3)))
    groups = group_tokens(torch.rand(batch, tokens, H) < 0.5, shared)
    assert 0 <= groups.share(tokens) <= 1
    z = grouping.grouped_attention(q, k, v, groups, torch.ones(batch, 1, tokens, keys).bool(), causal)
    assert z.shape == q.shape and z.eq(0).all()
    assert all(x.eq(0).all() for x in torch.autograd.grad(z.sum(), (q, k, v)))
