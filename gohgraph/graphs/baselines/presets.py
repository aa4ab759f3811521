"""Whole configurations by name: head graphs, what they have to beat, and what each part of them is worth."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

from gohgraph.graphs.config import HeadGraphConfig, RoutingConfig
from gohgraph.graphs.cross_layer import CrossLayer
from gohgraph.graphs.site_config import BaselineConfig, Site, SiteConfig

Preset = Callable[[int], HeadGraphConfig | None]

# Talking heads, interleaved heads and MEA are linear, without the tanh of a head graph.
MIXING = SiteConfig(edges="static", activation=None)
ELEMENT_GATE, HEAD_NORM = BaselineConfig("gate"), BaselineConfig("norm")
HEAD_GATE, LOW_RANK_GATE = BaselineConfig("gate", {"grain": "head"}), BaselineConfig("gate", {"rank": 16})
COMPOSED, KNOCKED = BaselineConfig("composition"), BaselineConfig("knocking", {"form": "linear"})
POST_COMPOSED = BaselineConfig("composition", {"gates": False})
# Published with a rate of 0.02 beside Muon (slowrun, April 2026), which is this many times a rate of 0.003.
INTERLEAVED = SiteConfig(edges="static", activation=None, learning_rate_factor=7.0)

# Two numbers a head: v_l becomes a v_l + b v_1 (arXiv 2410.17897, its learnable form, there two numbers a layer).
VALUE_RESIDUAL = SiteConfig("empty", edges="static", activation=None, cross_layer="first")
# A head hears the first layer's values of every head, not of its own alone: do messages add to a value residual?
VALUE_RESIDUAL_OF_ALL = dataclasses.replace(VALUE_RESIDUAL, cross_layer=CrossLayer("first", "all-pairs"))
# MUDD's value stream in the last two layers (arXiv 2502.12170, section 2; so reduced in modded-nanogpt, April 2026):
# all values before, weighed by the token. Differs: one weight a head, linear in the token, between projected values.
# Its residual stream is that of `BESIDE`.
MUDD_VALUES = SiteConfig("empty", self_loops=False, activation=None, cross_layer=CrossLayer("all", "same-head", 0.1))


def _outputs(*parts: SiteConfig | BaselineConfig, keys: Site | None = None, values: Site | None = None) -> Preset:
    return lambda heads: HeadGraphConfig(parts[0] if len(parts) == 1 else parts, keys=keys, values=values)


def _inner(
    scores: Site | None = None,
    weights: Site | None = None,
    *,
    queries: Site | None = None,
    keys: Site | None = None,
    values: Site | None = None,
    layers: tuple[int, ...] | None = None,
) -> Preset:
    return lambda heads: HeadGraphConfig(
        None, scores, queries=queries, keys=keys, values=values, weights=weights, layers=layers
    )


def _across(layers: int | str, edges: str, **more: float) -> SiteConfig:
    """Edges from earlier layers alone."""
    return SiteConfig("empty", self_loops=False, cross_layer=CrossLayer(layers, edges, **more))


def _experts(heads: int, rounds: int) -> HeadGraphConfig:
    return HeadGraphConfig.graph_experts(heads // 4, rounds)


# Ways to let heads talk, or to weigh them, without a head graph of ours.
OPPONENTS: dict[str, Preset] = {
    "plain": lambda heads: None,
    "head-gate": _outputs(HEAD_GATE),
    "element-gate": _outputs(ELEMENT_GATE),
    "low-rank-gate": _outputs(LOW_RANK_GATE),
    "head-norm": _outputs(HEAD_NORM),
    "norm-head-gate": _outputs(HEAD_NORM, HEAD_GATE),
    "norm-element-gate": _outputs(HEAD_NORM, ELEMENT_GATE),
    "talking-heads": _inner(scores=MIXING, weights=MIXING),
    "dcmha": _inner(scores=COMPOSED, weights=COMPOSED),
    "dcmha-last": _inner(weights=POST_COMPOSED, layers=(-1,)),
    "knocking-heads": _inner(values=BaselineConfig("knocking")),
    "knocking-linear": _inner(queries=KNOCKED, keys=KNOCKED, values=KNOCKED),
    "interleaved-heads": _inner(queries=INTERLEAVED, keys=INTERLEAVED, values=INTERLEAVED),
    "xsa": _outputs(BaselineConfig("exclusive")),
    "xsa-gated": _outputs(BaselineConfig("exclusive", {"gate": True})),
    "diff-v2": _inner(weights=BaselineConfig("differential")),
    "paired-heads": _inner(scores=BaselineConfig("paired")),
    "value-residual": _inner(values=VALUE_RESIDUAL),
    "mudd": _inner(values=MUDD_VALUES, layers=(-2, -1)),
    "hyper-connections": lambda heads: None,
    "dynamic-hyper-connections": lambda heads: None,
    "mea": _outputs(HEAD_NORM, keys=MIXING, values=MIXING),
    "moh-75": lambda heads: HeadGraphConfig.moh(heads // 4, heads // 2),
    "moh-50": lambda heads: HeadGraphConfig.moh(heads // 4, heads // 4),
    "static-graph": _outputs(SiteConfig(edges="static")),
    "frozen-graph": _outputs(SiteConfig(edges="frozen")),
}

# Head graphs: the sites, and on each the choices of topology, edges and rounds.
HEAD_GRAPHS: dict[str, Preset] = {
    "outputs": _outputs(SiteConfig()),
    "scores": _inner(scores=SiteConfig.ring(4)),
    "both": lambda heads: HeadGraphConfig(scores=SiteConfig.ring(4)),
    "values": _inner(values=SiteConfig()),
    "outputs-values": _outputs(SiteConfig(), values=SiteConfig()),
    "weights": _inner(weights=SiteConfig()),
    "keyed-scores": _inner(scores=SiteConfig.ring(4, kind="keyed")),
    "scores-complete": _inner(scores=SiteConfig()),
    "scores-weights": _inner(scores=SiteConfig(), weights=SiteConfig()),
    "outputs-ring-2": _outputs(SiteConfig.ring(2)),
    "outputs-ring-4": _outputs(SiteConfig.ring(4)),
    "outputs-learned-4": _outputs(SiteConfig(kind="learned", keep_in_degree=4)),
    "outputs-top-4": _outputs(SiteConfig(top_edges=4)),
    "outputs-softmax": _outputs(BaselineConfig("softmax")),
    "outputs-own-context": _outputs(BaselineConfig("own-context")),
    "outputs-gates-only": _outputs(SiteConfig("empty")),
    "outputs-no-loops": _outputs(SiteConfig(self_loops=False)),
    "outputs-rank-16": _outputs(SiteConfig(rank=16)),
    "outputs-linear": _outputs(SiteConfig(activation=None)),
    "outputs-rounds-2": _outputs(SiteConfig(rounds=2)),
    "outputs-norm": _outputs(SiteConfig(norm=True)),
    "norm-outputs": _outputs(HEAD_NORM, SiteConfig()),
    "outputs-element-gate": _outputs(SiteConfig(), ELEMENT_GATE),
    "norm-outputs-element-gate": _outputs(HEAD_NORM, SiteConfig(), ELEMENT_GATE),
    "cross-layer-1": _outputs(SiteConfig(cross_layer=1, norm=True)),
    "cross-layer-values": _inner(values=_across("first", "all-pairs")),
    "cross-layer-values-same-head": _inner(values=_across("first", "same-head")),
    "cross-layer-values-all": _inner(values=_across("all", "same-head")),
    "cross-layer-values-scaled": _inner(values=_across("first", "all-pairs", scale=0.1)),
    "cross-layer-queries-keys": _inner(queries=_across(1, "same-head"), keys=_across(1, "same-head")),
    "cross-layer-outputs": _outputs(_across("first", "all-pairs")),
    "value-residual-outputs": _outputs(SiteConfig(), values=VALUE_RESIDUAL),
    "value-residual-all-pairs": _inner(values=VALUE_RESIDUAL_OF_ALL),
    "outputs-moh-75": lambda heads: HeadGraphConfig(routing=RoutingConfig(heads // 4, heads // 2)),
    **{f"experts-{rounds}": partial(_experts, rounds=rounds) for rounds in (1, 2, 3)},
}

PRESETS = {**OPPONENTS, **HEAD_GRAPHS}
# What some change of a model beside its head graphs: further fields of its `TransformerConfig`.
BESIDE: dict[str, dict[str, str]] = {
    "mudd": {"residual": "dense"},
    "hyper-connections": {"residual": "hyper"},
    "dynamic-hyper-connections": {"residual": "dynamic-hyper"},
}


def preset(name: str, num_heads: int) -> HeadGraphConfig | None:
    """Returns the configuration of a name for so many heads; `None` is plain attention.

    Example:
        >>> preset("talking-heads", num_heads=8).scores
        SiteConfig(edges='static', activation=None)
    """
    if name not in PRESETS:
        raise ValueError(f"Expected one of {list(PRESETS)} (got {name!r}). Do choose one of them.")
    return PRESETS[name](num_heads)


def fields_of(name: str, num_heads: int) -> dict[str, Any]:
    """Returns all that a name changes of a plain model, as fields of its `TransformerConfig`.

    Example:
        >>> fields_of("hyper-connections", num_heads=8)
        {'head_graph': None, 'residual': 'hyper'}
    """
    return {"head_graph": preset(name, num_heads), **BESIDE.get(name, {})}
