"""Conversion of torch models, timm's attention, attention of usual names, and the library's own models."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import FusedAttention, moved, small_config
from torch import nn

import gohgraph as goh
from gohgraph import (
    HeadGraphConfig,
    RoutingConfig,
    SiteConfig,
    convert,
    fold,
    load_converted,
    save_converted,
    unconvert,
)

B, T = 3, 5
OUTPUTS, SCORES = HeadGraphConfig(), HeadGraphConfig(None, SiteConfig.ring(2))
STATIC = HeadGraphConfig(SiteConfig(topology="star", edges="static"))


class BiasedAttention(FusedAttention):
    """As in windowed transformers: the replacement would compute something else."""

    def __init__(self, dim, num_heads):
        super().__init__(dim, num_heads)
        self.bias = nn.Parameter(torch.randn(num_heads, T, T))

    def forward(self, x):
        return super().forward(x, self.bias[:, : x.shape[1], : x.shape[1]])


class Block(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(20), attention, nn.Linear(20, 20)

    def forward(self, x):
        return x + self.mlp(x + self.attn(self.norm(x)))


def vision_transformer(*attentions):
    return nn.Sequential(*map(Block, attentions))


MODELS = {
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(20, 5, 11, 0.0, batch_first=True), 2),
    "fast-encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(20, 4, 11, 0.0, batch_first=True), 2),
    "fused": lambda: vision_transformer(FusedAttention(20, 5), FusedAttention(20, 5, qk_norm=True)),
    "fused-norm": lambda: vision_transformer(FusedAttention(20, 5, scale_norm=True, fused=False)),
    "biased": lambda: vision_transformer(BiasedAttention(20, 5)),
}
WITH_SCORES = [name for name in MODELS if name != "biased"]


def far(config=OUTPUTS, name="fused"):
    """A converted model whose edges are far from their start, and an input."""
    model = MODELS[name]().eval()
    convert(model, config)
    return moved(model), torch.randn(B, T, 20)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("config", [OUTPUTS, SCORES], ids=["outputs", "scores"])
@torch.no_grad()
def test_converting_changes_nothing_moving_edges_does_and_unconverting_restores(name, config):
    if config.scores is not None and name not in WITH_SCORES:
        pytest.skip("takes no score graph")
    model, x = MODELS[name]().eval(), torch.randn(B, T, 20)
    before, state, parameters = model(x), list(model.state_dict()), list(model.parameters())
    report = convert(model, config)
    assert report.model is model and len(report.replaced) == (1 if name in ("fused-norm", "biased") else 2)
    assert not report.skipped
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-6)
    # The very same objects, under the very same names.
    assert {id(p) for p in parameters} <= {id(p) for p in model.parameters()}
    assert set(state) <= set(model.state_dict())
    moved(model)
    evaluated, trained = model(x), model.train()(x)
    torch.testing.assert_close(evaluated, trained, rtol=0, atol=1e-5)
    assert (evaluated - before).abs().max() > 1e-3
    unconvert(model.eval())
    assert torch.equal(model(x), before) and list(model.state_dict()) == state
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]


@torch.no_grad()
def test_sdpa_paths_are_bitwise_the_same():
    model, x = vision_transformer(FusedAttention(20, 5), BiasedAttention(20, 5)).eval(), torch.randn(B, T, 20)
    before = model(x)
    convert(model)
    assert torch.equal(model(x), before)


@torch.no_grad()
def test_padding_does_not_leak_in_a_converted_encoder():
    model, x = far(OUTPUTS, "fast-encoder")
    hidden = torch.zeros(B, T, dtype=torch.bool)
    hidden[1, 3:] = True
    whole = model(x, src_key_padding_mask=hidden)
    x[1, 3:] = 7.0
    torch.testing.assert_close(model(x, src_key_padding_mask=hidden)[1, :3], whole[1, :3], rtol=0, atol=1e-6)
    torch.testing.assert_close(whole[1:2, :3], model(x[1:2, :3]), rtol=0, atol=1e-5)


def test_nested_tensors_are_on_again_after_unconverting():
    model = MODELS["fast-encoder"]()
    assert model.use_nested_tensor
    convert(model)
    assert not model.use_nested_tensor
    assert unconvert(model).use_nested_tensor
    odd = MODELS["encoder"]()
    convert(odd)
    assert not unconvert(odd).use_nested_tensor


def test_where_and_reasons():
    report = convert(MODELS["encoder"](), where="layers.1.*")
    assert report.replaced == ["layers.1.self_attn"]
    assert report.skipped == {"layers.0.self_attn": "where leaves it out"}
    report = convert(MODELS["encoder"](), where=lambda name: ".0." in name)
    assert report.replaced == ["layers.0.self_attn"]
    both = vision_transformer(FusedAttention(20, 5), BiasedAttention(20, 5))
    report = convert(both, SCORES)
    assert report.replaced == ["0.attn"] and "out of reach" in report.skipped["1.attn"]
    assert "1.attn" in str(report)


def test_an_attention_module_that_is_the_model():
    for attention in (FusedAttention(20, 5), BiasedAttention(20, 5)):
        x = torch.randn(B, T, 20)
        before = attention(x)
        assert len(convert(attention).replaced) == 1
        assert torch.equal(attention(x), before) and not torch.equal(moved(attention)(x), before)
        assert torch.equal(unconvert(attention)(x), before)


def test_freeze_backbone_trains_head_graphs_alone():
    model = MODELS["fused"]()
    report = convert(model, HeadGraphConfig(routing=RoutingConfig(1, 4)), freeze_backbone=True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("output_graph" in name or "router" in name for name in trained)
    assert report.trainable == report.head_graph_parameters < report.parameters
    assert f"{report.trainable:,} trainable" in str(report)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(B, T, 20)).square().mean().backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and changed <= trained


@torch.no_grad()
@pytest.mark.parametrize("name", ["encoder", "fused", "biased"])
def test_fold_gives_the_stock_model_back_with_changed_projections(name):
    model, x = far(STATIC, name)
    before, kinds = model(x), [type(module) for module in MODELS[name]().modules()]
    assert fold(model) is model
    assert [type(module) for module in model.modules()] == kinds
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-6)


def test_fold_refuses_what_differs_by_token_and_leaves_it():
    model, x = far()
    before = model(x)
    with pytest.raises(ValueError, match="depend on the token"):
        fold(model)
    both, _ = far(HeadGraphConfig(STATIC.outputs, SiteConfig.ring(2)))
    with pytest.raises(ValueError, match=r"without score graphs \(got one before '"):
        fold(both)
    assert torch.equal(model(x), before)


@torch.no_grad()
def test_a_single_dropin_folds():
    graph = goh.HeadGraphConv(goh.head_graph(5), 4, 20, edges="static")
    attention, x = moved(goh.GraphMultiheadAttention(20, 5, output_graph=graph)), torch.randn(T, B, 20)
    before = attention(x, x, x)[0]
    assert fold(attention) is attention and attention.output_graph is None
    torch.testing.assert_close(attention(x, x, x)[0], before, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["encoder", "fused", "biased"])
def test_copies_have_head_graphs_of_their_own(name):
    model, x = far(OUTPUTS, name)
    before, other = model(x), copy.deepcopy(model)
    assert torch.equal(other(x), before)
    for parameter in other.parameters():
        parameter.zero_()
    assert torch.equal(model(x), before) and not other(x).equal(before)


@pytest.mark.parametrize("name", ["encoder", "fused", "biased"])
@pytest.mark.parametrize("backbone", [True, False])
@torch.no_grad()
def test_saving_and_loading(name, backbone, tmp_path):
    model, x = far(OUTPUTS, name)
    save_converted(model, tmp_path / "saved", backbone=backbone)
    stock = MODELS[name]().eval()
    if not backbone:
        plain = {key: value for key, value in model.state_dict().items() if key in stock.state_dict()}
        stock.load_state_dict(plain)
    loaded = load_converted(tmp_path / "saved", stock)
    assert loaded is stock and torch.equal(loaded(x), model(x))
    size = (tmp_path / "saved" / "model.safetensors").stat().st_size
    graphs = sum(p.numel() for n, p in model.named_parameters() if "output_graph" in n)
    assert 4 * graphs < size < 4 * graphs + 20_000


@torch.no_grad()
def test_chosen_layers_are_given_graphs_saved_and_loaded(tmp_path):
    model, x = far(HeadGraphConfig(layers=(-1,)), "encoder")
    first, last = (layer.self_attn for layer in model.layers)
    assert first.output_graph is None and last.output_graph is not None
    save_converted(model, tmp_path / "saved")
    loaded = load_converted(tmp_path / "saved", MODELS["encoder"]().eval())
    assert torch.equal(loaded(x), model(x))
    assert type(unconvert(model).layers[0].self_attn) is nn.MultiheadAttention
    with pytest.raises(ValueError, match=r"^Expected layers among the 2 of the stack \(got \[2\]\)"):
        convert(model, HeadGraphConfig(layers=(0, 2)))
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention


def test_weights_of_a_converted_model_do_not_load_into_a_stock_one():
    model, _ = far(OUTPUTS, "encoder")
    with pytest.raises(RuntimeError, match="Unexpected key.*output_graph"):
        MODELS["encoder"]().load_state_dict(model.state_dict())


def test_loading_into_another_model_is_refused(tmp_path):
    model, _ = far(OUTPUTS, "encoder")
    save_converted(model, tmp_path / "saved", backbone=False)
    with pytest.raises(ValueError, match="with the modules.*layers.0"):
        load_converted(tmp_path / "saved", nn.Sequential(MODELS["encoder"]()))
    with pytest.raises(ValueError, match="Do pass it as `model`"):
        load_converted(tmp_path / "saved")
    wider = nn.TransformerEncoder(nn.TransformerEncoderLayer(30, 5, 11, batch_first=True), 2)
    with pytest.raises(ValueError, match="of sizes.*5, 6, 30"):
        load_converted(tmp_path / "saved", wider)
    assert isinstance(wider.layers[0].self_attn, nn.MultiheadAttention)


def test_a_router_that_starts_as_plain_attention():
    model, x = MODELS["fused"]().eval(), torch.randn(B, T, 20)
    before = model(x)
    convert(model, HeadGraphConfig.moh(num_shared=1, top_k=4, straight_through=True))
    assert torch.equal(model(x), before)
    for module in model.modules():
        if isinstance(module, goh.HeadRouter):
            module.top_k = 1
    assert not torch.equal(model(x), before)


def test_score_graphs_and_routers_together():
    model, x = MODELS["fused"]().eval(), torch.randn(B, T, 20)
    convert(model, HeadGraphConfig(scores=SiteConfig(), routing=RoutingConfig(1, 2)))
    moved(model)
    assert model(x).shape == x.shape


@torch.no_grad()
def test_the_librarys_own_models():
    model = goh.LanguageModel(small_config()).eval()
    tokens = torch.randint(13, (B, T))
    before = model(tokens).logits
    report = convert(model, HeadGraphConfig(SiteConfig(cross_layer=1), SiteConfig.ring(2)), freeze_backbone=True)
    assert len(report.replaced) == 3 and report.trainable == report.head_graph_parameters > 0
    torch.testing.assert_close(model(tokens).logits, before, rtol=0, atol=1e-6)
    moved(model)
    assert (model(tokens).logits - before).abs().max() > 1e-3
    rebuilt = goh.LanguageModel(model.config).eval()
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt(tokens).logits, model(tokens).logits)
    unconvert(model)
    assert torch.equal(model(tokens).logits, before) and model.config == small_config()
    with pytest.raises(ValueError, match="save_pretrained"):
        save_converted(model, "nowhere")
    with pytest.raises(ValueError, match="where=None"):
        convert(model, where="*")


@pytest.mark.parametrize(
    "model, config, message",
    [
        (lambda: nn.Linear(3, 5), None, "got none in Linear: no attention at all"),
        (lambda: nn.MultiheadAttention(20, 5), None, "GraphMultiheadAttention.from_torch"),
        (lambda: far()[0], None, "Do unconvert it first"),
        (lambda: goh.LanguageModel(small_config("outputs")), None, "Do unconvert it first"),
        (MODELS["fused"], HeadGraphConfig(SiteConfig(cross_layer=1)), "got cross_layer=1"),
        (MODELS["fused"], HeadGraphConfig(scores=SiteConfig(kind="keyed")), "reads the keys' tokens"),
        (MODELS["fused"], HeadGraphConfig(queries=SiteConfig()), "got queries"),
        (MODELS["fused"], HeadGraphConfig.moh(7, 1), "num_shared"),
        (MODELS["biased"], SCORES, "out of reach"),
        (MODELS["fused"], HeadGraphConfig(SiteConfig([(0, 7)])), "head indices"),
    ],
)
def test_what_cannot_be_converted_is_refused_and_left_alone(model, config, message):
    model = model()
    state = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        convert(model, config)
    assert list(model.state_dict()) == state


def test_the_configuration_has_a_type():
    with pytest.raises(TypeError, match="HeadGraphConfig"):
        convert(MODELS["fused"](), SiteConfig())


def test_saving_needs_a_converted_model(tmp_path):
    with pytest.raises(ValueError, match="Do convert it first"):
        save_converted(MODELS["fused"](), tmp_path)
