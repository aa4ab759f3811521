"""Which weights may be written into, and what asks before it writes: fold, reorder_heads, prune and their kin."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from helpers import language_model, moved, random_tokens, small_config
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers_models import build, tokens

import gohgraph as goh
from gohgraph.common.modules import check_writable, working_modules
from gohgraph.parallel.placement import reorder_heads

STATIC = goh.HeadGraphConfig(goh.SiteConfig(edges="static"))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def register_doubled(linear):
    parametrize.register_parametrization(linear, "weight", Doubled())


def share_storage(linear):
    both = torch.randn(2 * linear.weight.numel())
    linear.weight.data = both[: linear.weight.numel()].view_as(linear.weight)
    linear.other = nn.Parameter(both[1 : 1 + linear.weight.numel()].view_as(linear.weight))


# What may have happened to a projection, and what is to be done about it.
CHANGES = {
    "weight norm": (nn.utils.weight_norm, "merge"),
    "spectral norm": (nn.utils.spectral_norm, "merge"),
    "pruned": (lambda linear: prune.l1_unstructured(linear, "weight", 0.5), "merge"),
    "new weight norm": (parametrizations.weight_norm, "[mM]erge"),
    "orthogonal": (parametrizations.orthogonal, "[mM]erge"),
    "doubled": (register_doubled, "[mM]erge"),
    "views of one memory": (share_storage, "untie"),
    "meta": (lambda linear: linear.to("meta"), "load"),
    "quantised": (lambda linear: setattr(linear, "weight", nn.Parameter(torch.zeros(30, 30).char(), False)), "load"),
}
CASES = pytest.mark.parametrize("change", CHANGES)


@CASES
def test_fold_writes_only_into_a_weight_that_is_the_weight(change):
    transform, remedy = CHANGES[change]
    model = build("llama").to(torch.float32)
    goh.convert(model, STATIC)
    moved(model)
    projection = model.model.layers[1].self_attn.o_proj
    if change == "quantised":
        projection.weight = nn.Parameter(torch.zeros(30, 24).char(), False)
    else:
        transform(projection)
    first = model.model.layers[0].self_attn.o_proj.weight.clone()
    with pytest.raises(ValueError, match=f"Do .*{remedy}"):
        goh.fold(model)
    # Not a part of it either.
    assert torch.equal(model.model.layers[0].self_attn.o_proj.weight, first)
    assert all(layer.self_attn.head_graphs.output_graph is not None for layer in model.model.layers)


@CASES
@pytest.mark.parametrize("write", ["fold", "reorder_heads", "share_important_heads"])
def test_blocks_of_own_models(write, change):
    transform, remedy = CHANGES[change]
    model = goh.LanguageModel(small_config("outputs-static" if write == "fold" else "plain"))
    transform(model.decoder.layers[1].attention.object.output)
    importance = {"decoder.layers.1.attention.object": torch.arange(5.0)}
    first = model.decoder.layers[0].attention.object.output.weight.clone()
    with pytest.raises(ValueError, match=f"Do .*{remedy}"):
        if write == "fold":
            goh.fold(model)
        elif write == "reorder_heads":
            reorder_heads(model, [4, 1, 0, 2, 3])
        else:
            goh.share_important_heads(model, importance)
    assert torch.equal(model.decoder.layers[0].attention.object.output.weight, first)


@pytest.mark.parametrize("name", ["llama", "gpt2", "encoder", "own"])
def test_tied_projections_are_refused_and_untied_ones_fold(name):
    if name == "encoder":
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(20, 4, 11, batch_first=True), 2)
        x = torch.randn(2, 5, 20)
        projections = [layer.self_attn.out_proj for layer in model.layers]
    elif name == "own":
        model, x = goh.LanguageModel(small_config()), random_tokens(7)
        projections = [layer.attention.object.output for layer in model.decoder.layers]
    else:
        model, x = build(name), tokens()
        layers = model.model.layers if name == "llama" else model.transformer.h
        projections = [layer.self_attn.o_proj if name == "llama" else layer.attn.c_proj for layer in layers]
    model.eval()
    projections[1].weight = projections[0].weight
    goh.convert(model, STATIC)
    moved(model)

    def run():
        with torch.no_grad():
            y = model(x)
        return y if isinstance(y, torch.Tensor) else y.logits

    before = run()
    with pytest.raises(ValueError, match="shared with.*Do untie it"):
        goh.fold(model)
    torch.testing.assert_close(run(), before, rtol=0, atol=0)
    projections[1].weight = nn.Parameter(projections[0].weight.detach().clone())
    goh.fold(model)
    torch.testing.assert_close(run(), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ["graphs first", "adapters first"])
def test_adapters_have_to_be_merged_before_folding(order):
    model, ids = build("llama"), tokens()
    lora = LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    if order == "graphs first":
        goh.convert(model, STATIC)
        adapted = get_peft_model(model, lora)
    else:
        adapted = get_peft_model(model, lora)
        goh.convert(adapted, STATIC)
    moved(adapted).eval()
    with torch.no_grad():
        before = adapted(input_ids=ids).logits
        with pytest.raises(ValueError, match="merge adapters"):
            goh.fold(adapted)
        torch.testing.assert_close(adapted(input_ids=ids).logits, before, rtol=0, atol=0)
        if order == "graphs first":
            merged = adapted.merge_and_unload()
            torch.testing.assert_close(goh.fold(merged)(input_ids=ids).logits, before, rtol=1e-4, atol=1e-5)
    own = goh.LanguageModel(small_config("outputs-static"))
    inject_adapter_in_model(LoraConfig(target_modules=["output"], r=2), own)
    with pytest.raises(ValueError, match="merge adapters"):
        goh.fold(own)


def test_layers_that_share_one_module_fold_once():
    shape = {"vocab_size": 97, "hidden_size": 30, "embedding_size": 10, "intermediate_size": 22}
    model = hf.AlbertForMaskedLM(hf.AlbertConfig(**shape, num_hidden_layers=3, num_attention_heads=5)).eval()
    goh.convert(model, STATIC)
    moved(model)
    with torch.no_grad():
        before = model(tokens()).logits
        torch.testing.assert_close(goh.fold(model)(tokens()).logits.shape, before.shape)


@pytest.mark.parametrize("change", ["tied", "parametrized", "meta"])
def test_prune_writes_only_into_edges_of_their_own(change):
    model = language_model("outputs").float()
    first, second = (layer.attention.object.output_graph.edges for layer in list(model.decoder.layers)[:2])
    if change == "tied":
        second.weight = first.weight
    elif change == "parametrized":
        parametrize.register_parametrization(first, "weight", Doubled())
    else:
        first.to("meta")
    with pytest.raises(ValueError, match="^Expected a (weight|bias) of its own in 'decoder.layers.*edges'"):
        goh.prune(model, 0.5)
    with pytest.raises(ValueError, match="of its own"):
        reorder_heads(model, [4, 1, 0, 2, 3])


def test_neighbours_in_one_memory_are_no_ties():
    flat = torch.zeros(24)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 3, bias=False))
    model[0].weight.data, model[1].weight.data = flat[:12].view(4, 3), flat[12:].view(3, 4)
    check_writable(model, model)
    check_writable(model, model, ("weight", "bias", "nothing"))


def test_working_modules_are_those_in_use():
    model = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    names = [name for name, _ in working_modules(model)]
    assert any("lm_head.modules_to_save.default" in name for name in names)
    assert not any("lm_head.original_module" in name for name in names)
    with model.disable_adapter():
        names = [name for name, _ in working_modules(model)]
    assert any("lm_head.original_module" in name for name in names)
    assert not any("lm_head.modules_to_save." in name for name in names)
