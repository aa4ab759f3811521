"""Attention in tiles as an operator: what torch checks of one, compiled blocks against eager ones, and export."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import gohgraph as goh
from gohgraph.attention import tiled, tiled_operator
from gohgraph.attention.call import Call
from gohgraph.attention.forms import explain
from gohgraph.graphs.protocol import Messages

B, T, H, D = 2, 13, 6, 5
M = H * D
SITES = {"scores": {"score_graph"}, "weights": {"weight"}, "both": {"score_graph", "weight"}}


def inputs(site, mask, keys=T):
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, n, H, D).double().requires_grad_() for n in (T, keys, keys))
    used = (site != "weights", site != "scores")
    mixes = [torch.randn(B, T, H, H).double().requires_grad_() if each else None for each in used]
    keep = torch.rand(B, 1, T, keys) > 0.4 if mask == "some" else None
    return q, k, v, *mixes, keep, mask == "causal"


def block(site="scores", form="tiled", head_dim=D):
    torch.manual_seed(1)
    graphs = {name: goh.HeadGraphConv(goh.head_graph(H), head_dim, H * head_dim) for name in sorted(SITES[site])}
    for parameter in (parameter for graph in graphs.values() for parameter in graph.parameters()):
        nn.init.normal_(parameter, std=0.3)
    inner = {name: graphs.pop(name) for name in ("weight",) if name in graphs}
    module = goh.MultiHeadAttention(H * head_dim, H, causal=True, num_kv_heads=3, **graphs, inner_graphs=inner)
    module.form = form
    return module.double()


def values_and_gradients(function, module, x, **masks):
    x = x.clone().requires_grad_()
    y, _ = function(x, **masks)
    torch.manual_seed(5)
    return [y, *torch.autograd.grad((y * torch.randn_like(y)).sum(), [x, *module.parameters()])]


@pytest.mark.parametrize("site, mask, keys", [("scores", "causal", T), ("both", "some", 11), ("weights", "none", 11)])
def test_torch_finds_the_operator_sound(site, mask, keys):
    given = inputs(site, mask, keys)
    assert_sound(tiled_operator.tiles, given)


@pytest.mark.parametrize("mask, keys", [("causal", T), ("some", 11)])
def test_torch_finds_the_operator_over_blocks_sound(mask, keys):
    q, k, v, mix, _, keep, is_causal = inputs("scores", mask, keys)
    assert_sound(tiled_operator.blocks, (q, k, v, mix, keep, is_causal))


def assert_sound(operators, given):
    torch.library.opcheck(operators.forward, given)
    outputs = [x.detach() for x in operators.forward(*given)]
    known = [x.detach() if isinstance(x, torch.Tensor) else x for x in given]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(operators.backward, (*outputs, torch.randn_like(outputs[0]), *known), test_utils=checks)


@pytest.mark.compiles
@pytest.mark.parametrize("site", ["scores", "both"])
def test_compiled_tiles_are_those_of_eager_mode_at_every_length(site):
    torch.compiler.reset()
    module, counter = block(site), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for tokens in (T, 17, D, H):
        x = torch.randn(B, tokens, M).double()
        results = [values_and_gradients(function, module, x) for function in (compiled, module)]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
    assert any("tiled_attention" in str(node.target) for graph in counter.graphs for node in graph.graph.nodes)
    # Of the first length, and of any.
    assert counter.frame_count <= 2


@pytest.mark.compiles
@pytest.mark.parametrize("from_keys", [1, 2048])
def test_compiled_tiles_under_a_mask(monkeypatch, from_keys):
    torch.compiler.reset()
    monkeypatch.setattr(tiled, "BLOCKS_FROM_KEYS", from_keys)
    module, x = block(), torch.randn(B, T, M).double()
    padding = (torch.arange(T) < torch.tensor([[T], [9]]))[:, None, None]
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    results = [values_and_gradients(function, module, x, keep_mask=padding) for function in (compiled, module)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.compiles
def test_compiled_attention_over_many_keys_goes_over_blocks(monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(tiled, "BLOCKS_FROM_KEYS", 15)
    module, counter = block(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for tokens, name in ((T, "tiled_attention"), (17, "blocked_attention"), (19, "blocked_attention")):
        x = torch.randn(B, tokens, M).double()
        results = [values_and_gradients(function, module, x) for function in (compiled, module)]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
        assert any(name in str(node.target) for node in counter.graphs[-1].graph.nodes)


@pytest.mark.compiles
def test_torch_compile_chooses_tiles_where_eager_mode_does():
    torch.compiler.reset()
    module, counter = block(form=None, head_dim=16), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for tokens, calls in ((30, 0), (260, 1)):
        x = torch.randn(1, tokens, H * 16).double()
        torch.testing.assert_close(compiled(x)[0], module(x)[0], atol=1e-10, rtol=1e-10)
        targets = [str(node.target) for node in counter.graphs[-1].graph.nodes]
        assert sum("tiled_attention" in target for target in targets) == calls


def test_mapped_operators_are_those_of_every_sample():
    given = inputs("both", "causal")
    q, k, v, *mixes = (x.detach() for x in given[:5])
    seconds = [torch.randn_like(x) for x in (q, v)]
    mapped = torch.func.vmap(lambda q, v: tiled_operator.tiles(q, k, v, *mixes, None, True))
    z = mapped(torch.stack((q, seconds[0])), torch.stack((v, seconds[1])))
    torch.testing.assert_close(z[1], tiled_operator.tiles(seconds[0], k, seconds[1], *mixes, None, True))
    pull = torch.func.vmap(lambda grad: tiled_operator.tiles.backward(z[0], grad, q, k, v, *mixes, None, True))
    grads = torch.randn(3, *z[0].shape).double()
    one = tiled_operator.tiles.backward(z[0], grads[2], q, k, v, *mixes, None, True)
    for a, b in zip(pull(grads), one, strict=True):
        torch.testing.assert_close(a[2], b)


def test_second_gradients_are_refused():
    q, k, v, w, *others = inputs("scores", "causal")
    (first,) = torch.autograd.grad(tiled_operator.tiles(q, k, v, w, *others).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="Expected first gradients alone of attention in tiles"):
        first.sum().backward()


@pytest.mark.compiles
def test_exported_programs_have_whole_maps(monkeypatch):
    module, x = block(form=None, head_dim=16).float().eval(), torch.randn(1, 300, H * 16)
    program = torch.export.export(module, (x,))
    assert not any("gohgraph" in str(node.target) for node in program.graph.nodes)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x)[0], module(x)[0], atol=1e-5, rtol=1e-5)
    q, call = torch.randn(1, 300, H, D), Messages(goh.HeadGraphConv(goh.head_graph(H), D, M), torch.randn(1, 300, M))
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert "torch.export" in explain(Call(q, q, q, scores=call))["tiled"]
