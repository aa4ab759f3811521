"""Known kinds of heads as features of a network's nodes: by what they attend to."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gohgraph.analysis.architectures import wiring_of
from gohgraph.analysis.patterns import attention_patterns
from gohgraph.analysis.prompts import repeated_tokens

if TYPE_CHECKING:
    from gohgraph.analysis.network import HeadNetwork


def label_heads(model: nn.Module, network: HeadNetwork, tokens: Tensor | None = None) -> HeadNetwork:
    """Returns a network whose heads are labelled by what they attend to, each a mean weight over tokens in [0, 1].

    `previous_token`: the token before; `first_token`: the first one (a sink); `duplicate_token`: earlier places of the
    same token; `induction`: the places after these. The model's own attention is asked, see `attention_patterns`.

    Source: Olsson et al. 2022, arXiv 2209.11895 (induction and previous-token heads); Wang et al. 2022, arXiv
    2211.00593 (duplicate-token heads).

    Args:
        model: with one stack of layers that reads tokens.
        network: of this model, e.g. by `attribution_graph`; left as it is.
        tokens: `[B, T]`, with repetitions; `None` for four times 24 random tokens twice.

    Returns:
        A copy with these node features, NaN for nodes that are no heads.

    Raises:
        ValueError: a model of two stacks, or of images.

    Example:
        >>> import gohgraph as goh
        >>> model = goh.LanguageModel(goh.TransformerConfig(9, d_model=8, num_heads=2, num_layers=2, d_ff=8))
        >>> network = label_heads(model, goh.composition_graph(model))
        >>> bool((network.previous_token >= 0).all()), network.induction.shape
        (True, torch.Size([4]))
    """
    from gohgraph.analysis.network import HEAD_SCORES

    wiring = wiring_of(model)
    if len(wiring.streams) > 1 or getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise ValueError(
            f"Expected a model of one stack that reads tokens (got {type(model).__name__}). Do label its encoder alone."
        )
    tokens = repeated_tokens(_vocabulary(model), length=24, examples=4).inputs if tokens is None else tokens
    tokens = tokens.to(next(model.parameters()).device)
    wanted = _wanted(tokens)
    labelled = copy.copy(network)
    scores = {name: torch.full((network.num_nodes,), torch.nan, dtype=torch.double) for name in HEAD_SCORES}
    for unit, pattern in attention_patterns(model, wiring, tokens):
        places = zip(network.block, network.kind, strict=True)
        heads = [node for node, place in enumerate(places) if place == (unit.title, "head")]
        if len(heads) != unit.queries.heads:
            raise ValueError(
                f"Expected a network of this model, with {unit.queries.heads} heads in {unit.title} (got "
                f"{len(heads)}). Do make it by attribution_graph or composition_graph."
            )
        for name, places in wanted.items():
            scores[name][heads] = _mean_weight(pattern.double(), places).cpu()
    for name, values in scores.items():
        labelled[name] = values
    return labelled


def _wanted(tokens: Tensor) -> dict[str, Tensor]:
    """Which places count for every score, bool `[B, T, T]`."""
    count = tokens.shape[1]
    places = torch.arange(count, device=tokens.device)
    earlier = places[None, :] < places[:, None]  # [T, S]
    same = (tokens[:, :, None] == tokens[:, None, :]) & earlier  # [B, T, S]
    after = torch.zeros_like(same)
    after[:, :, 1:] = same[:, :, :-1]
    return {
        "previous_token": (places[None, :] == places[:, None] - 1).expand_as(same),
        "induction": after,
        "duplicate_token": same,
        "first_token": ((places == 0)[None, :] & earlier).expand_as(same),
    }


def _mean_weight(pattern: Tensor, places: Tensor) -> Tensor:
    """The weight of heads `[B, H, T, S]` at places `[B, T, S]`, mean over the tokens that have any: `[H]`."""
    weight = (pattern * places.unsqueeze(1)).sum(dim=-1)  # [B, H, T]
    has = places.any(dim=-1)  # [B, T]
    return (weight * has.unsqueeze(1)).sum(dim=(0, 2)) / has.sum().clamp(min=1)


def _vocabulary(model: Any) -> int:
    config = getattr(model.config, "get_text_config", lambda: model.config)()
    return config.vocab_size
