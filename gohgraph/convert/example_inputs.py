"""Inputs of one short forward pass of a Hugging Face model, to see what its attention does."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

TOKENS = 3


def example_inputs(model: nn.Module) -> dict[str, Any]:
    """Makes up the inputs of a forward pass: token ids, an image, or audio features.

    Args:
        model: of transformers.

    Raises:
        ValueError: a model that reads something else.
    """
    config, name, device = model.config, model.main_input_name, _device(model)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    if name == "input_ids":
        inputs = {"input_ids": _ids(device)}
    elif name == "pixel_values":
        shape = (1, getattr(config, "num_channels", 3), *_pair(config.image_size))
        inputs = {"pixel_values": torch.zeros(shape, device=device, dtype=dtype)}
    elif name == "input_features" and hasattr(config, "max_source_positions"):
        shape = (1, config.num_mel_bins, 2 * config.max_source_positions)
        inputs = {"input_features": torch.zeros(shape, device=device, dtype=dtype)}
    elif name == "input_values":
        inputs = {"input_values": torch.zeros(1, 16000, device=device, dtype=dtype)}
    else:
        raise ValueError(
            f"Expected a model of tokens, images or audio (got one of {name!r}). Do pass the inputs of one forward "
            "pass as example={...}."
        )
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = _ids(device)
    return inputs


def _ids(device: torch.device) -> torch.Tensor:
    return torch.ones(1, TOKENS, dtype=torch.long, device=device)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
