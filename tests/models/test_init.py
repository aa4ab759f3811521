"""How weights start, by the table of `initialize`."""

from __future__ import annotations

import math
import re

import pytest
import torch
from helpers import KINDS, model_of, small_config

import gohgraph as goh
from gohgraph.models.config import INITS, TransformerConfig

SHAPE = {"d_model": 60, "num_heads": 5, "num_layers": 3, "d_ff": 140}


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_matrices_start_as_the_table_says(init, activation):
    torch.manual_seed(0)
    config = TransformerConfig(97, **SHAPE, init=init, activation=activation, tie_embeddings=False)
    model = goh.Transformer(config)
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            continue
        expected = 0.02
        if ".layers." in name:
            is_read_out = name.endswith(("object.output.weight", "object.outer.weight"))
            expected = 0.02 if init == "normal" else weight.shape[1] ** -0.5
            expected *= (0 if init == "fan-in-zero" else 1 / math.sqrt(6)) if is_read_out else 1
        assert weight.std().item() == pytest.approx(expected, rel=0.1), name


@pytest.mark.parametrize("kind", KINDS)
def test_layers_with_read_outs_of_zero_are_the_identity_and_open_in_one_step(kind):
    model = model_of(kind, small_config("outputs", init="fan-in-zero", qk_norm=True))
    layers = [layer for name, layer in model.named_modules() if re.fullmatch(r"(en|de)coder.layers.\d+", name)]
    x = torch.randn(2, 5, 30)
    for layer in layers:
        memory = (x,) if hasattr(layer, "cross_attention") else ()
        assert torch.equal(layer(x, *memory)[0], x)
        layer(x, *memory)[0].square().sum().backward()
    read_outs = [p for name, p in model.named_parameters() if re.search(r"layers.*(output|outer).weight", name)]
    assert read_outs and all(p.grad.any() for p in read_outs)


def test_dictionaries_of_before_keep_their_meaning():
    now = TransformerConfig(97, **SHAPE).to_dict()
    before = {k: v for k, v in now.items() if k not in ("qk_norm", "embedding_norm", "logit_cap", "init")}
    config = TransformerConfig.from_dict(before)
    assert (config.qk_norm, config.embedding_norm, config.logit_cap, config.init) == (False, False, None, "normal")
    assert TransformerConfig.from_dict(now).to_dict() == now


@pytest.mark.parametrize(
    "field,value", [("init", "xavier"), ("logit_cap", 0.0), ("qk_norm", -0.5), ("qk_norm", "yes"), ("norm", "batch")]
)
def test_what_does_not_fit_is_refused(field, value):
    with pytest.raises((TypeError, ValueError), match=f"Expected {field}"):
        TransformerConfig(97, **SHAPE, **{field: value})
