"""Conversion of Hugging Face transformers: every architecture, every attention implementation, both sites."""

from __future__ import annotations

import copy
import os

import pytest
import torch
import transformers as hf
from helpers import moved
from pairs import pairwise
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers_models import (
    BOTH,
    CAUSAL,
    DENSE,
    INTERFACE,
    OUTPUTS,
    OUTPUTS_ONLY,
    SEQUENCE_TO_SEQUENCE,
    WIDE,
    build,
    far,
    inputs_of,
    tokens,
)

from gohgraph import (
    HeadGraphConfig,
    HeadRouter,
    SiteConfig,
    convert,
    fold,
    load_converted,
    record,
    save_converted,
    unconvert,
)
from gohgraph.convert.attention_interface import HeadGraphs

CONFIGS = {"outputs": OUTPUTS, "wide": WIDE, "dense": DENSE}
NUM_ATTENTIONS = {"t5": 6, "whisper": 5, "bart": 5}


def logits(model, **inputs):
    return model(**inputs).logits


# What stays bit for bit is looked at in every model.
CONVERTED = pairwise(
    INTERFACE, ("sdpa", "eager"), CONFIGS, keep=lambda name, *how: how == ("sdpa", "outputs") or name == "llama"
)


@pytest.mark.parametrize(("name", "implementation", "config"), CONVERTED)
@torch.no_grad()
def test_converting_changes_nothing_moving_edges_does_and_unconverting_restores(name, implementation, config):
    model = build(name, implementation)
    inputs, state = inputs_of(model), list(model.state_dict())
    before = logits(model, **inputs)
    report = convert(model, CONFIGS[config])
    assert len(report.replaced) == NUM_ATTENTIONS.get(name, 2) and not report.skipped
    after = logits(model, **inputs)
    if implementation == "sdpa" and config == "outputs":
        assert torch.equal(after, before)
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
    evaluated = logits(moved(model), **inputs)
    assert (evaluated - before).abs().max() > 1e-4
    without_dropout(model)
    torch.testing.assert_close(logits(model.train(), **inputs), evaluated, rtol=1e-4, atol=1e-5)
    unconvert(model.eval())
    assert torch.equal(logits(model, **inputs), before) and list(model.state_dict()) == state
    assert model.config._attn_implementation == implementation


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for attribute in ("dropout", "attention_dropout", "activation_dropout", "dropout_rate"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)


@pytest.mark.parametrize("name", OUTPUTS_ONLY)
@torch.no_grad()
def test_attention_without_the_interface_takes_output_graphs(name):
    model = build(name)
    inputs = inputs_of(model)
    before = logits(model, **inputs)
    report = convert(model)
    assert len(report.replaced) == 2 and not report.skipped
    assert torch.equal(logits(model, **inputs), before)
    assert (logits(moved(model), **inputs) - before).abs().max() > 1e-4
    assert torch.equal(logits(unconvert(model), **inputs), before)
    with pytest.raises(ValueError, match="out of reach"):
        convert(model, WIDE)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ["llama", "t5", "gpt2"])
@torch.no_grad()
def test_score_graphs_are_what_they_are_on_every_implementation(name, config):
    sdpa = far(name, CONFIGS[config])
    inputs, eager = inputs_of(sdpa), copy.deepcopy(unconvert(copy.deepcopy(sdpa)))
    eager.set_attn_implementation("eager")
    convert(eager, CONFIGS[config])
    eager.load_state_dict(sdpa.state_dict())
    torch.testing.assert_close(logits(eager, **inputs), logits(sdpa, **inputs), rtol=1e-5, atol=1e-5)


def flash_like(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **options):
    """Takes what flash attention takes: a mask of tokens `[B, S]` or none, and its own name in the configuration."""
    assert module.config._attn_implementation == "flash_like_2"
    is_causal = module.is_causal if is_causal is None else is_causal
    groups = query.shape[1] // key.shape[1]
    assert groups == getattr(module, "num_key_value_groups", 1)
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    size = query.shape[2], key.shape[2]
    mask = torch.ones(size, dtype=torch.bool).tril(size[1] - size[0]) if is_causal else torch.ones(size).bool()
    if attention_mask is not None:
        assert attention_mask.dim() == 2
        mask = mask & attention_mask.bool()[:, None, None, :]
    return scaled_dot_product_attention(query, key, value, mask, scale=scaling).transpose(1, 2), None


@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
def test_flash_attention_beneath_sees_its_own_name_and_masks(config):
    from transformers.masking_utils import flash_attention_mask

    AttentionInterface.register("flash_like_2", flash_like)
    AttentionMaskInterface.register("flash_like_2", flash_attention_mask)
    sdpa = far("llama", CONFIGS[config])
    flash = unconvert(copy.deepcopy(sdpa))
    flash.config._attn_implementation = "flash_like_2"
    convert(flash, CONFIGS[config])
    flash.load_state_dict(sdpa.state_dict())
    padded = torch.ones(2, 7, dtype=torch.long)
    padded[1, 4:] = 0
    ids = tokens()
    ours, theirs = (logits(model, input_ids=ids, attention_mask=padded) for model in (flash, sdpa))
    torch.testing.assert_close(ours[padded.bool()], theirs[padded.bool()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", ["outputs", "wide", "dense"])
@pytest.mark.parametrize("name", [*CAUSAL, "bloom", "falcon"])
@torch.no_grad()
def test_causal_models_stay_causal(name, config):
    if name in OUTPUTS_ONLY and config != "outputs":
        pytest.skip("takes no score graph")
    model, ids = far(name, CONFIGS[config]), tokens()
    before = logits(model, input_ids=ids)
    ids[:, 5:] = 3
    after = logits(model, input_ids=ids)
    torch.testing.assert_close(after[:, :5], before[:, :5], rtol=0, atol=1e-5)
    assert (after[:, 5:] - before[:, 5:]).abs().max() > 1e-3


@pytest.mark.parametrize("name", SEQUENCE_TO_SEQUENCE)
@torch.no_grad()
def test_decoders_stay_causal(name):
    model = far(name)
    inputs = inputs_of(model)
    before = logits(model, **inputs)
    inputs["decoder_input_ids"][:, 5:] = 3
    torch.testing.assert_close(logits(model, **inputs)[:, :5], before[:, :5], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [*CAUSAL, "bert", "roberta", "t5", "bart"])
@torch.no_grad()
def test_padding_does_not_leak(name, implementation):
    model, ids = far(name, BOTH, implementation), tokens()
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    more = {"decoder_input_ids": tokens()} if name in SEQUENCE_TO_SEQUENCE else {}
    before = logits(model, input_ids=ids, attention_mask=mask, **more)
    ids[1, 4:] = 5
    after = logits(model, input_ids=ids, attention_mask=mask, **more)
    kept = mask.bool() if not more else torch.ones_like(mask, dtype=torch.bool)
    torch.testing.assert_close(after[kept], before[kept], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", ["outputs", "wide", "dense"])
@pytest.mark.parametrize("name", [*CAUSAL, *SEQUENCE_TO_SEQUENCE])
def test_cached_generation_equals_uncached(name, config):
    model = far(name, CONFIGS[config])
    inputs = inputs_of(model)
    inputs.pop("decoder_input_ids", None)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    cached, whole = (model.generate(**inputs, **settings, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(whole.logits), rtol=1e-4, atol=1e-4)
    plain = unconvert(model).generate(**inputs, **settings)
    assert (torch.stack(plain.logits) - torch.stack(cached.logits)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "whisper"])
def test_beam_search_and_a_static_cache(name):
    model = far(name)
    inputs = inputs_of(model)
    inputs.pop("decoder_input_ids", None)
    settings = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**inputs, **settings), model.generate(**inputs, **settings, use_cache=False))
    if name == "llama":
        greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "disable_compile": True}
        static = model.generate(**inputs, **greedy, cache_implementation="static")
        assert torch.equal(static, model.generate(**inputs, **greedy))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_gradient_checkpointing(name, reentrant):
    model = far(name).train()
    without_dropout(model)
    inputs, gradients = inputs_of(model), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        logits(model, **inputs).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "bert", "vit", "whisper"])
@torch.no_grad()
def test_bfloat16_weights_and_autocast(name):
    model = build(name)
    inputs = inputs_of(model)
    half = copy.deepcopy(model).bfloat16()
    report = convert(half, BOTH)
    assert all(parameter.dtype == torch.bfloat16 for parameter in report.model.parameters())
    moved(half)
    halved = {key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs.items()}
    assert logits(half, **halved).dtype == torch.bfloat16 and logits(half, **halved).isfinite().all()
    convert(model, BOTH)
    moved(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = logits(model, **inputs)
    exact = logits(model, **inputs)
    assert (mixed.float() - exact).abs().max() < 0.1 * exact.abs().max()


@torch.no_grad()
def test_attention_weights_come_back_from_eager():
    model, ids = far("llama", BOTH, "eager"), tokens()
    found = model(input_ids=ids, output_attentions=True).attentions
    assert len(found) == 2 and found[0].shape == (2, 6, 7, 7)
    torch.testing.assert_close(found[0].sum(-1), torch.ones(2, 6, 7))
    assert not found[0].triu(1).any()


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert", "vit", "bloom", "deberta"])
@torch.no_grad()
def test_fold_gives_the_stock_model_back_with_changed_projections(name):
    model = far(name, HeadGraphConfig(SiteConfig(edges="static")))
    inputs, keys = inputs_of(model), list(build(name).state_dict())
    before = logits(model, **inputs)
    folded = fold(model)
    assert folded is model and list(model.state_dict()) == keys
    torch.testing.assert_close(logits(model, **inputs), before, rtol=1e-4, atol=1e-5)


def test_the_context_reaches_the_edges_and_recordings():
    model, ids = far("llama"), tokens()
    with torch.no_grad(), record(model) as heads:
        model(input_ids=ids)
    assert len(heads) == 4 and all(recording.tokens == ids.numel() for recording in heads.values())
    assert all(recording.std.min() > 0 for recording in heads.values())


@torch.no_grad()
def test_an_implementation_set_afterwards_is_the_one_beneath():
    model, ids = far("llama"), tokens()
    before = logits(model, input_ids=ids)
    model.set_attn_implementation("eager")
    found = model(input_ids=ids, output_attentions=True)
    torch.testing.assert_close(found.logits, before, rtol=1e-5, atol=1e-5)
    assert found.attentions[0].shape == (2, 6, 7, 7) and model.config._attn_implementation == "eager"


def test_copies_have_head_graphs_of_their_own():
    for name in ("llama", "bloom"):
        model, ids = far(name, OUTPUTS), tokens()
        other, before = copy.deepcopy(model), logits(model, input_ids=ids)
        assert torch.equal(logits(other, input_ids=ids), before)
        for key, parameter in other.named_parameters():
            if "head_graphs" in key:
                parameter.data.zero_()
        assert torch.equal(logits(model, input_ids=ids), before)
        assert not torch.equal(logits(other, input_ids=ids), before)
        unconvert(other)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in other.modules())
        assert torch.equal(logits(model, input_ids=ids), before)


@torch.no_grad()
def test_part_of_a_model_and_models_inside_modules():
    model = build("bart")
    inputs = inputs_of(model)
    before = logits(model, **inputs)
    report = convert(model, BOTH, where="*decoder*self_attn")
    assert len(report.replaced) == 2 and len(report.skipped) == 3
    torch.testing.assert_close(logits(model, **inputs), before, rtol=0, atol=1e-6)
    assert not torch.equal(logits(moved(model), **inputs), before)

    around = torch.nn.ModuleDict({"text": build("bert"), "image": build("vit")})
    assert len(convert(around).replaced) == 4


def test_a_router_starts_as_the_model_it_is_put_into():
    model, ids = build("llama"), tokens()
    before = logits(model, input_ids=ids)
    convert(model, HeadGraphConfig.moh(num_shared=2, top_k=4, straight_through=True))
    assert torch.equal(logits(model, input_ids=ids), before)
    sites = [module for module in model.modules() if isinstance(module, HeadGraphs)]
    sites[0].order_heads([5, 1, 0, 2, 3, 4])
    for router in (module for module in model.modules() if isinstance(module, HeadRouter)):
        router.top_k = 1
    assert not torch.equal(logits(model, input_ids=ids), before)


def test_models_that_need_other_inputs_take_an_example():
    config = hf.CLIPConfig(
        text_config={**{k: SHAPE[k] for k in SHAPE}, "eos_token_id": 2},
        vision_config={**{k: SHAPE[k] for k in SHAPE if k != "vocab_size"}, "image_size": 12, "patch_size": 4},
    )
    model = hf.CLIPModel(config).eval()
    example = {"input_ids": tokens(1), "pixel_values": torch.randn(1, 3, 12, 12)}
    with pytest.raises(ValueError, match="as example="):
        convert(model)
    assert len(convert(model, BOTH, example=example).replaced) == 4


SHAPE = {"vocab_size": 97, "hidden_size": 30, "num_hidden_layers": 2, "intermediate_size": 22, "num_attention_heads": 5}


@pytest.mark.skipif("GOHGRAPH_CHECKPOINT" not in os.environ, reason="GOHGRAPH_CHECKPOINT names no model of text")
@torch.no_grad()
def test_a_real_checkpoint(tmp_path):
    path = os.environ["GOHGRAPH_CHECKPOINT"]
    names = hf.AutoConfig.from_pretrained(path).architectures
    causal = any(name.endswith(("CausalLM", "LMHeadModel")) for name in names)
    model = (hf.AutoModelForCausalLM if causal else hf.AutoModel).from_pretrained(path).eval()
    ids = torch.randint(model.config.vocab_size, (1, 61))
    before = model(input_ids=ids)[0]
    convert(model)
    assert torch.equal(model(input_ids=ids)[0], before)
    moved(model)
    after = model(input_ids=ids)[0]
    assert (after - before).abs().max() > 1e-3
    save_converted(model, tmp_path)
    assert torch.equal(load_converted(tmp_path).eval()(input_ids=ids)[0], after)
    assert torch.equal(unconvert(model)(input_ids=ids)[0], before)
