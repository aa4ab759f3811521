"""Residual streams and dense connections against loops, and in whole models."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_equal_to, small_config, trained_like
from torch import nn

import gohgraph as goh
from gohgraph.models.streams import STREAMS, DenseConnection, HyperConnection

B, T, M, V = 2, 5, 7, 13
RESIDUALS = ("hyper", "dynamic-hyper", "dense")


def gradients(y, inputs):
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    return torch.autograd.grad((y * weights).sum(), inputs)


def hyper_slowly(sublayer, streams):
    """The matrix form of the paper, token by token: rows of HC are (0, B) and (A_m, A_r)."""
    w, n, rows = sublayer.weights, STREAMS, []
    for token in streams.flatten(0, 1):  # [n, M]
        mix, add = w.mix, w.add
        if w.scales is not None:
            centred = token - token.mean(-1, keepdim=True)
            normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            mix = mix + w.scales[0] * (normed @ w.mix_of.T).tanh()
            add = add + w.scales[1] * (normed @ w.add_of).tanh()
        read = sum(mix[j, 0] * token[j] for j in range(n))
        y = sublayer.object(sublayer.norm(read))
        rows.append(torch.stack([sum(mix[j, 1 + i] * token[j] for j in range(n)) + add[i] * y for i in range(n)]))
    return torch.stack(rows).view_as(streams)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_hyper_connections_equal_their_matrix_form_in_value_and_gradient(dynamic, norm):
    sublayer = trained_like(HyperConnection(nn.Linear(M, M), M, place=6, dynamic=dynamic, norm=norm))
    streams = torch.randn(B, T, STREAMS, M).double().requires_grad_()
    found, expected = sublayer(streams), hyper_slowly(sublayer, streams)
    assert_equal_to(found, expected)
    inputs = [streams, *sublayer.parameters()]
    for one, other in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        assert_equal_to(one, other)


def test_dense_connections_equal_their_sum_in_value_and_gradient():
    dense = trained_like(DenseConnection(M, senders=3))
    dense.scale.data.fill_(0.7)
    x, *earlier = (torch.randn(B, T, M).double().requires_grad_() for _ in range(4))
    rows = []
    for b in range(B):
        for t in range(T):
            normed = x[b, t] / (x[b, t].square().mean() + torch.finfo(x.dtype).eps).sqrt()
            weights = dense.bias + dense.outer @ F.gelu(dense.inner @ normed)
            rows.append(x[b, t] + dense.scale * sum(weights[j] * earlier[j][b, t] for j in range(3)))
    found, expected = dense(x, earlier), torch.stack(rows).view(B, T, M)
    assert_equal_to(found, expected)
    inputs = [x, *earlier, *dense.parameters()]
    for one, other in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        assert_equal_to(one, other)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_dense_and_hyper_models_start_as_the_plain_one_and_every_parameter_learns(residual):
    plain, model = (goh.LanguageModel(small_config("cross-layer", residual=kind)) for kind in ("plain", residual))
    assert not model.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    text = torch.randint(V, (4, 11))
    torch.testing.assert_close(model(text).logits, plain(text).logits, atol=1e-5, rtol=1e-5)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    model(text[:, :-1], targets=text[:, 1:]).loss.backward()
    still = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert [name for name in still if not name.endswith("key.bias")] == []


def test_dense_connections_stand_before_the_last_two_layers():
    stack = goh.Stack(small_config(num_layers=5, residual="dense"), "causal")
    assert {name: len(each.bias) for name, each in stack.path.connections.items()} == {"3": 3, "4": 4}
    assert list(goh.Stack(small_config(num_layers=2, residual="dense")).path.connections) == ["1"]
    seen = []
    for dense in stack.path.connections.values():
        dense.register_forward_hook(lambda module, inputs, output: seen.append(inputs))
    given = []
    for layer in stack.layers:
        layer.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    x = torch.randn(B, T, 30)
    trained_like(stack)(x.double())
    (third, before_third), (fourth, before_fourth) = seen
    assert torch.equal(before_third[0], x.double()) and all(map(torch.equal, before_third, given))
    assert [torch.equal(one, other) for one, other in zip(before_fourth, given, strict=False)] == [True] * 3 + [False]
    assert before_fourth[3] is third and len(before_fourth) == 4 and fourth.shape == x.shape


@pytest.mark.parametrize("residual", RESIDUALS)
@torch.no_grad()
def test_tokens_come_part_after_part_and_later_ones_change_nothing_before(residual):
    model = trained_like(goh.LanguageModel(small_config("outputs", residual=residual))).eval()
    text, caches = torch.randint(V, (B, 9)), model.decoder.new_caches()
    whole = model(text).logits
    parts = [model(part, caches=caches).logits for part in text.split([4, 1, 3, 1], dim=1)]
    assert_equal_to(torch.cat(parts, dim=1), whole)
    changed = text.clone()
    changed[:, 5:] = (text[:, 5:] + 1) % V
    assert_equal_to(model(changed).logits[:, :5], whole[:, :5])


@pytest.mark.parametrize("residual", RESIDUALS)
def test_encoder_decoders_recompute_and_save_them(residual, tmp_path):
    config = small_config("outputs", residual=residual)
    assert goh.TransformerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    model = trained_like(goh.Transformer(config)).float()
    source, target = torch.randint(V, (B, 6)), torch.randint(V, (B, 5))
    expected = model(source, target).logits
    found = []
    for recompute in (False, True):
        for stack in (model.encoder, model.decoder):
            stack.recompute = recompute
        model.zero_grad()
        model(source, target).logits.square().mean().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(goh.Transformer.from_pretrained(tmp_path / "model").train()(source, target).logits, expected)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"residual": "highway"}, "residual of"),
        ({"residual": "hyper", "norm_first": False}, "norm_first=True with residual='hyper'"),
        ({"residual": "dense", "num_layers": 1}, "at least 2 layers for residual='dense'"),
    ],
)
def test_what_does_not_fit_is_refused(settings, named):
    with pytest.raises(ValueError, match=rf"^Expected {named}.*\(got .*\)\. Do "):
        small_config(**settings)


def test_dictionaries_without_it_are_plain():
    values = small_config().to_dict()
    assert values.pop("residual") == "plain" and goh.TransformerConfig.from_dict(values) == small_config()
