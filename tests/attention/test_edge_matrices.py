"""Tiles whose matrices over heads are computed where they are used, against those that hold all of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gohgraph as goh
from gohgraph.attention import edge_matrices, forms, tiled
from gohgraph.graphs import token_edges, ways

B, T, H, D = 2, 13, 6, 5
M = H * D


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tiles of three queries, windows of five tokens; counts how often they run."""
    for module, name, number in (
        (tiled, "FEWEST_ROWS", 3), (tiled, "TILE_NUMBERS", 1), (ways, "FROM_WEIGHTS", 0), (ways, "KEPT_NUMBERS", 0),
        (edge_matrices, "WINDOW_NUMBERS", 1), (token_edges, "FEWEST_TOKENS", 5),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, number)
    monkeypatch.setattr(tiled, "MOST_ROWS", 3)
    calls = []
    function = forms.edge_tiles
    monkeypatch.setattr(forms, "edge_tiles", lambda *arguments: calls.append(1) or function(*arguments))
    return calls


def block(causal=True, topology="complete", **options):
    torch.manual_seed(0)
    graph = goh.HeadGraphConv(goh.head_graph(H, topology), D, M, **options)
    for parameter in graph.parameters():
        nn.init.normal_(parameter, std=0.3)
    module = goh.MultiHeadAttention(M, H, num_kv_heads=3, causal=causal, score_graph=graph).double()
    module.form = "tiled"
    return module


def values_and_gradients(module, x, **masks):
    x = x.clone().requires_grad_()
    y, _ = module(x, **masks)
    torch.manual_seed(5)
    leaves = [x, *(parameter for parameter in module.parameters() if parameter.requires_grad)]
    return [y, *torch.autograd.grad((y * torch.randn_like(y)).sum(), leaves)]


def assert_equal(ones, others):
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("mask", ["causal", "some", "none"])
@pytest.mark.parametrize("options", [{}, {"activation": None}, {"rank": 2}], ids=str)
def test_equals_whole_maps_in_value_and_gradient(small, mask, options):
    module, x = block(causal=mask == "causal", **options), torch.randn(B, T, M).double()
    keep = torch.rand(B, 1, T, T) > 0.4 if mask == "some" else None
    results = values_and_gradients(module, x, keep_mask=keep)
    assert small == [1]
    module.form = "maps"
    assert_equal(results, values_and_gradients(module, x, keep_mask=keep))
    assert small == [1]


def test_what_is_frozen_gets_no_gradient(small):
    module, x = block(), torch.randn(B, T, M).double()
    module.score_graph.edges.weight.requires_grad_(False)
    results = values_and_gradients(module, x)
    assert small == [1]
    module.form = "maps"
    assert_equal(results, values_and_gradients(module, x))


@pytest.mark.parametrize("options", [{"topology": "ring"}, {"rounds": 2}, {"edges": "static"}], ids=str)
def test_other_graphs_hold_their_matrices(small, options):
    values_and_gradients(block(**options), torch.randn(B, T, M).double())
    assert not small


def test_second_gradients_are_refused(small):
    module, x = block(), torch.randn(B, T, M).double().requires_grad_()
    (first,) = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
    assert small == [1]
    with pytest.raises(RuntimeError, match="Expected first gradients alone of attention in tiles"):
        first.sum().backward()


def test_no_tensor_holds_the_matrices(small):
    module, x = block().float(), torch.randn(B, 64, M)
    largest = []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            largest.extend(each.untyped_storage().nbytes() for each in [result] if isinstance(each, torch.Tensor))
            return result

    with Largest():
        module(x)[0].sum().backward()
    assert max(largest) < 4 * B * 64 * H * H
