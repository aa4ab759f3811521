"""Every preset in whole models: causal, blind to padding, the same through a cache, saved and loaded."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from helpers import assert_equal_to, trained_like

import gohgraph as goh
from gohgraph.graphs.baselines.presets import BESIDE, OPPONENTS, PRESETS, fields_of, preset

B, T, V = 2, 9, 13
SHAPE = {"d_model": 32, "num_heads": 8, "num_layers": 2, "d_ff": 7}
presets = pytest.mark.parametrize("name", PRESETS)
# Their starts are not plain attention: gates begin at one half, norms resize heads, frozen edges are random, routers
# leave heads out, compositions are drawn small, and what is published without a gate has none.
NOT_NEUTRAL = [name for name in PRESETS if any(part in name for part in ("gate", "norm", "moh", "frozen"))]
OTHERS = {"mea", "dcmha", "dcmha-last", "xsa", "diff-v2", "paired-heads"}
NOT_NEUTRAL = sorted({*NOT_NEUTRAL, *OTHERS} - {"outputs-gates-only", "outputs-norm", "xsa-gated"})


def config(name, **settings):
    return goh.TransformerConfig(V, **SHAPE, **{**fields_of(name, SHAPE["num_heads"]), **settings})


def model_of(name, **settings):
    return trained_like(goh.LanguageModel(config(name, **settings))).eval()


def tokens(batch=B):
    return torch.randint(V, (batch, T))


@presets
def test_configurations_survive_json(name):
    whole = config(name)
    assert goh.TransformerConfig.from_dict(json.loads(json.dumps(whole.to_dict()))) == whole


@presets
def test_later_tokens_never_reach_earlier_ones(name):
    model, before = model_of(name), tokens()
    after = before.clone()
    after[:, 5:] = (after[:, 5:] + 1) % V
    first, second = model(before).logits, model(after).logits
    assert torch.equal(first[:, :5], second[:, :5]) or (first - second)[:, :5].abs().max() < 1e-10
    assert (first - second)[:, 5:].abs().max() > 1e-3


# Whole maps, edges that are the same for all tokens, and the default.
@pytest.mark.parametrize("name", ["outputs", "scores-complete", "value-residual"])
@torch.no_grad()
def test_exported_programs_take_any_batch_and_length(name):
    model, sizes = model_of(name), {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("tokens", min=2, max=64)}
    program = torch.export.export(model, (tokens(3),), dynamic_shapes=(sizes,), strict=False).module()
    # As many examples as heads, and as many tokens.
    for other in (tokens(3), tokens(8)[:, :5], tokens(5)[:, :8]):
        assert_equal_to(program(other).logits, model(other).logits)


@presets
@torch.no_grad()
def test_a_cache_changes_nothing(name):
    model, text = model_of(name), tokens()
    caches = model.decoder.new_caches()
    pieces = [model(text[:, a:b], caches=caches).logits for a, b in ((0, 4), (4, 5), (5, 8), (8, T))]
    assert_equal_to(torch.cat(pieces, dim=1), model(text).logits)


@presets
@torch.no_grad()
def test_padding_has_no_influence(name):
    model, text = model_of(name), tokens()
    keep = torch.ones(B, T, dtype=torch.bool)
    keep[1, :3] = False
    logits = model(text, keep_mask=keep).logits
    assert_equal_to(logits[1:, 3:], model(text[1:, 3:]).logits)


@presets
def test_every_parameter_learns(name):
    torch.manual_seed(1)
    model = goh.LanguageModel(config(name))
    for parameter in model.parameters():
        # Away from the start, where one factor of a product is zero.
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    text = torch.randint(V, (4, 31))
    model(text[:, :-1], targets=text[:, 1:]).loss.backward()
    # The heads of the last layer's output read no later layer; a key's bias moves all scores of a row alike.
    still = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert [name for name in still if not name.endswith("key.bias")] == []


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in NOT_NEUTRAL])
def test_starts_as_plain_attention(name):
    plain, own = goh.LanguageModel(config("plain")), goh.LanguageModel(config(name))
    loaded = own.load_state_dict(plain.state_dict(), strict=False)
    assert not loaded.unexpected_keys
    text = tokens()
    torch.testing.assert_close(own(text).logits, plain(text).logits, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", NOT_NEUTRAL)
def test_these_do_not_start_as_plain_attention(name):
    torch.manual_seed(0)
    plain, own = goh.LanguageModel(config("plain")), goh.LanguageModel(config(name))
    own.load_state_dict(plain.state_dict(), strict=False)
    text = tokens()
    assert (own(text).logits - plain(text).logits).abs().max() > 1e-5


@pytest.mark.parametrize("site", ["query", "key", "value"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_graphs_before_attention_are_plain_attention_bit_for_bit(site, dtype):
    graph = goh.HeadGraphConv(goh.head_graph(5), 6, 30)
    attention = goh.MultiHeadAttention(30, 5, causal=True, inner_graphs={site: graph}).to(dtype)
    plain = copy.deepcopy(attention)
    plain.inner_graphs.clear()
    x = torch.randn(B, T, 30, dtype=dtype)
    assert torch.equal(attention(x)[0], plain(x)[0])


@pytest.mark.parametrize("name", ["values", "mea", "knocking-linear", "keyed-scores", "dcmha", "talking-heads"])
@torch.no_grad()
def test_key_value_heads_are_the_nodes_at_keys_and_values(name):
    model, text = model_of(name, num_kv_heads=4), tokens()
    caches = model.decoder.new_caches()
    pieces = [model(text[:, a:b], caches=caches).logits for a, b in ((0, 6), (6, 7), (7, T))]
    assert_equal_to(torch.cat(pieces, dim=1), model(text).logits)
    graphs = model.decoder.layers[0].attention.object.inner_graphs
    assert all(graphs[site].num_heads == 4 for site in graphs if site in ("key", "value"))


@pytest.mark.parametrize("name", ["mea", "dcmha", "norm-outputs-element-gate", "keyed-scores"])
def test_saved_models_come_back(name, tmp_path):
    model, text = model_of(name).float(), tokens()
    model.save_pretrained(tmp_path / "model")
    again = goh.LanguageModel.from_pretrained(tmp_path / "model").eval()
    assert again.config == model.config and torch.equal(again(text).logits, model(text).logits)


@pytest.mark.parametrize("name", ["dcmha", "keyed-scores", "mea"])
@torch.no_grad()
def test_encoder_decoders_translate_through_caches(name):
    model = trained_like(goh.Transformer(config(name))).eval()
    source, target = tokens(), tokens()
    memory = model.encode(source).x
    caches = model.decoder.new_caches()
    pieces = [model.decode(target[:, a:b], memory, caches=caches).x for a, b in ((0, 2), (2, 3), (3, T))]
    assert_equal_to(torch.cat(pieces, dim=1), model.decode(target, memory).x)


@pytest.mark.parametrize("name", [name for name in OPPONENTS if name not in ("moh-75", "moh-50", "paired-heads")])
def test_opponents_work_beside_a_router(name):
    graphs = preset(name, 8) or goh.HeadGraphConfig(None)
    routed = goh.TransformerConfig(V, **SHAPE, head_graph=dataclasses.replace(graphs, routing=goh.RoutingConfig(2, 2)))
    model = trained_like(goh.LanguageModel(routed))
    text = tokens()
    output = model(text[:, :-1], targets=text[:, 1:])
    output.loss.backward()
    assert output.loss.isfinite() and output.routing[0].active.sum(-1).eq(4).all()


@pytest.mark.parametrize("name", ["xsa", "diff-v2", "paired-heads", "dcmha-last"])
@torch.no_grad()
def test_cross_attention_has_what_fits_it(name):
    model = trained_like(goh.Transformer(config(name))).eval()
    assert all(layer.cross_attention.object.output_graph is None for layer in model.decoder.layers)
    source, target = tokens(), tokens()
    memory, caches = model.encode(source).x, model.decoder.new_caches()
    pieces = [model.decode(target[:, a:b], memory, caches=caches).x for a, b in ((0, 2), (2, 3), (3, T))]
    assert_equal_to(torch.cat(pieces, dim=1), model.decode(target, memory).x)


def test_interleaved_heads_have_a_rate_of_their_own_that_outlives_pruning():
    model = goh.LanguageModel(config("interleaved-heads"))
    graphs = [graph for block in model.decoder.layers for graph in block.attention.object.inner_graphs.values()]
    assert len(graphs) == 6 and {graph.traits.learning_rate_factor for graph in graphs} == {7.0}
    graphs[0].keep_edges(graphs[0].edge_index[0] != 1)
    assert graphs[0].traits.learning_rate_factor == 7.0


def test_what_stands_beside_head_graphs_belongs_to_an_opponent():
    assert set(BESIDE) <= set(OPPONENTS)
    assert fields_of("mudd", 8) == {"head_graph": preset("mudd", 8), "residual": "dense"}
    assert fields_of("xsa", 8) == {"head_graph": preset("xsa", 8)}


def test_unknown_sites_are_refused():
    with pytest.raises(ValueError, match="Expected inner_graphs of"):
        goh.MultiHeadAttention(30, 5, inner_graphs={"gates": torch.nn.Identity()})
    with pytest.raises(ValueError, match="Expected a graph over 5 heads at values"):
        goh.MultiHeadAttention(30, 5, inner_graphs={"value": goh.HeadGraphConv(goh.head_graph(3), 6, 30)})


@pytest.mark.parametrize(
    ("graphs", "named"),
    [
        ({"outputs": goh.SiteConfig(kind="keyed")}, 'outputs .*kind="keyed"'),
        ({"weights": goh.SiteConfig(kind="keyed")}, 'weights .*kind="keyed"'),
        ({"weights": goh.SiteConfig(norm=True)}, "weights .*norm=True"),
        ({"scores": goh.SiteConfig(norm=True)}, "scores .*norm=True"),
        ({"scores": goh.SiteConfig("bipartite", {"num_shared": 2}, kind="experts", num_shared=2)}, 'kind="experts"'),
        ({"scores": goh.SiteConfig(cross_layer=1)}, "scores here .*cross_layer=1"),
        ({"weights": goh.SiteConfig(cross_layer="first")}, "weights here .*cross_layer='first'"),
        ({"scores": goh.SiteConfig(cross_layer="all")}, ".*cross_layer='all'"),
        ({"outputs": goh.BaselineConfig("composition")}, "outputs .*Composition, which is for scores, weights"),
        ({"scores": (goh.SiteConfig(), goh.BaselineConfig("norm"))}, "scores .*Chain, which is for"),
    ],
    ids=str,
)
def test_what_cannot_stand_at_a_site_is_refused_when_built(graphs, named):
    configured = goh.TransformerConfig(V, **SHAPE, head_graph=goh.HeadGraphConfig(**{"outputs": None, **graphs}))
    with pytest.raises(ValueError, match=f"^Expected .*{named}"):
        goh.LanguageModel(configured)
