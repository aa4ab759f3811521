"""Known kinds of heads as features of a network's nodes: by what they attend to."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gohgraph.analysis.architectures import Wiring, wiring_of
from gohgraph.analysis.patterns import attention_patterns
from gohgraph.analysis.prompts import repeated_tokens

if TYPE_CHECKING:
    from gohgraph.analysis.network import HeadNetwork


def label_heads(model: nn.Module, network: HeadNetwork, tokens: Any = None) -> HeadNetwork:
    """Returns a network whose heads are labelled by what they attend to, each a mean weight over tokens in [0, 1].

    `previous_token`: the token before; `first_token`: the first one (a sink); `duplicate_token`: earlier places of the
    same token; `induction`: the places after these. Of cross attention all places of the source count, and there is no
    previous token. The model's own attention is asked, see `attention_patterns`.

    Source: Olsson et al. 2022, arXiv 2209.11895 (induction and previous-token heads); Wang et al. 2022, arXiv
    2211.00593 (duplicate-token heads).

    Args:
        model: any of `wiring_of`, also with head graphs at outputs, scores, queries, keys and values.
        network: of this model, e.g. by `attribution_graph`; left as it is.
        tokens: `[B, T]`, with repetitions; a pair of them for source and target; or a mapping of the model's keyword
            arguments. `None` for four times 24 random tokens twice; models of images or sounds need a batch of theirs.

    Returns:
        A copy with these node features, NaN for nodes that are no heads and for scores that ask which tokens are the
        same where there are none (patches, audio).

    Raises:
        ValueError: none given for a model that reads no tokens; a network of another model; messages between weights,
            or a router, which leave no pattern to be asked for.

    Example:
        >>> import gohgraph as goh
        >>> model = goh.LanguageModel(goh.TransformerConfig(9, d_model=8, num_heads=2, num_layers=2, d_ff=8))
        >>> network = label_heads(model, goh.composition_graph(model))
        >>> bool((network.previous_token >= 0).all()), network.induction.shape
        (True, torch.Size([4]))
    """
    from gohgraph.analysis.network import HEAD_SCORES

    wiring = wiring_of(model)
    inputs, read = _inputs(model, wiring, tokens)
    labelled = copy.copy(network)
    scores = {name: torch.full((network.num_nodes,), torch.nan, dtype=torch.double) for name in HEAD_SCORES}
    for unit, pattern in attention_patterns(model, wiring, inputs):
        places = zip(network.block, network.kind, strict=True)
        heads = [node for node, place in enumerate(places) if place == (unit.title, "head")]
        if len(heads) != unit.queries.heads:
            raise ValueError(
                f"Expected a network of this model, with {unit.queries.heads} heads in {unit.title} (got "
                f"{len(heads)}). Do make it by attribution_graph or composition_graph."
            )
        asking, asked = (read.get(reading.stream) for reading in (unit.reads, unit.source))
        weights = pattern.cpu().double()
        for name, wanted in _wanted(pattern, asking, asked, is_cross=unit.reads.stream != unit.source.stream).items():
            scores[name][heads] = _mean_weight(weights, wanted.cpu())
    for name, values in scores.items():
        labelled[name] = values
    return labelled


def _inputs(model: nn.Module, wiring: Wiring, tokens: Any) -> tuple[Any, dict[str, Tensor]]:
    """What the model is run with, and the tokens that each stream reads, by its name."""
    device, name = next(model.parameters()).device, _main_input(model)
    streams = [stream.name for stream in wiring.streams]
    if tokens is None:
        if name != "input_ids":
            raise ValueError(
                f"Expected inputs for {type(model).__name__}, which reads {name} (got none). Do pass a batch of them."
            )
        tokens = repeated_tokens(_vocabulary(model), length=24, examples=4).inputs
        tokens = tokens if len(streams) == 1 else (tokens, tokens)
    inputs: Any
    if isinstance(tokens, Mapping):
        inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in tokens.items()}
        given = [inputs.get("input_ids"), inputs.get("decoder_input_ids")][: len(streams)]
    else:
        given = [values.to(device) for values in (tokens if isinstance(tokens, tuple) else (tokens,))]
        if len(given) != len(streams):
            raise ValueError(
                f"Expected tokens for {' and '.join(streams) or 'one stack'} (got {len(given)}). Do pass a pair for an "
                "encoder and a decoder, else one tensor."
            )
        is_stock = hasattr(model, "main_input_name")
        inputs = dict(zip((name, "decoder_input_ids"), given, strict=False)) if is_stock else tuple(given)
    read = zip(streams, given, strict=True)
    return inputs, {stream: ids for stream, ids in read if ids is not None and not ids.is_floating_point()}


def _main_input(model: Any) -> str:
    is_of_images = getattr(model.config, "patch_size", None) is not None
    return getattr(model, "main_input_name", "images" if is_of_images else "input_ids")


def _wanted(pattern: Tensor, asking: Tensor | None, asked: Tensor | None, *, is_cross: bool) -> dict[str, Tensor]:
    """Which places of a pattern `[B, H, T, S]` count for every score that can be told, bool `[B, T, S]`."""
    batch, _, rows, columns = pattern.shape
    here = torch.arange(rows, device=pattern.device)[:, None]  # [T, 1]
    there = torch.arange(columns, device=pattern.device)  # [S]
    known = torch.ones(rows, columns, dtype=torch.bool, device=pattern.device) if is_cross else there < here  # [T, S]
    wanted = {"first_token": (known & (there == 0)).expand(batch, -1, -1)}
    if not is_cross:
        wanted["previous_token"] = (there == here - 1).expand(batch, -1, -1)
    # A class token in front of patches is none of the tokens that were given.
    if asking is not None and asked is not None and (asking.shape[1], asked.shape[1]) == (rows, columns):
        same = (asking[:, :, None] == asked[:, None, :]) & known  # [B, T, S]
        after = torch.zeros_like(same)
        after[:, :, 1:] = same[:, :, :-1]
        wanted |= {"induction": after, "duplicate_token": same}
    return wanted


def _mean_weight(pattern: Tensor, places: Tensor) -> Tensor:
    """The weight of heads `[B, H, T, S]` at places `[B, T, S]`, mean over the tokens that have any: `[H]`."""
    weight = (pattern * places.unsqueeze(1)).sum(dim=-1)  # [B, H, T]
    has = places.any(dim=-1)  # [B, T]
    return (weight * has.unsqueeze(1)).sum(dim=(0, 2)) / has.sum().clamp(min=1)


def _vocabulary(model: Any) -> int:
    config = getattr(model.config, "get_text_config", lambda: model.config)()
    return getattr(config, "transformer", config).vocab_size
