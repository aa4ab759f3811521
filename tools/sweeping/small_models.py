"""Small random models of the classes of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

KINDS = {
    "causal": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",),
    "masked": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES",),
    "encoder-decoder": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES"),
}
# By what a configuration may call them. Windows and choices of keys are shorter than the sequences.
SIZES = {
    97: "vocab_size text_vocab_size char_vocab_size audio_vocab_size codebook_vocab_size",
    32: "hidden_size d_model n_embd dim embed_dim embedding_size word_embed_proj_dim emb_dim model_dim "
    "encoder_hidden_size decoder_hidden_size encoder_dim decoder_dim attention_hidden_size dim_model projection_dim "
    "cross_hidden_size",
    48: "speech_encoder_intermediate_size t2u_encoder_ffn_dim t2u_decoder_ffn_dim "
    "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff n_inner dff hidden_dim ffn_hidden_size "
    "ffn_intermediate_size dim_ff inner_dim d_inner dense_intermediate_size",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers "
    "num_encoder_layers encoder_num_layers decoder_num_layers num_key_value_heads n_head_kv num_kv_heads "
    "num_experts_per_tok moe_k num_experts_per_token moe_topk experts_per_token moe_top_k encoder_num_hidden_layers "
    "decoder_num_hidden_layers num_hidden_groups index_n_heads encoder_num_key_value_heads speech_encoder_layers "
    "t2u_encoder_layers t2u_decoder_layers",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads heads "
    "encoder_num_attention_heads decoder_num_attention_heads num_experts num_local_experts n_routed_experts "
    "moe_num_experts sliding_window attention_window index_topk local_attention window_size attention_chunk_size "
    "decoder_num_key_value_heads num_codebooks patch_size rotary_dim mamba_n_heads speech_encoder_attention_heads "
    "t2u_encoder_attention_heads t2u_decoder_attention_heads cross_num_attention_heads cross_num_key_value_heads",
    8: "head_dim d_kv attention_head_size qk_nope_head_dim qk_rope_head_dim v_head_dim kv_channels swa_head_dim "
    "global_head_dim cross_head_dim linear_key_head_dim linear_value_head_dim image_size num_mel_bins",
    16: "mamba_d_head moe_intermediate_size q_lora_rank kv_lora_rank index_head_dim "
    "shared_expert_intermediate_size moe_shared_expert_intermediate_size expert_intermediate_size "
    "hidden_size_per_layer_input shared_intermediate_size",
    64: "max_position_embeddings n_positions n_ctx max_source_positions max_target_positions max_seq_len",
    1: "n_group topk_group n_shared_experts num_shared_experts first_k_dense_replace num_hash_layers",
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}
# Where a configuration leaves them to others, or to nobody.
FILLED = {"head_dim": 8, "num_key_value_heads": 4, "vocab_size": 97, "num_experts_per_tok": 2, "n_routed_experts": 4}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
TOKENS |= {"audio_bos_token_id": 4, "audio_pad_token_id": 3}
# Of any encoder and any decoder.
COMPOSED = {
    "EncoderDecoderModel": ("BertConfig", "BertConfig"),
    "SpeechEncoderDecoderModel": ("Wav2Vec2Config", "BertConfig"),
}


def classes() -> list[tuple[str, str, str]]:
    """Returns (kind, model type, class name) of every class to sweep, each once."""
    from transformers.models.auto import modeling_auto

    by_name: dict[str, tuple[str, str, str]] = {}
    for kind, mappings in KINDS.items():
        for mapping in mappings:
            for model_type, names in getattr(modeling_auto, mapping).items():
                for name in (names,) if isinstance(names, str) else names:
                    by_name.setdefault(name, (kind, model_type, name))
    return list(by_name.values())


def build(name: str, layers: int = 2) -> nn.Module:
    """A small model of a class, in eval mode, with weights under which attention is not uniform."""
    import transformers

    kind = getattr(transformers, name)
    torch.manual_seed(0)
    if name in COMPOSED:
        parts = [small_config(getattr(transformers, part), layers) for part in COMPOSED[name]]
        config = kind.config_class.from_encoder_decoder_configs(*parts, **TOKENS)
    else:
        config = small_config(kind.config_class, layers)
    model = kind(config).eval()
    numbers = sum(parameter.numel() for parameter in model.parameters())
    if numbers > 100_000_000:
        raise ValueError(f"{numbers:,} parameters at these sizes")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2 and parameter.is_floating_point() and parameter.std() > 0:
                parameter.normal_(std=0.15)
    return model


def small_config(kind: type, layers: int = 2) -> Any:
    """A configuration of a class with small sizes where it has such names, inside too."""
    settings = _small(kind, layers)
    try:
        return kind(**settings)
    except Exception:
        # Some lists have to be as long as there are layers.
        lists = {name: value[:layers] for name, value in kind().to_dict().items() if isinstance(value, list)}
        return kind(**settings, **{name: value for name, value in lists.items() if name not in settings})


def _small(kind: type, layers: int) -> dict[str, Any]:
    default = kind()
    values, mapped = default.to_dict(), getattr(default, "attribute_map", {})
    settings: dict[str, Any] = {}
    for name in {*values, *mapped}:
        known = values.get(mapped.get(name, name))
        if known is None and name in FILLED and name in values:
            settings[name] = FILLED[name]
        if not isinstance(known, int) or isinstance(known, bool):
            continue
        if name in TOKENS:
            settings[name] = TOKENS[name]
        elif name in SMALL:
            settings[name] = min(known, SMALL[name])
    settings = {name: value for name, value in settings.items() if mapped.get(name) not in settings}
    settings |= {name: layers for name in ("num_hidden_layers", "n_layer", "num_layers") if name in settings}
    # Latent attention has keys of its own for every head.
    if "kv_lora_rank" in settings and "num_key_value_heads" in settings:
        settings["num_key_value_heads"] = 4
    for name, inner in (getattr(kind, "sub_configs", None) or {}).items():
        if isinstance(values.get(name), dict):
            inner = _class_of(inner, values[name])
            if hasattr(inner, "to_dict"):
                model_type = getattr(inner, "model_type", "")
                settings[name] = _small(inner, layers) | ({"model_type": model_type} if model_type else {})
    return settings


def _class_of(kind: type, values: dict[str, Any]) -> type:
    """The class of a configuration inside another; where any may stand there, that of the one that does."""
    from transformers import CONFIG_MAPPING

    model_type = values.get("model_type", "")
    return CONFIG_MAPPING[model_type] if not getattr(kind, "model_type", "") and model_type in CONFIG_MAPPING else kind
