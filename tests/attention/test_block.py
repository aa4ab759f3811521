"""Multi-head attention and feed-forward against torch, and the neutrality of fresh graphs."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import traced
from torch import nn

import gohgraph as goh
from gohgraph.attention.cache import KeyValueCache
from gohgraph.models.embeddings import RotaryPositions

B, T, S, H, D = 2, 7, 11, 3, 10
M = H * D


def graph(**settings):
    return goh.HeadGraphConv(goh.head_graph(H), D, M, **settings)


def randomised(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def torch_twin(attention):
    """torch's module with the weights of ours."""
    twin = nn.MultiheadAttention(M, H, batch_first=True).double()
    with torch.no_grad():
        three = (attention.query, attention.key, attention.value)
        twin.in_proj_weight.copy_(torch.cat([p.weight for p in three]))
        twin.in_proj_bias.copy_(torch.cat([p.bias for p in three]))
        twin.out_proj.load_state_dict(attention.output.state_dict())
    return twin


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("padding", [False, True])
def test_plain_attention_equals_torch(cross, padding):
    attention = goh.MultiHeadAttention(M, H).double()
    x = torch.randn(B, T, M).double()
    memory = torch.randn(B, S, M).double() if cross else x
    keep = torch.ones(B, memory.shape[1], dtype=torch.bool)
    keep[1, 4:] = not padding
    ours, _ = attention(x, memory if cross else None, keep_mask=keep[:, None, None, :])
    theirs, _ = torch_twin(attention)(x, memory, memory, key_padding_mask=~keep)
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("padding", [False, True])
def test_causal_attention_equals_torch(padding):
    attention = goh.MultiHeadAttention(M, H, causal=True).double()
    x = torch.randn(B, T, M).double()
    keep = torch.ones(B, T, dtype=torch.bool)
    keep[1, 5:] = not padding
    ours, _ = attention(x, keep_mask=keep[:, None, None, :] if padding else None)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    theirs, _ = torch_twin(attention)(x, x, x, attn_mask=future, key_padding_mask=~keep)
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kv_heads", [1, 3])
def test_grouped_heads_repeat_keys_and_values(kv_heads):
    grouped = goh.MultiHeadAttention(M, H, num_kv_heads=kv_heads, causal=True).double()
    full = goh.MultiHeadAttention(M, H, causal=True).double()
    with torch.no_grad():
        for name in ("query", "output"):
            getattr(full, name).load_state_dict(getattr(grouped, name).state_dict())
        for name in ("key", "value"):
            for part in ("weight", "bias"):
                source = getattr(getattr(grouped, name), part).unflatten(0, (kv_heads, D))
                getattr(getattr(full, name), part).copy_(source.repeat_interleave(H // kv_heads, 0).flatten(0, 1))
    x = torch.randn(B, T, M).double()
    torch.testing.assert_close(grouped(x)[0], full(x)[0], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "settings", [{}, {"rank": 4}, {"edges": "static"}, {"rounds": 3}, {"norm": True}, {"backend": "pyg"}], ids=str
)
def test_fresh_output_graph_is_plain_attention_bit_for_bit(settings, dtype):
    attention = goh.MultiHeadAttention(M, H, causal=True, output_graph=graph(**settings)).to(dtype)
    plain = copy.deepcopy(attention)
    plain.output_graph = None
    x = torch.randn(B, T, M, dtype=dtype)
    assert torch.equal(attention(x)[0], plain(x)[0])


def test_trained_graphs_differ_from_plain_attention():
    attention = goh.MultiHeadAttention(M, H, output_graph=randomised(graph()))
    plain = copy.deepcopy(attention)
    plain.output_graph = None
    x = torch.randn(B, T, M)
    assert (attention(x)[0] - plain(x)[0]).abs().max() > 1e-3


def test_output_is_the_sum_over_heads_of_the_mixed_readout():
    """y = sum_j (W_O^j + sum_i alpha_ji W_O^i) z_j, equation of the output site."""
    attention = goh.MultiHeadAttention(M, H, output_graph=randomised(graph())).double()
    plain = copy.deepcopy(attention)
    plain.output_graph = None
    x = torch.randn(B, T, M).double()
    z = plain(x)[1].outputs
    slots = attention.output.weight.unflatten(1, (H, D))  # [M, H, D]
    mix = attention.output_graph.adjacency(x) + torch.eye(H).double()
    expected = torch.einsum("mid,btij,btjd->btm", slots, mix, z) + attention.output.bias
    torch.testing.assert_close(attention(x)[0], expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("site", ["output_graph", "score_graph"])
def test_causality(site):
    attention = goh.MultiHeadAttention(M, H, causal=True, **{site: randomised(graph())}).double()
    x = torch.randn(1, T, M).double()
    jacobian = torch.autograd.functional.jacobian(lambda x: attention(x)[0], x)  # [1, T, M, 1, T, M]
    reach = jacobian.abs().sum(dim=(0, 2, 3, 5))  # [T, T]
    assert reach.triu(1).eq(0).all() and reach.diagonal().ne(0).all()


@pytest.mark.parametrize("site", ["output_graph", "score_graph"])
def test_padding_has_no_influence(site):
    attention = goh.MultiHeadAttention(M, H, **{site: randomised(graph())}).double()
    x = torch.randn(B, T, M).double()
    keep = torch.ones(B, T, dtype=torch.bool)
    keep[1, 5:] = False
    before, _ = attention(x, keep_mask=keep[:, None, None, :])
    x[1, 5:] = 100.0
    after, _ = attention(x, keep_mask=keep[:, None, None, :])
    torch.testing.assert_close(before[keep], after[keep])


def test_cache_equals_the_whole_sequence():
    attention = goh.MultiHeadAttention(
        M, H, causal=True, rotary=RotaryPositions(D), output_graph=randomised(graph())
    ).double()
    x = torch.randn(B, T, M).double()
    cache = KeyValueCache()
    steps = [attention(x[:, a:b], cache=cache)[0] for a, b in ((0, 3), (3, 4), (4, T))]
    torch.testing.assert_close(torch.cat(steps, dim=1), attention(x)[0], atol=1e-10, rtol=1e-10)


def test_fixed_cache_reads_memory_once():
    attention = goh.MultiHeadAttention(M, H).double()
    x, memory = torch.randn(B, T, M).double(), torch.randn(B, S, M).double()
    cache = KeyValueCache(fixed=True)
    first, _ = attention(x, memory, cache=cache)
    again, _ = attention(x, torch.full_like(memory, float("nan")), cache=cache)
    assert torch.equal(first, again) and len(cache) == S


def test_dropout_acts_in_training_only():
    attention = goh.MultiHeadAttention(M, H, dropout=0.5)
    x = torch.randn(B, T, M)
    assert not torch.equal(attention(x)[0], attention(x)[0])
    attention.eval()
    assert torch.equal(attention(x)[0], attention(x)[0])


@pytest.mark.compiles
@pytest.mark.slow
@pytest.mark.parametrize("site", ["output_graph", "score_graph"])
def test_compiles_to_one_graph(site):
    conv = goh.HeadGraphConv(goh.head_graph(H, "ring"), D, M)
    attention = goh.MultiHeadAttention(M, H, causal=True, rotary=RotaryPositions(D), **{site: randomised(conv)})
    x = torch.randn(B, T, M)
    torch.testing.assert_close(traced(attention)(x)[0], attention(x)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
def test_feed_forward_equals_its_formula(activation):
    layer = goh.FeedForward(M, 17, activation).double()
    x = torch.randn(B, T, M).double()
    inner = layer.inner(x)
    hidden = {
        "relu": lambda: inner.clamp(min=0),
        "gelu": lambda: inner * (1 + torch.erf(inner / 2**0.5)) / 2,
        "swiglu": lambda: inner * inner.sigmoid() * layer.gate(x),
    }[activation]()
    torch.testing.assert_close(layer(x), layer.outer(hidden), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: goh.MultiHeadAttention(M + 1, H), "Expected d_model to be a multiple"),
        (lambda: goh.MultiHeadAttention(M, H, num_kv_heads=2), "Expected num_kv_heads to divide"),
        (lambda: goh.MultiHeadAttention(4 * D, 4, output_graph=graph()), "Expected a graph over 4 heads at outputs"),
        (lambda: goh.MultiHeadAttention(M, H, score_graph=graph(norm=True)), "can stand at scores .*norm=True"),
        (lambda: goh.FeedForward(M, 17, "tanh"), "Expected activation"),
    ],
)
def test_impossible_options(build, match):
    with pytest.raises(ValueError, match=match):
        build()


@pytest.mark.parametrize("mask", [torch.ones(B, 1, 1, T), torch.ones(B, T, dtype=torch.bool)], ids=["float", "tokens"])
def test_masks_that_would_be_misread_are_refused(mask):
    with pytest.raises(ValueError, match="Expected a bool keep_mask that broadcasts"):
        goh.MultiHeadAttention(M, H)(torch.randn(B, T, M), keep_mask=mask)


def test_graphs_that_are_refused_leave_the_block_as_it_was():
    block = goh.MultiHeadAttention(M, H, output_graph=graph(), inner_graphs={"value": graph()})
    before = dict(block.named_modules())
    new = {"output_graph": graph(), "score_graph": None, "router": None, "inner_graphs": {}}
    inner = {"query": graph(), "weight": graph(norm=True)}
    for refused in ({"score_graph": graph(norm=True)}, {"inner_graphs": inner}):
        with pytest.raises(ValueError, match="norm=True"):
            block.fill_slots(**{**new, **refused})
        assert dict(block.named_modules()) == before
