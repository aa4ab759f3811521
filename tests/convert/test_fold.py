from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import assert_equal_to, trained_like
from torch import nn

import gohgraph as goh
from gohgraph import HeadGraphConv, MultiHeadAttention, fold, head_graph, record
from gohgraph.graphs.baselines import KnockingHeads, SigmoidGate
from gohgraph.graphs.baselines.presets import preset
from gohgraph.graphs.chain import Chain
from gohgraph.models.embeddings import QueryKeyNorm, RotaryPositions

H, D, M = 5, 6, 30


def attention_with(topology="ring", *, settings=None, score_graph=None, **graph):
    conv = HeadGraphConv(head_graph(H, topology), D, M, **{"edges": "static", **graph})
    settings = {"causal": True, "rotary": RotaryPositions(D), **(settings or {})}
    return trained_like(MultiHeadAttention(M, H, output_graph=conv, score_graph=score_graph, **settings))


@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"num_kv_heads": 1}], ids=["bias", "no-bias", "grouped"])
@pytest.mark.parametrize("edges", ["static", "frozen"])
@pytest.mark.parametrize("activation", ["tanh", None])
@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("topology", ["ring", "complete", [(3, 0), (4, 0), (1, 2)]], ids=["ring", "complete", "given"])
@torch.no_grad()
def test_fold_is_exact(topology, rounds, activation, edges, settings):
    attention = attention_with(topology, rounds=rounds, activation=activation, edges=edges, settings=settings)
    x = torch.randn(2, 7, M, dtype=torch.float64)
    expected, _ = attention(x)
    bias = None if attention.output.bias is None else attention.output.bias.clone()
    assert fold(attention) is attention
    assert attention.output_graph is None and not any("graph" in name for name in attention.state_dict())
    y, heads = attention(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert heads.outputs.shape == (2, 7, H, D)
    assert bias is None or torch.equal(attention.output.bias, bias)


@pytest.mark.parametrize("backend", ["dense", "pyg"])
@torch.no_grad()
def test_fold_in_both_backends_and_with_a_score_graph(backend):
    scores = HeadGraphConv(head_graph(H, "ring"), D, M)
    attention = attention_with(backend=backend, rounds=2, score_graph=scores)
    x = torch.randn(2, 7, M, dtype=torch.float64)
    expected, _ = attention(x)
    assert fold(attention).score_graph is scores
    assert_equal_to(attention(x)[0], expected)


@torch.no_grad()
def test_fold_changes_the_projection_and_keeps_the_parameter():
    attention = attention_with()
    weight, before = attention.output.weight, attention.output.weight.clone()
    fold(attention)
    assert attention.output.weight is weight and not torch.allclose(weight, before)
    assert weight.requires_grad


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.2)])
@torch.no_grad()
def test_fold_in_lower_precision(dtype, tolerance):
    attention = attention_with().to(dtype)
    x = torch.randn(2, 7, M, dtype=dtype)
    expected, _ = attention(x)
    y, _ = fold(attention)(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected, rtol=0, atol=tolerance)


STATIC = {
    "rounds": lambda heads: HeadGraphConv(head_graph(heads), D, M, edges="static", rounds=2),
    "frozen": lambda heads: HeadGraphConv(head_graph(heads), D, M, edges="frozen"),
    "knocking": lambda heads: KnockingHeads(heads, D, M, form="linear"),
    "chain": lambda heads: Chain([STATIC["rounds"](heads), STATIC["knocking"](heads)]),
}


@pytest.mark.parametrize("groups", [H, 1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("graph", STATIC)
@torch.no_grad()
def test_static_graphs_at_all_sites_beside_projections_fold_at_once(graph, bias, groups):
    build, norm = STATIC[graph], QueryKeyNorm(D, RotaryPositions(D))
    inner = {"query": build(H), "key": build(groups), "value": build(groups)}
    attention = trained_like(MultiHeadAttention(
        M, H, num_kv_heads=groups, bias=bias, causal=True, rotary=norm, output_graph=build(H), inner_graphs=inner
    ))  # fmt: skip
    x = torch.randn(2, 7, M, dtype=torch.float64)
    expected, parameters = attention(x)[0], [attention.query.weight, attention.output.weight]
    fold(attention)
    assert not attention.inner_graphs and attention.output_graph is None
    assert parameters[0] is attention.query.weight and parameters[1] is attention.output.weight
    torch.testing.assert_close(attention(x)[0], expected, rtol=1e-11, atol=1e-11)


def test_sites_whose_graphs_depend_on_the_token_are_left():
    inner = {"value": STATIC["rounds"](H), "key": HeadGraphConv(head_graph(H), D, M), "weight": STATIC["rounds"](H)}
    attention = trained_like(MultiHeadAttention(M, H, output_graph=SigmoidGate(H, D, M), inner_graphs=inner))
    x = torch.randn(2, 7, M, dtype=torch.float64)
    expected = attention(x)[0].detach()
    fold(attention)
    assert set(attention.inner_graphs) == {"key", "weight"} and attention.output_graph is not None
    torch.testing.assert_close(attention(x)[0], expected, rtol=1e-11, atol=1e-11)
    with pytest.raises(ValueError, match=r"^Expected a static linear graph at outputs \(got messages that are not"):
        fold(attention)


def test_interleaved_heads_are_their_fused_projections_in_value_and_gradient():
    """W_fused[i] = sum_j mix[i, j] W[j], as the fused form has it, made in the forward pass."""
    config = goh.TransformerConfig(11, M, H, num_layers=1, d_ff=7, head_graph=preset("interleaved-heads", H))
    attention = trained_like(goh.EncoderLayer(config, causal=True)).attention.object
    x = torch.randn(2, 7, M, dtype=torch.float64)
    y = attention(x)[0]
    linears = {name: getattr(attention, name) for name in ("query", "key", "value")}
    fused = {}
    for name, linear in linears.items():
        mix = torch.eye(H).double() + attention.inner_graphs[name].adjacency()  # [H, H]
        fused[f"{name}.weight"] = torch.einsum("ij,jdm->idm", mix, linear.weight.unflatten(0, (H, D))).flatten(0, 1)
        fused[f"{name}.bias"] = (mix @ linear.bias.unflatten(0, (H, D))).flatten()
    fused |= {f"output.{name}": value for name, value in attention.output.named_parameters()}
    plain = MultiHeadAttention(M, H, causal=True, rotary=attention.rotary).double()
    other = torch.func.functional_call(plain, fused, (x,))[0]
    assert_equal_to(other, y)
    parameters, cotangent = [*attention.parameters()], torch.randn_like(y)
    for one, two in zip(*(torch.autograd.grad((z * cotangent).sum(), parameters) for z in (y, other)), strict=True):
        assert_equal_to(one, two)


def test_fold_inside_a_recording_is_not_recorded():
    attention = attention_with()
    with record(attention) as heads:
        fold(attention)
    assert heads["output_graph"].tokens == 0


REFUSED = {
    "edges that depend on the token": {"edges": "token"},
    "messages that are not linear": {"norm": True},
    "senders from other layers": {"cross_layer": 1},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_does_not_fold_is_refused_and_left_alone(reason):
    attention = attention_with(**REFUSED[reason])
    graph, weight = attention.output_graph, attention.output.weight.clone()
    with pytest.raises(ValueError, match=rf"^Expected a static linear graph at outputs \(got {reason}.*Do "):
        fold(attention)
    assert attention.output_graph is graph and torch.equal(attention.output.weight, weight)


@pytest.mark.parametrize("router", [None, goh.HeadRouter(M, H, 2, 2)], ids=["all-heads", "routed"])
def test_experts_and_routed_heads_do_not_fold(router):
    experts = goh.GraphExperts(head_graph(H, "bipartite", num_shared=2), D, M, 2, edges="static", rounds=1)
    graph = experts if router is None else HeadGraphConv(head_graph(H), D, M, edges="static")
    attention = MultiHeadAttention(M, H, output_graph=graph, router=router)
    before = attention.output.weight.clone()
    with pytest.raises(ValueError, match=r"^Expected .*\(got (messages that are not linear|a router).* Do "):
        fold(attention)
    assert attention.output_graph is graph and torch.equal(attention.output.weight, before)


@pytest.mark.parametrize(
    "output_graph, reason", [(None, "no graph at outputs"), (nn.Identity(), "not linear")], ids=["none", "plain-module"]
)
def test_fold_needs_a_linear_graph(output_graph, reason):
    with pytest.raises(ValueError, match=rf"^Expected .*\(got .*{reason}"):
        fold(MultiHeadAttention(M, H, output_graph=output_graph))


def test_fold_twice_is_refused():
    with pytest.raises(ValueError, match="no graph at outputs"):
        fold(fold(attention_with()))


@pytest.mark.parametrize("wrong", [nn.Linear(3, 3), None])
def test_fold_refuses_what_is_no_attention(wrong):
    with pytest.raises(TypeError, match="^Expected a MultiHeadAttention"):
        fold(wrong)


SHAPE = {"d_model": M, "num_heads": H, "num_layers": 3, "d_ff": 7}


@pytest.mark.parametrize("others", [{}, {"scores": goh.SiteConfig.ring(2)}, {"values": goh.SiteConfig()}], ids=str)
@torch.no_grad()
def test_a_folded_model_is_the_same_function_and_reloads(others, tmp_path):
    graphs = goh.HeadGraphConfig(goh.SiteConfig(edges="static", rounds=2), **others)
    model = trained_like(goh.LanguageModel(goh.TransformerConfig(11, **SHAPE, head_graph=graphs)))
    tokens = torch.randint(11, (2, 7))
    expected = model(tokens).logits
    assert fold(model) is model
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-10, atol=1e-10)
    assert model.config.head_graph == (goh.HeadGraphConfig(None, **others) if others else None)
    model.save_pretrained(tmp_path)
    assert torch.equal(goh.LanguageModel.from_pretrained(tmp_path)(tokens).logits, model(tokens).logits)


FOLDING = {"interleaved-heads": None, "knocking-linear": None, "static-graph": None, "mea": goh.BaselineConfig("norm")}


@pytest.mark.parametrize("name", FOLDING)
@torch.no_grad()
def test_static_opponents_fold_away(name):
    graphs, left = dataclasses.replace(preset(name, H), layers=(0, -1)), FOLDING[name]
    model = trained_like(goh.LanguageModel(goh.TransformerConfig(11, **SHAPE, head_graph=graphs)))
    tokens = torch.randint(11, (2, 8))
    loss = model(tokens[:, :-1], targets=tokens[:, 1:]).loss
    torch.testing.assert_close(fold(model)(tokens[:, :-1], targets=tokens[:, 1:]).loss, loss, rtol=1e-10, atol=1e-10)
    assert model.config.head_graph == (left and goh.HeadGraphConfig(left, layers=(0, -1)))


@pytest.mark.parametrize("kv_heads", [None, 1], ids=["own-keys", "grouped"])
@pytest.mark.parametrize("outputs", [None, goh.SiteConfig(edges="static")], ids=["none", "outputs"])
@torch.no_grad()
def test_graphs_before_attention_fold_into_what_makes_their_nodes(kv_heads, outputs, tmp_path):
    static = goh.SiteConfig(edges="static", rounds=2)
    kept = goh.SiteConfig.ring(2)
    graphs = goh.HeadGraphConfig(outputs, kept, queries=static, keys=static, values=(static, static))
    shape = {**SHAPE, "num_kv_heads": kv_heads, "qk_norm": True}
    model = trained_like(goh.LanguageModel(goh.TransformerConfig(11, **shape, head_graph=graphs)))
    tokens = torch.randint(11, (2, 7))
    expected = model(tokens).logits
    fold(model)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-10, atol=1e-10)
    assert model.config.head_graph == goh.HeadGraphConfig(None, kept)
    assert all(not len(layer.attention.object.inner_graphs) for layer in model.decoder.layers)
    model.save_pretrained(tmp_path)
    assert torch.equal(goh.LanguageModel.from_pretrained(tmp_path)(tokens).logits, model(tokens).logits)


@torch.no_grad()
def test_a_value_residual_stays_where_the_output_graph_folds():
    residual = preset("value-residual", H).values
    graphs = goh.HeadGraphConfig(goh.SiteConfig(edges="static"), values=residual)
    model = trained_like(goh.LanguageModel(goh.TransformerConfig(11, **SHAPE, head_graph=graphs)))
    tokens = torch.randint(11, (2, 7))
    expected = model(tokens).logits
    torch.testing.assert_close(fold(model)(tokens).logits, expected, rtol=1e-10, atol=1e-10)
    assert model.config.head_graph == goh.HeadGraphConfig(None, values=residual)
    with pytest.raises(ValueError, match=r"^Expected a static linear graph at values .got senders from other.*Do "):
        fold(model)


def test_a_folded_classifier_names_no_graph():
    config = goh.TransformerConfig(11, **SHAPE, head_graph=goh.HeadGraphConfig(goh.SiteConfig(edges="static")))
    assert fold(goh.Classifier(goh.ClassifierConfig(config, 3))).config.transformer.head_graph is None


def test_a_model_that_does_not_fold_whole_is_left_as_it_was():
    site = goh.SiteConfig(edges="static", cross_layer=1)
    model = goh.LanguageModel(goh.TransformerConfig(11, **SHAPE, head_graph=goh.HeadGraphConfig(site)))
    with pytest.raises(ValueError, match="senders from other layers"):
        fold(model)
    assert all(layer.attention.object.output_graph is not None for layer in model.decoder.layers)
