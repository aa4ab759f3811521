"""Inputs of one short forward pass of a Hugging Face model, to see what its attention does."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch

from gohgraph.convert.trial_runs import device_of, dtype_for

# Tokens beyond the longest window or choice of keys that a configuration names, so that sparse and sliding attention
# leave some out; and the most, so that a pass stays cheap: a model whose windows are longer is seen without them.
BEYOND, MOST = 5, 160
WINDOWS = ("sliding_window", "window", "topk", "top_k", "chunk_size", "block_size", "stride", "compress")


def example_inputs(model: Any) -> dict[str, Any]:
    """Makes up the inputs of a forward pass: token ids, an image, or audio features.

    Token ids differ and are none of the special ones.

    Args:
        model: of transformers.

    Raises:
        ValueError: a model that reads something else.
    """
    config, name, device = model.config, model.main_input_name, device_of(model)
    dtype = next((dtype_for(p) for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    inputs: dict[str, Any]
    shape: tuple[int, ...]
    if name == "input_ids":
        inputs = {"input_ids": _ids(config, device)}
    elif name == "pixel_values":
        shape = (1, getattr(config, "num_channels", 3), *_pair(config.image_size))
        inputs = {"pixel_values": _noise(shape, device, dtype)}
    elif name == "input_features" and hasattr(config, "max_source_positions") and hasattr(config, "num_mel_bins"):
        shape = (1, config.num_mel_bins, 2 * config.max_source_positions)
        inputs = {"input_features": _noise(shape, device, dtype)}
    elif name == "input_features" and hasattr(config, "input_feat_per_channel"):
        shape = (1, 8 * BEYOND, config.input_feat_per_channel * config.input_channels)
        inputs = {"input_features": _noise(shape, device, dtype)}
    elif name == "input_values":
        inputs = {"input_values": _noise((1, 16000), device, dtype)}
    else:
        raise ValueError(
            f"Expected a model of tokens, images or audio (got one of {name!r}). Do pass the inputs of one forward "
            "pass as example={...}."
        )
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = _ids(config, device)
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    return inputs


def _ids(config: Any, device: torch.device) -> torch.Tensor:
    """Token ids `[1, T]` that no special token is among, as far as the vocabulary reaches."""
    numbers = dict(_numbers(config))
    special = {value for name, value in numbers.items() if name.endswith(("token_id", "token_index"))}
    size = min([value for name, value in numbers.items() if name.endswith("vocab_size") and value > 1] or [2])
    known = [token for token in range(min(size, 4 * MOST)) if token not in special] or [0]
    # A walk that meets every token once, then again: equal tokens would make equal scores.
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(known), generator=generator, device="cpu").tolist()
    ids = [known[order[place % len(known)]] for place in range(_length(numbers))]
    return torch.tensor([ids], device=device)


def _length(numbers: dict[str, int]) -> int:
    """T: beyond the windows, as far as the positions reach."""
    windows = [v for name, v in numbers.items() if any(word in name for word in WINDOWS) and 1 < v <= MOST - BEYOND]
    length = max(windows, default=2 * BEYOND) + BEYOND
    positions = [v for name, v in numbers.items() if name in ("max_position_embeddings", "n_positions") and v > 1]
    # Some models count positions from behind the padding token.
    return max(1, min([length, MOST, *(limit - 2 for limit in positions if limit > 2)]))


def _numbers(config: Any) -> Iterator[tuple[str, int]]:
    """The whole numbers of a configuration and of those inside it, by name."""
    values = config.to_dict() if hasattr(config, "to_dict") else config
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            yield str(name), value


def _noise(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu").to(device, dtype)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
