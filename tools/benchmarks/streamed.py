"""A folder of random weights in the shape of a large Llama, written layer by layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gohgraph.common.checks import check_int

# Random numbers of one matrix are drawn so many at a time.
BLOCK = 1 << 24


class Shape(NamedTuple):
    """Of a Llama."""

    layers: int
    heads: int
    kv_heads: int
    d_model: int
    d_ff: int
    vocabulary: int

    @classmethod
    def of(cls, text: str) -> Shape:
        """Reads 32/32/8/4096/14336/128256.

        Example:
            >>> Shape.of("2/4/2/16/24/11").kv_heads
            2
        """
        numbers = [int(part) if part.isdecimal() else 0 for part in text.split("/")]
        if len(numbers) != len(cls._fields):
            form = "/".join(cls._fields)
            raise ValueError(f"Expected {form} (got {text!r}). Do pass e.g. 32/32/8/4096/14336/128256.")
        for name, number in zip(cls._fields, numbers, strict=True):
            check_int(name, number, low=1)
        return cls(*numbers)


def write_folder(folder: Path, shape: Shape) -> int:
    """Writes a bfloat16 model and returns its bytes: every matrix has random numbers of its own, a file each layer."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    layers, heads, kv_heads, d_model, d_ff, vocabulary = shape
    sizes: dict[str, Any] = {"num_hidden_layers": layers, "hidden_size": d_model, "intermediate_size": d_ff}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary}
    config = LlamaConfig(**sizes, tie_word_embeddings=False, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    generator, total = torch.Generator().manual_seed(0), 0
    files: dict[str, str] = {}
    key_size = kv_heads * (d_model // heads)
    matrices = {
        "self_attn.q_proj": (d_model, d_model), "self_attn.k_proj": (key_size, d_model),
        "self_attn.v_proj": (key_size, d_model), "self_attn.o_proj": (d_model, d_model),
        "mlp.gate_proj": (d_ff, d_model), "mlp.up_proj": (d_ff, d_model), "mlp.down_proj": (d_model, d_ff),
    }  # fmt: skip
    ones = torch.ones(d_model, dtype=torch.bfloat16)
    for layer in range(-1, layers):
        if layer < 0:
            tables = ("model.embed_tokens.weight", "lm_head.weight")
            tensors = {name: _random((vocabulary, d_model), generator) for name in tables} | {"model.norm.weight": ones}
        else:
            prefix = f"model.layers.{layer}."
            tensors = {f"{prefix}{name}.weight": _random(size, generator) for name, size in matrices.items()}
            norms = ("input_layernorm", "post_attention_layernorm")
            tensors |= {f"{prefix}{norm}.weight": ones.clone() for norm in norms}
        file = f"model-{layer + 1:05d}.safetensors"
        save_file(tensors, folder / file)
        files |= dict.fromkeys(tensors, file)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _random(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Random numbers of standard deviation 1/sqrt(columns)."""
    weight = torch.empty(size, dtype=torch.bfloat16)
    for part in weight.split(max(1, BLOCK // size[1])):
        part.copy_(torch.empty(part.shape).normal_(std=size[1] ** -0.5, generator=generator))
    return weight
