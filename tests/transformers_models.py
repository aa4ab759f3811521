"""Tiny random models of transformers for the tests, one of each architecture; sizes are mostly primes."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from helpers import moved
from torch import Tensor, nn

from gohgraph import HeadGraphConfig, SiteConfig, convert

V, B, T = 97, 2, 7
OUTPUTS, WIDE, DENSE = HeadGraphConfig(), HeadGraphConfig(None, SiteConfig.ring(2)), HeadGraphConfig(None, SiteConfig())
BOTH = HeadGraphConfig(SiteConfig(), SiteConfig.ring(2))

SHAPE = {"vocab_size": V, "hidden_size": 30, "num_hidden_layers": 2, "intermediate_size": 22}
SHAPE |= {"num_attention_heads": 5, "max_position_embeddings": 64}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT = {"vocab_size": V, "n_embd": 30, "n_layer": 2, "n_head": 5, "bos_token_id": 1, "eos_token_id": 2}
HALVES = {"encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 5, "decoder_attention_heads": 3}
HALVES |= {"encoder_ffn_dim": 22, "decoder_ffn_dim": 22, "d_model": 30, "vocab_size": V, **IDS}


def llama() -> nn.Module:
    shape = {**SHAPE, "num_attention_heads": 6}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**shape, num_key_value_heads=3, head_dim=4, **IDS))


def qwen3() -> nn.Module:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**SHAPE, num_key_value_heads=1, head_dim=6, **IDS))


def mistral() -> nn.Module:
    shape = {**SHAPE, "num_attention_heads": 3}
    return hf.MistralForCausalLM(hf.MistralConfig(**shape, num_key_value_heads=1, head_dim=4, sliding_window=4, **IDS))


def gpt2() -> nn.Module:
    return hf.GPT2LMHeadModel(hf.GPT2Config(**GPT, n_positions=64))


def gpt_neox() -> nn.Module:
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**{**SHAPE, "hidden_size": 20}, **IDS))


def bert() -> nn.Module:
    return hf.BertForMaskedLM(hf.BertConfig(**SHAPE))


def roberta() -> nn.Module:
    return hf.RobertaForMaskedLM(hf.RobertaConfig(**SHAPE, **IDS))


def vit() -> nn.Module:
    shape = {name: SHAPE[name] for name in ("hidden_size", "num_hidden_layers", "intermediate_size")}
    config = hf.ViTConfig(**shape, num_attention_heads=5, image_size=12, patch_size=4, num_labels=7)
    return hf.ViTForImageClassification(config)


def t5() -> nn.Module:
    config = hf.T5Config(
        vocab_size=V, d_model=30, d_kv=7, d_ff=22, num_layers=2, num_heads=3, decoder_start_token_id=0, **IDS
    )
    return hf.T5ForConditionalGeneration(config)


def whisper() -> nn.Module:
    sizes = {"num_mel_bins": 7, "max_source_positions": 11, "max_target_positions": 32}
    tokens = {"decoder_start_token_id": 1, "suppress_tokens": [], "begin_suppress_tokens": []}
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**HALVES, **sizes, **tokens))


def bart() -> nn.Module:
    tokens = {"decoder_start_token_id": 2, "forced_eos_token_id": None}
    return hf.BartForConditionalGeneration(hf.BartConfig(**HALVES, **tokens, max_position_embeddings=64))


# Attention that calls no function of the interface: output graphs alone.
def bloom() -> nn.Module:
    return hf.BloomForCausalLM(hf.BloomConfig(vocab_size=V, hidden_size=30, n_layer=2, n_head=5, **IDS))


def deberta() -> nn.Module:
    return hf.DebertaV2ForMaskedLM(hf.DebertaV2Config(**SHAPE, pad_token_id=0))


def falcon() -> nn.Module:
    config = hf.FalconConfig(vocab_size=V, hidden_size=30, num_hidden_layers=2, num_attention_heads=5, **IDS)
    return hf.FalconForCausalLM(config)


CAUSAL = {model.__name__: model for model in (llama, qwen3, mistral, gpt2, gpt_neox)}
ENCODERS = {model.__name__: model for model in (bert, roberta, vit)}
SEQUENCE_TO_SEQUENCE = {model.__name__: model for model in (t5, whisper, bart)}
INTERFACE = CAUSAL | ENCODERS | SEQUENCE_TO_SEQUENCE
OUTPUTS_ONLY = {model.__name__: model for model in (bloom, deberta, falcon)}


def build(name: str, implementation: str = "sdpa") -> nn.Module:
    """A model in eval mode; weights large enough that attention is not uniform and logits differ."""
    model = (INTERFACE | OUTPUTS_ONLY)[name]().eval()
    if name in INTERFACE:
        model.set_attn_implementation(implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2 and name != "t5":
                nn.init.normal_(parameter, std=0.15)
    return model


def inputs_of(model: nn.Module, batch: int = B) -> dict[str, Any]:
    """Random inputs of one forward pass."""
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(batch, 3, 12, 12)}
    inputs = {"input_ids": tokens(batch)}
    if model.main_input_name == "input_features":
        inputs = {"input_features": torch.randn(batch, 7, 22)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens(batch)
    return inputs


def tokens(batch: int = B) -> Tensor:
    """Token ids, none of them special."""
    return torch.randint(3, V, (batch, T))


def far(name: str, config: HeadGraphConfig = BOTH, implementation: str = "sdpa") -> nn.Module:
    """A converted model whose edges are far from their start."""
    model = build(name, implementation)
    convert(model, config)
    return moved(model)
