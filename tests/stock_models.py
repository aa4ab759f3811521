"""Stock models in float64 for the analysis of pretrained models, and by hand what their attention reads and writes."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers as hf
from helpers import language_model, translator
from torch import Tensor, nn
from transformers_models import IDS, INTERFACE, SHAPE, inputs_of

GROUPED = {**SHAPE, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4}


def gemma2() -> nn.Module:
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**GROUPED, attn_logit_softcapping=None, **IDS))


def gemma3() -> nn.Module:
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**GROUPED, **IDS))


def phi() -> nn.Module:
    return hf.PhiForCausalLM(hf.PhiConfig(**{**SHAPE, "hidden_size": 20}, **IDS))


def olmo2() -> nn.Module:
    return hf.Olmo2ForCausalLM(hf.Olmo2Config(**SHAPE, num_key_value_heads=1, **IDS))


def dinov2() -> nn.Module:
    sizes = {"hidden_size": 30, "num_hidden_layers": 2, "num_attention_heads": 5, "mlp_ratio": 2}
    config = hf.Dinov2Config(**sizes, image_size=12, patch_size=4, num_labels=7, layerscale_value=0.5)
    return hf.Dinov2ForImageClassification(config)


FURTHER = (gemma2, gemma3, phi, olmo2, dinov2)
STOCK: dict[str, Callable[[], nn.Module]] = {**INTERFACE, **{model.__name__: model for model in FURTHER}}
OWN = {
    "own": lambda: language_model("outputs", num_kv_heads=1),
    "own post-norm": lambda: language_model(norm_first=False),
    "own translator": lambda: translator(),
}
NAMES = [*STOCK, *OWN]


def stock(name: str) -> nn.Module:
    """A model in float64, whose norms stay in it, with weights and gains far from their start."""
    torch.manual_seed(sum(map(ord, name)))
    if name in OWN:
        return OWN[name]().eval()
    model = STOCK[name]().eval().double()
    # Eager attention has its softmax in float32; Gemma 2 without its cap of scores is allowed sdpa by its name alone.
    model.config._attn_implementation = "sdpa"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.3 if name != "t5" else 0.2)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") or type(module).__name__ == "T5LayerNorm":
            # Theirs computes in float32.
            module.forward = types.MethodType(rms, module)
    return model


def rms(norm: nn.Module, x: Tensor) -> Tensor:
    """What an RMSNorm of transformers computes, in the precision of x."""
    return gain(norm) * x * (x.square().mean(dim=-1, keepdim=True) + epsilon(norm)).rsqrt()


def gain(norm: nn.Module) -> Tensor:
    if hasattr(norm, "lambda1"):
        return norm.lambda1
    return norm.weight + 1 if type(norm).__name__.startswith("Gemma") else norm.weight


def epsilon(norm: nn.Module) -> float:
    return next(getattr(norm, name) for name in ("variance_epsilon", "eps") if hasattr(norm, name))


def linear_part(norm: nn.Module, x: Tensor, part: Tensor) -> Tensor:
    """What a norm makes of a part of x while its scale is that of x, by its formula."""
    if isinstance(norm, nn.LayerNorm):
        scale = (x.var(dim=-1, keepdim=True, correction=0) + norm.eps).rsqrt()
        return gain(norm) * (part - part.mean(dim=-1, keepdim=True)) * scale
    if hasattr(norm, "lambda1"):
        return gain(norm) * part
    return gain(norm) * part * (x.square().mean(dim=-1, keepdim=True) + epsilon(norm)).rsqrt()


class ByHand(NamedTuple):
    """One attention block: the norms and maps, `(module, rows by head)` for queries, keys and values."""

    stream: str
    norm: nn.Module | None
    queries: tuple[nn.Module, Tensor]
    keys: tuple[nn.Module, Tensor]
    values: tuple[nn.Module, Tensor]
    output: nn.Module
    post_norm: nn.Module | None = None
    # Norms on the stream behind this block, before the next one.
    stream_norms: tuple[nn.Module, ...] = ()
    # Of cross attention: what the encoder's output went through; `False` for self attention.
    source_norm: Any = False


def separate(maps: list[nn.Module], size: int) -> list[tuple[nn.Module, Tensor]]:
    return [(m, torch.arange(m.weight.shape[0]).view(-1, size)) for m in maps]


def fused(module: nn.Module, heads: int, size: int, by_head: bool) -> list[tuple[nn.Module, Tensor]]:
    rows = torch.arange(3 * heads * size)
    rows = rows.view(heads, 3, size).transpose(0, 1) if by_head else rows.view(3, heads, size)
    return [(module, part) for part in rows]


def by_hand(name: str, model: nn.Module) -> list[ByHand]:
    """The attention blocks of a model, in order."""
    if name in ("llama", "qwen3", "mistral", "gemma2", "gemma3", "olmo2", "phi"):
        return [_of_decoder(name, layer) for layer in model.model.layers]
    if name == "gpt2":
        return [
            ByHand("", b.ln_1, *fused(b.attn.c_attn, 5, 6, False), b.attn.c_proj) for b in model.transformer.h
        ]
    if name == "gpt_neox":
        return [
            ByHand("", b.input_layernorm, *fused(b.attention.query_key_value, 5, 4, True), b.attention.dense)
            for b in model.gpt_neox.layers
        ]
    if name in ("bert", "roberta"):
        return [
            ByHand("", None, *separate([b.attention.self.query, b.attention.self.key, b.attention.self.value], 6),
                   b.attention.output.dense, None, (b.attention.output.LayerNorm, b.output.LayerNorm))
            for b in getattr(model, name).encoder.layer
        ]  # fmt: skip
    if name == "vit":
        return [
            ByHand("", b.layernorm_before, *separate([b.attention.q_proj, b.attention.k_proj, b.attention.v_proj], 6),
                   b.attention.o_proj)
            for b in model.vit.layers
        ]  # fmt: skip
    if name == "dinov2":
        return [
            ByHand("", b.norm1, *separate([b.attention.q_proj, b.attention.k_proj, b.attention.v_proj], 6),
                   b.attention.o_proj, b.layer_scale1)
            for b in model.dinov2.encoder.layer
        ]  # fmt: skip
    if name == "t5":
        return _of_t5(model)
    if name in ("bart", "whisper"):
        return _of_bart(name, model)
    return _own(name, model)


def _of_decoder(name: str, layer: nn.Module) -> ByHand:
    a = layer.self_attn
    size = {"qwen3": 6, "olmo2": 6}.get(name, 4)
    maps = separate([a.q_proj, a.k_proj, a.v_proj], size)
    if name == "olmo2":
        return ByHand("", None, *maps, a.o_proj, layer.post_attention_layernorm)
    post = layer.post_attention_layernorm if name in ("gemma2", "gemma3") else None
    return ByHand("", layer.input_layernorm, *maps, a.dense if name == "phi" else a.o_proj, post)


def _of_t5(model: nn.Module) -> list[ByHand]:
    blocks = []
    for stream, stack in (("encoder", model.encoder), ("decoder", model.decoder)):
        for block in stack.block:
            for number, sublayer in enumerate(list(block.layer)[:-1]):
                a = sublayer.SelfAttention if number == 0 else sublayer.EncDecAttention
                source = False if number == 0 else model.encoder.final_layer_norm
                maps = separate([a.q, a.k, a.v], 7)
                blocks.append(ByHand(stream, sublayer.layer_norm, *maps, a.o, source_norm=source))
    return blocks


def _of_bart(name: str, model: nn.Module) -> list[ByHand]:
    blocks, pre = [], name == "whisper"
    for stream, stack, size in (("encoder", model.model.encoder, 6), ("decoder", model.model.decoder, 10)):
        for layer in stack.layers:
            parts = [(layer.self_attn, layer.self_attn_layer_norm, False)]
            if stream == "decoder":
                source = model.model.encoder.layer_norm if pre else None
                parts.append((layer.encoder_attn, layer.encoder_attn_layer_norm, source))
            for number, (a, norm, source) in enumerate(parts):
                maps = separate([a.q_proj, a.k_proj, a.v_proj], size)
                last = (layer.final_layer_norm,) if number == len(parts) - 1 else ()
                norms = () if pre else (norm, *last)
                blocks.append(ByHand(stream, norm if pre else None, *maps, a.out_proj, None, norms, source))
    return blocks


def _own(name: str, model: nn.Module) -> list[ByHand]:
    blocks, pre = [], name != "own post-norm"
    stacks = {"encoder": model.encoder, "decoder": model.decoder} if name == "own translator" else {"": model.decoder}
    for stream, stack in stacks.items():
        for layer in stack.layers:
            parts = [(layer.attention, False)]
            if stream == "decoder":
                parts.append((layer.cross_attention, model.encoder.norm))
            for residual, source in parts:
                a = residual.object
                maps = separate([a.query, a.key, a.value], 6)
                norms = () if pre else (residual.norm, layer.feed_forward.norm)
                blocks.append(ByHand(stream, residual.norm if pre else None, *maps, a.output, None, norms, source))
    return blocks


def stock_inputs(name: str, model: nn.Module) -> Any:
    """Inputs of one batch of two examples: for transformers by name, for our own models by place."""
    if name in STOCK:
        inputs = inputs_of(model)
        return {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    tokens = torch.randint(3, 13, (2, 7))
    return (torch.randint(3, 13, (2, 5)), tokens) if name == "own translator" else tokens
