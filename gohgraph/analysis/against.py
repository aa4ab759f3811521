"""What patching puts in the place of a head's output: another run's, a mean over the batch, or zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gohgraph.analysis.architectures.wiring import Wiring
from gohgraph.analysis.learned_edges import LearnedGraph, in_its_place
from gohgraph.analysis.traces import Trace, check_trace, trace
from gohgraph.common.checks import check_choice

# Another batch, or one of these words.
Against = Any
WORDS = ("mean", "zero")
# What masks of a stream's tokens are called.
MASKS = {
    "": ("attention_mask", "keep_mask"),
    "encoder": ("attention_mask", "source_keep_mask"),
    "decoder": ("decoder_attention_mask", "target_keep_mask"),
}


def other_trace(
    model: nn.Module, wiring: Wiring, inputs: Any, against: Against, clean: Trace, graphs: Sequence[LearnedGraph] = ()
) -> Trace:
    """Returns what takes the place of a clean run's parts; of words, with the clean run's norms."""
    if isinstance(against, str):
        check_choice("against", against, WORDS)
        count = len(next(iter(clean.heads.values())))
        if against == "mean" and count < 2:
            raise ValueError(
                f"Expected several examples for against='mean' (got {count}, which is its own mean). Do pass more of "
                "them, or choose 'zero'."
            )
        masks = token_masks(inputs, wiring, clean)
        stream_of = {unit.name: unit.reads.stream for unit in wiring.units}
        take = _mean if against == "mean" else lambda values, mask: torch.zeros_like(values)
        heads = {name: take(values, masks[stream_of[name]]) for name, values in clean.heads.items()}
        wrote = {name: take(values, masks[stream_of[name]]) for name, values in clean.wrote.items()}
        starts = {(s.name, -1): take(clean.read[s.name, -1], masks[s.name]) for s in wiring.streams}
        sent = {one.name: in_its_place(against, clean.sent[one.name], masks[one.stream]) for one in graphs}
        return replace(clean, heads=heads, wrote=wrote, read=clean.read | starts, sent=sent)
    other, _ = trace(model, wiring, against, graphs=graphs, has_output=False)
    check_trace(other, model, wiring)
    masks, others = token_masks(inputs, wiring, clean), token_masks(against, wiring, other)
    for name, mask in masks.items():
        if mask.shape != others[name].shape or not torch.equal(mask, others[name]):
            raise ValueError(
                f"Expected another input with the same tokens and padding (got {list(others[name].shape)} for "
                f"{list(mask.shape)}, {int(others[name].sum())} real tokens for {int(mask.sum())}). Do align the pairs."
            )
    return other


def token_masks(inputs: Any, wiring: Wiring, seen: Trace) -> dict[str, Tensor]:
    """Returns which tokens of every stream are real, bool `[B, T]`: all, where the inputs have no such mask."""
    masks = {}
    for stream in wiring.streams:
        x = seen.read[stream.name, -1]
        masks[stream.name] = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        for name in MASKS[stream.name] if isinstance(inputs, Mapping) else ():
            mask = inputs.get(name)
            if isinstance(mask, Tensor) and mask.shape == x.shape[:2]:
                masks[stream.name] = mask.to(x.device).bool()
    return masks


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over examples at every place, of real tokens, for all of them: `[B, T, F]`."""
    weight = mask.unsqueeze(-1).to(values.dtype)  # [B, T, 1]
    total = torch.where(mask.unsqueeze(-1), values, 0.0).sum(dim=0, keepdim=True)
    return (total / weight.sum(dim=0, keepdim=True).clamp(min=1)).expand_as(values)
