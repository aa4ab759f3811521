"""Every baseline against its definition, written out head by head, and at its start."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import assert_equal_to, trained_like
from torch import nn

import gohgraph as goh
from gohgraph.graphs.baselines import (
    Composition,
    ExclusiveHeads,
    HeadNorm,
    KnockingHeads,
    OwnContext,
    SigmoidGate,
    SoftmaxMessages,
    presets,
)
from gohgraph.graphs.building import build_graph

B, T, S, H, D, M = 2, 7, 11, 5, 6, 13


def randomised(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double()


def nodes(features=D, tokens=T):
    return torch.randn(B, tokens, H, features).double()


def contexts(tokens=T):
    return torch.randn(B, tokens, M).double()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("grain", ["head", "element"])
def test_gates_equal_their_formula(grain, rank):
    gate, z, x = randomised(SigmoidGate(H, D, M, grain=grain, rank=rank)), nodes(), contexts()
    weight = (gate.weight if rank is None else gate.weight @ gate.down).detach().numpy()
    expected = np.zeros((B, T, H, D))
    for b, t, h, d in np.ndindex(B, T, H, D):
        row = weight[h if grain == "head" else h * D + d]
        expected[b, t, h, d] = z[b, t, h, d] * sigmoid(row @ x[b, t].numpy())
    assert_equal_to(gate(z, x), torch.from_numpy(expected))


@pytest.mark.parametrize("rank", [None, 64])
def test_gates_start_near_one_half(rank):
    torch.manual_seed(0)
    gate = SigmoidGate(7, 11, 503, rank=rank)
    gates = gate(torch.ones(101, 7, 11), torch.randn(101, 503))
    assert abs(gates.mean() - 0.5) < 0.01
    # A logit is a sum of 503 products of spread 0.02, of either rank: 0.45, and the sigmoid's slope is 1/4.
    assert 0.09 < gates.std() < 0.13


def test_norm_equals_its_formula():
    norm, z = randomised(HeadNorm(H, D, M)), nodes()
    expected = torch.zeros_like(z)
    for b, t, h in np.ndindex(B, T, H):
        rms = (sum(z[b, t, h, d] ** 2 for d in range(D)) / D + 1e-6) ** 0.5
        expected[b, t, h] = norm.gain[h].detach() * z[b, t, h] / rms
    assert_equal_to(norm(z), expected)


@pytest.mark.parametrize("gate", [False, True])
def test_exclusive_heads_equal_their_formula_in_value_and_gradient(gate):
    exclusive = randomised(ExclusiveHeads(H, D, M, gate=gate))
    z, v, cotangent = (nodes().requires_grad_() for _ in range(3))
    inputs = [z, v, *exclusive.parameters()]
    expected = torch.zeros(B, T, H, D).double()
    for b, t, h in np.ndindex(B, T, H):
        share = (z[b, t, h] @ v[b, t, h]) / (v[b, t, h] @ v[b, t, h])
        expected[b, t, h] = z[b, t, h] - (exclusive.gate[h] if gate else 1.0) * share * v[b, t, h]
    found = exclusive(z, values=v)
    assert_equal_to(found, expected)
    gradients = (torch.autograd.grad((each * cotangent).sum(), inputs) for each in (found, expected))
    for one, other in zip(*gradients, strict=True):
        assert_equal_to(one, other)


def test_gated_exclusive_heads_start_as_the_identity():
    z = nodes()
    assert torch.equal(ExclusiveHeads(H, D, M, gate=True).double()(z, values=nodes()), z)


@pytest.mark.parametrize("form", ["mlp", "linear"])
def test_knocking_heads_equal_their_formula(form):
    knock, z = randomised(KnockingHeads(H, D, M, form=form)), nodes()
    up, gate, down = (None if w is None else w.detach().numpy() for w in (knock.up, knock.gate, knock.down))
    expected = np.zeros((B, T, H, D))
    for b, t, h in np.ndindex(B, T, H):
        head = z[b, t, h].numpy()
        expected[b, t, h] = head @ up if form == "linear" else 2 * ((head @ up) * sigmoid(head @ gate)) @ down
    assert_equal_to(knock(z), torch.from_numpy(expected))


def test_softmax_messages_equal_their_formula():
    module, z, x = randomised(SoftmaxMessages(H, D, M)), nodes(), contexts()
    expected = z.clone()
    for b, t, i in np.ndindex(B, T, H):
        scores = np.exp([(module.weight[i * H + j] @ x[b, t]).item() for j in range(H)])
        for j in range(H):
            expected[b, t, i] += module.gain[i].detach() * scores[j] / scores.sum() * z[b, t, j]
    assert_equal_to(module(z, x), expected)


def test_heads_that_are_off_neither_send_nor_receive_softmax_messages():
    module, z, x = randomised(SoftmaxMessages(H, D, M)), nodes(), contexts()
    active = torch.rand(B, T, H) < 0.6
    active[0, 0] = False
    found = module(z, x, active=active)
    assert torch.equal(found[~active], z[~active]) and found.isfinite().all()
    other = z.clone()
    other[~active] = torch.randn_like(other[~active])
    torch.testing.assert_close(module(other, x, active=active)[active], found[active])


def test_own_context_is_a_head_graph_under_its_nodes():
    module, z, x = randomised(OwnContext(H, D, M)), nodes(), contexts()
    assert_equal_to(module(z, x), module.conv(z, context=z.reshape(B, T, H * D)))
    assert not torch.equal(module(z, x), z)


@pytest.mark.parametrize("module", [SoftmaxMessages, OwnContext])
def test_other_messages_start_as_the_identity_and_open(module):
    torch.manual_seed(0)
    made, z, x = module(H, D, M), nodes().float(), contexts().float()
    assert torch.equal(made(z, x), z)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        made(z, x).square().mean().backward()
        optimizer.step()
    assert all(parameter.grad.abs().sum() > 0 for parameter in made.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["mlp", "linear"])
def test_knocking_heads_start_as_the_identity(form, dtype):
    z = torch.randn(B, T, H, D, dtype=dtype)
    assert torch.equal(KnockingHeads(H, D, M, form=form).to(dtype)(z), z)


def composed(compose, maps, x, source):
    """The five branches of the released code, pair by pair; A_n' gathers over m."""
    w = {name: parameter.detach().numpy() for name, parameter in compose.named_parameters()}

    def branches(token, side):
        hidden = torch.nn.functional.gelu(torch.from_numpy(w["inner"][side] @ token)).numpy()
        one, two = (w["outer"][side] @ hidden).reshape(2, compose.rank, H)
        one = one / np.sqrt((one**2).mean(axis=1, keepdims=True) + 1e-6)
        return one, two, np.tanh(w["gate"][side] @ token) if "gate" in w else 0.0

    found = np.zeros(maps.shape)
    for b, t, s in np.ndindex(B, maps.shape[1], maps.shape[3]):
        old = maps[b, t, :, s].numpy()
        new = old.copy()
        for one, two, gate in (branches(x[b, t].numpy(), 0), branches(source[b, s].numpy(), 1)):
            for r in range(compose.rank):
                inner = sum(old[m] * one[r, m] for m in range(H))
                new += [inner * two[r, n] for n in range(H)]
            new += old * gate
        found[b, t, :, s] = new
    return torch.from_numpy(found)


@pytest.mark.parametrize(("rank", "gates"), [(1, True), (2, True), (2, False)])
def test_composition_equals_its_branches(rank, gates):
    compose = randomised(Composition(H, D, M, rank=rank, gates=gates))
    maps, x, source = nodes(S), contexts(), contexts(S)
    assert_equal_to(compose(maps, x, keys=compose.key_state(source)), composed(compose, maps, x, source))
    # Of a value that is right, the numeric gradient is the reference.
    inputs = [each[:1, :2].requires_grad_() for each in (maps, x, source)]
    assert torch.autograd.gradcheck(lambda z, x, y: compose(z[..., :2], x, keys=compose.key_state(y)), inputs)


def test_composition_starts_nearly_neutral():
    compose, maps = Composition(8, D, 512), torch.randn(B, T, 8, S)
    state = compose.key_state(torch.randn(B, S, 512))
    changed = compose(maps, torch.randn(B, T, 512), keys=state) - maps
    assert 0 < changed.abs().mean() < 0.1 * maps.abs().mean()


def test_composition_leaves_masked_weights_at_zero_and_takes_nothing_from_heads_that_are_off():
    compose, maps, x = randomised(Composition(H, D, M)), nodes(S), contexts()
    maps[..., 4:] = 0.0
    active = torch.rand(B, T, H) < 0.5
    state = compose.key_state(contexts(S))
    assert compose(maps, x, keys=state)[..., 4:].eq(0).all()
    changed = maps + torch.randn_like(maps) * ~active.unsqueeze(-1)
    before, after = (compose(z, x, (), active, keys=state) for z in (maps, changed))
    assert torch.equal(before[active], after[active])


def attention_of(name, **settings):
    """Attention of a preset, with weights as after training."""
    heads = presets.preset(name, H)
    shape = {"num_layers": 1, "d_ff": 1, "positions": "none", "qk_norm": False}
    config = goh.TransformerConfig(7, H * D, H, **shape, head_graph=heads, **settings)
    return trained_like(goh.EncoderLayer(config, causal=True)).attention.object


def maps_of(attention, x):
    q, k, v = (f(x).unflatten(-1, (H, D)).transpose(1, 2) for f in (attention.query, attention.key, attention.value))
    return q, k, v


def causal_softmax(scores):
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1)


def read_out(attention, z):
    return attention.output(z.transpose(1, 2).flatten(-2))


def test_talking_heads_mix_logits_and_weights_by_a_matrix_each():
    attention, x = attention_of("talking-heads"), torch.randn(B, T, H * D).double()
    q, k, v = maps_of(attention, x)
    graphs = (attention.score_graph, attention.inner_graphs["weight"])
    before, after = (torch.eye(H).double() + graph.adjacency() for graph in graphs)
    logits = torch.einsum("ij,bjts->bits", before, q @ k.mT / D**0.5)
    z = torch.einsum("ij,bjts->bits", after, causal_softmax(logits)) @ v
    assert_equal_to(attention(x)[0], read_out(attention, z))


def test_mea_mixes_keys_and_values_and_normalises_heads():
    attention, x = attention_of("mea"), torch.randn(B, T, H * D).double()
    q, k, v = maps_of(attention, x)
    k, v = (
        torch.einsum("ij,bjtd->bitd", torch.eye(H).double() + attention.inner_graphs[site].adjacency(), heads)
        for site, heads in (("key", k), ("value", v))
    )
    z = causal_softmax(q @ k.mT / D**0.5) @ v
    z = z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt() * attention.output_graph.gain.unsqueeze(1)
    assert_equal_to(attention(x)[0], read_out(attention, z))


def test_dcmha_composes_before_and_after_the_softmax():
    attention, x = attention_of("dcmha"), torch.randn(B, T, H * D).double()
    q, k, v = maps_of(attention, x)
    logits = composed(attention.score_graph, (q @ k.mT / D**0.5).transpose(1, 2).detach(), x, x).transpose(1, 2)
    weights = causal_softmax(logits).transpose(1, 2)
    z = composed(attention.inner_graphs["weight"], weights, x, x).transpose(1, 2) @ v
    assert_equal_to(attention(x)[0], read_out(attention, z))


def test_a_chain_applies_its_modules_in_order():
    attention, x = attention_of("norm-head-gate"), torch.randn(B, T, H * D).double()
    norm, gate = attention.output_graph
    z = torch.randn(B, T, H, D).double()
    assert torch.equal(attention.output_graph(z, x), gate(norm(z), x))


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: SigmoidGate(H, D, M, grain="layer"), "Expected grain of"),
        (lambda: SigmoidGate(H, D, M, rank=0), "Expected rank to be an int >= 1"),
        (lambda: KnockingHeads(H, D, M, form="cubic"), "Expected form of"),
        (lambda: Composition(H, D, M, rank=True), "Expected rank to be an int"),
        (lambda: Composition(H, D, M, gates=1), "Expected gates to be"),
        (lambda: presets.preset("silent-heads", H), "Expected one of"),
        (lambda: goh.BaselineConfig("gate", {"rank": [3]}), "Expected options to be"),
        (lambda: _site("silent"), "Expected a baseline of"),
        (lambda: _site("gate", colour=3), "Expected options of the baseline 'gate'"),
    ],
)
def test_impossible_options(build, match):
    with pytest.raises((ValueError, TypeError), match=match):
        build()


def _site(kind, **options):
    return build_graph(goh.BaselineConfig(kind, options), (H, D, H * D))


@pytest.mark.parametrize("kind", [SigmoidGate, SoftmaxMessages])
def test_a_missing_context_is_named(kind):
    with pytest.raises(ValueError, match=r"a context \(got None\)"):
        kind(H, D, M)(torch.randn(B, T, H, D))
