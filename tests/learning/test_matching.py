"""Widening the feed-forward reaches an equal number of parameters."""

from __future__ import annotations

import dataclasses

import pytest

import gohgraph as goh
from gohgraph.learning.contests.matching import count_parameters, match_parameters


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("bias", [True, False])
def test_counts_agree_to_half_a_unit(activation, bias):
    plain = goh.TransformerConfig(
        13, d_model=20, num_heads=5, num_layers=3, d_ff=31, activation=activation, bias=bias
    )
    graph = dataclasses.replace(plain, head_graph=goh.HeadGraphConfig())
    goal = count_parameters(goh.LanguageModel(graph))
    matched = match_parameters(goh.LanguageModel, plain, goal)
    got = count_parameters(goh.LanguageModel(matched))
    wider = count_parameters(goh.LanguageModel(dataclasses.replace(matched, d_ff=matched.d_ff + 1)))
    assert matched.d_ff > plain.d_ff and abs(got - goal) <= (wider - got) / 2
    assert dataclasses.replace(matched, d_ff=31) == plain


def test_a_heavier_model_is_refused():
    config = goh.TransformerConfig(13, d_model=20, num_heads=5, num_layers=1, d_ff=31)
    with pytest.raises(ValueError, match="Expected a model of at most 10 parameters"):
        match_parameters(goh.LanguageModel, config, 10)
