"""convert compares one forward pass before and after, names the layer that differs, and undoes everything then."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from helpers import moved
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers_models import BOTH, OUTPUTS_ONLY, WIDE, build, inputs_of, tokens

import gohgraph as goh
from gohgraph.convert.example_inputs import example_inputs


@torch.no_grad()
def logits(model, **inputs):
    return model(**inputs).logits


def flash_like(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **options):
    """Ignores the scale it is given."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    z = F.scaled_dot_product_attention(query, key, value, is_causal=query.shape[2] > 1)
    return z.transpose(1, 2), None


def test_attention_functions_that_ignore_the_scale_take_no_score_graphs():
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("scale_free", flash_like)
    AttentionMaskInterface.register("scale_free", sdpa_mask)
    model, ids = build("llama"), tokens()
    model.config._attn_implementation = "scale_free"
    before = logits(model, input_ids=ids)
    with pytest.raises(ValueError, match="does not go by the scale it is given"):
        goh.convert(model, WIDE)
    assert torch.equal(logits(model, input_ids=ids), before)
    assert len(goh.convert(model).replaced) == 2 and torch.equal(logits(model, input_ids=ids), before)


def unstable(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **options):
    """Attends otherwise to whoever has no real configuration."""
    z, _ = flash_like(module, query, key, value, attention_mask)
    return z * (1 if "head_graphs" not in module._modules or module.layer_idx == 0 else 1.01), None


def test_a_layer_that_computes_something_else_is_named_and_all_is_undone():
    AttentionInterface.register("unstable", unstable)
    model, ids = build("llama"), tokens()
    model.config._attn_implementation = "unstable"
    before, state = logits(model, input_ids=ids), list(model.state_dict())
    with pytest.raises(ValueError, match=r"^Expected model\.layers\.1\.self_attn to compute what it did.*off by.*Do "):
        goh.convert(model)
    assert torch.equal(logits(model, input_ids=ids), before) and list(model.state_dict()) == state
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["llama", "t5", "vit", "bloom"])
def test_all_is_compared_and_routers_and_frozen_edges_are_left_out_of_it(name):
    scores = None if name in OUTPUTS_ONLY else goh.SiteConfig.ring(2, edges="frozen")
    for config in (
        goh.HeadGraphConfig.moh(num_shared=1, top_k=1),
        goh.HeadGraphConfig(goh.SiteConfig(edges="frozen"), scores),
    ):
        model = build(name)
        inputs = inputs_of(model)
        before = logits(model, **inputs)
        assert not goh.convert(model, config).unchecked
        assert (logits(model, **inputs) - before).abs().max() > 1e-4
        assert torch.equal(logits(goh.unconvert(model), **inputs), before)


def test_example_tokens_reach_beyond_windows_and_are_not_special():
    shape = {"vocab_size": 97, "hidden_size": 30, "num_attention_heads": 5, "num_hidden_layers": 1}
    config = hf.MistralConfig(**shape, num_key_value_heads=5, sliding_window=41)
    ids = example_inputs(hf.MistralForCausalLM(config))["input_ids"]
    assert ids.shape[1] > 41 and not {1, 2} & set(ids[0].tolist()) and len(set(ids[0].tolist())) > 41
    # Cheap whatever the window is, and within the positions there are.
    config.sliding_window = 4096
    assert example_inputs(hf.MistralForCausalLM(config))["input_ids"].shape[1] <= 160
    short = hf.BertForMaskedLM(hf.BertConfig(**{**SHAPE, "max_position_embeddings": 7}))
    assert example_inputs(short)["input_ids"].shape[1] <= 7
    assert len(goh.convert(short).replaced) == 1


SHAPE = {"vocab_size": 97, "hidden_size": 30, "num_hidden_layers": 1, "intermediate_size": 22, "num_attention_heads": 5}


def test_caches_that_are_given_are_not_written_into():
    model, ids = build("llama"), tokens()
    with torch.no_grad():
        past = model(ids[:, :3], use_cache=True).past_key_values
    length = past.get_seq_length()
    goh.convert(model, BOTH, example={"input_ids": ids[:, 3:], "past_key_values": past})
    assert past.get_seq_length() == length


@pytest.mark.parametrize("kdim", [None, 7])
def test_torchs_modules_are_compared_by_themselves(kdim):
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(20, 4, kdim=kdim, vdim=kdim, batch_first=True)})
    assert not goh.convert(model, BOTH).unchecked
    moved(model)
    goh.unconvert(model)
    broken = nn.ModuleDict({"attention": nn.MultiheadAttention(20, 4, bias=True)})
    broken["attention"].in_proj_bias.data[0] = float("nan")
    assert len(goh.convert(broken).replaced) == 1
