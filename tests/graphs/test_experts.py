"""Graph-convolution experts: rounds of messages between two kinds of heads, their fusion and their alignment."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_equal_to, small_config, trained_like
from torch import nn

import gohgraph as goh
from gohgraph.graphs.experts import GraphExperts, misalignment

B, T, H, D, M, SHARED = 2, 3, 7, 5, 35, 3


def make(topology="bipartite", *, fresh=False, dtype=torch.float64, num_shared=SHARED, **settings):
    options = {"num_shared": SHARED} if topology == "bipartite" else {}
    experts = GraphExperts(goh.head_graph(H, topology, **options), D, M, num_shared, **settings).to(dtype)
    if not fresh:
        for parameter in experts.parameters():
            nn.init.normal_(parameter, std=0.3)
    return experts


def inputs(dtype=torch.float64):
    return torch.randn(B, T, H, D, dtype=dtype), torch.randn(B, T, M, dtype=dtype)


def slowly(experts, z, x):
    """The formula of the docstring, one edge and one round at a time: z' and z^(R)."""
    fused, nodes = z.clone(), z
    for r in range(experts.rounds):
        alpha = experts.edges(x)[..., r, :]
        message = torch.zeros_like(z)
        for e, (j, i) in enumerate(experts.edge_index.t().tolist()):
            kind = experts.kind_embedding[0 if j < experts.num_shared else 1]
            node = nodes[:, :, j]
            if experts.gain is not None:
                rms = (node.square().mean(-1, keepdim=True) + torch.finfo(z.dtype).eps).sqrt()
                node = node / rms * experts.gain[j]
            message[:, :, i] += alpha[:, :, e, None] * (node + kind + experts.head_embedding[j])
        fusion = 0.0 if experts.fusion is None else experts.fusion[r]
        fused, nodes = fused + (1 + fusion) * message, nodes + message
    return fused, nodes


def gradients(experts, y):
    torch.manual_seed(5)
    return torch.autograd.grad((y * torch.randn_like(y)).sum(), list(experts.parameters()))


@pytest.mark.parametrize("backend", ["dense", "pyg"])
@pytest.mark.parametrize("num_shared", [0, SHARED, H])
@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("settings", [{}, {"norm": True}, {"rank": 2, "activation": None}], ids=str)
def test_equals_the_formula_in_value_and_gradient(settings, rounds, num_shared, backend):
    experts = make(rounds=rounds, num_shared=num_shared, backend=backend, **settings)
    z, x = inputs()
    expected, last = slowly(experts, z, x)
    y = experts(z, x)
    assert_equal_to(y, expected)
    for own, other in zip(gradients(experts, y), gradients(experts, expected), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-10)
    losses = {"alignment": [], "of another graph": []}
    aligned = experts(z, x, losses=losses)
    assert torch.equal(aligned, y) or rounds == 1
    assert_equal_to(aligned, expected)
    assert_equal_to(losses["alignment"][0], 1 - F.cosine_similarity(z, last, dim=-1))
    assert [len(found) for found in losses.values()] == [1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"rounds": 1}, {"rounds": 3, "norm": True}, {"cross_layer": 1}], ids=str)
@pytest.mark.parametrize("alignment", [False, True])
def test_new_experts_return_their_input_bit_for_bit(alignment, settings, dtype):
    experts = make(fresh=True, dtype=dtype, **settings)
    z, x = inputs(dtype)
    assert experts.kind_embedding.ne(0).all() and experts.head_embedding.ne(0).all()
    losses = {"alignment": []} if alignment else None
    assert torch.equal(experts(z, x, [z.flip(0)] * experts.cross_layer, losses=losses), z)
    if alignment:
        assert losses["alignment"][0].abs().max() < 1e-6


def test_reset_returns_to_the_neutral_start():
    experts = make(rounds=2)
    z, x = inputs()
    assert not torch.equal(experts(z, x), z)
    before = experts.head_embedding.clone()
    experts.reset_parameters()
    assert torch.equal(experts(z, x), z) and experts.fusion.eq(0).all()
    assert not torch.equal(experts.head_embedding, before) and 0.005 < experts.head_embedding.std() < 0.05


def test_heads_of_a_kind_send_to_the_other_kind():
    experts = make(rounds=1)
    pairs = {(j, i) for j, i in experts.edge_index.t().tolist() if i != j}
    assert pairs == {(j, i) for j in range(H) for i in range(H) if (j < SHARED) != (i < SHARED)}


@pytest.mark.parametrize("rounds", [1, 2, 3, 4])
def test_rounds_reach_as_many_hops(rounds):
    """On a path 0 - 1 - ... - 6, where hops can be counted."""
    edges = [(i, i + 1) for i in range(H - 1)] + [(i + 1, i) for i in range(H - 1)]
    experts = make(edges, rounds=rounds)
    z, x = inputs()
    jacobian = torch.autograd.functional.jacobian(lambda z: experts(z[None, None], x[:1, :1])[0, 0], z[0, 0])
    reached = jacobian.abs().sum(dim=(1, 3)) > 0  # [H, H]
    distance = (torch.arange(H)[:, None] - torch.arange(H)).abs()
    assert torch.equal(reached, distance <= rounds)


def test_embeddings_tell_kinds_and_heads_apart():
    experts = make(rounds=1)
    x = torch.randn(1, 1, M).double()
    y = experts(torch.zeros(1, 1, H, D).double(), x)  # messages of embeddings alone
    alpha = experts.adjacency(x)
    kinds = experts.kind_embedding.repeat_interleave(torch.tensor([SHARED, H - SHARED]), dim=0)
    assert_equal_to(y, alpha @ (kinds + experts.head_embedding))


def by_hand(first, last):
    """1 - cos of every node, one at a time."""
    found = torch.empty(first.shape[:-1], dtype=first.dtype)  # [*, H]
    for place in np.ndindex(*found.shape):
        a, b = first[place], last[place]
        found[place] = 1 - a @ b / (a @ a).sqrt() / (b @ b).sqrt()
    return found


def test_misalignment_is_that_of_every_node():
    first, last = torch.randn(2, B, T, H, D).double()
    assert_equal_to(misalignment(first, last), by_hand(first, last))


def test_misalignment_of_zero_nodes_is_finite():
    first, zero = torch.randn(B, T, H, D, requires_grad=True), torch.zeros(B, T, H, D, requires_grad=True)
    loss = (misalignment(zero, first) + misalignment(zero, zero)).mean()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, [zero, first]))


def test_misalignment_of_bfloat16_heads_is_taken_in_float32():
    first = torch.randn(B, T, H, D).bfloat16()
    last = first + 0.05 * torch.randn(B, T, H, D).bfloat16()
    found = misalignment(first, last)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, misalignment(first.double(), last.double()).float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("is_routed", [False, True])
@pytest.mark.parametrize("is_padded", [False, True])
def test_attention_aligns_the_heads_that_work(is_routed, is_padded):
    experts = make()
    router = goh.HeadRouter(M, H, SHARED, 2).double() if is_routed else None
    attention = goh.MultiHeadAttention(M, H, output_graph=experts, router=router).double()
    x = torch.randn(B, T, M).double()
    real = torch.tensor([[True, True, False], [True, False, False]]) if is_padded else None
    seen, losses = [], {"alignment": [], "of another graph": []}
    experts.register_forward_hook(
        lambda module, inputs, options, y: seen.append((inputs, options["losses"]["alignment"][0])), with_kwargs=True
    )
    heads = attention(x, token_mask=real, losses=losses)[1]
    counted = torch.ones(B, T, H, dtype=torch.bool) if heads.routing is None else heads.routing.active
    counted = counted if real is None else counted & real.unsqueeze(-1)
    (first, context, _, active), of_nodes = seen[0]
    assert_equal_to(of_nodes, by_hand(first, first + sum(experts.messages(first, context, (), active))))
    assert_equal_to(losses["alignment"][0], of_nodes[counted].mean())
    assert losses["of another graph"] == []


def test_the_alignment_of_padding_alone_is_zero():
    attention = goh.MultiHeadAttention(M, H, output_graph=make()).double()
    losses = {"alignment": []}
    attention(torch.randn(B, T, M).double(), token_mask=torch.zeros(B, T, dtype=torch.bool), losses=losses)
    (loss,) = losses["alignment"]
    assert loss == 0 and torch.autograd.grad(loss, attention.query.weight)[0].eq(0).all()


def language_model(**settings):
    config = goh.HeadGraphConfig.graph_experts(2, **settings)
    return goh.LanguageModel(goh.TransformerConfig(13, 30, 5, num_layers=2, d_ff=11, head_graph=config)).double()


def test_the_preset_builds_experts_in_every_layer():
    model = language_model(rounds=3, top_k=(2, 1), alignment=0.5, rank=3)
    for layer, top_k in zip(model.decoder.layers, (2, 1), strict=True):
        attention = layer.attention.object
        experts = attention.output_graph
        assert isinstance(experts, GraphExperts) and experts.rounds == 3
        assert (experts.num_shared, experts.edges.rank) == (2, 3)
        assert (attention.router.num_shared, attention.router.top_k) == (2, top_k)
        assert experts.edge_index.tolist() == goh.head_graph(5, "bipartite", num_shared=2).edge_index.tolist()
    plain = language_model()
    assert all(layer.attention.object.router is None for layer in plain.decoder.layers)
    tokens = torch.randint(13, (B, 11))
    # What is asked for once is asked of every layer; without a weight nothing is.
    for own, asked in ((model, [1, 1]), (plain, [])):
        calls = []
        for layer in own.decoder.layers:
            layer.attention.object.output_graph.register_forward_hook(
                lambda module, inputs, options, y, calls=calls: calls.append(len(options["losses"])), with_kwargs=True
            )
        own(tokens, tokens)
        assert [number for number in calls if number] == asked


@pytest.mark.parametrize("top_k", [None, 2])
def test_a_new_model_with_experts_is_that_without(top_k):
    tokens = torch.randint(13, (B, 11))
    model = language_model(top_k=top_k, alignment=0.1)
    without = copy.deepcopy(model)
    for layer in without.decoder.layers:
        layer.attention.object.output_graph = None
    assert torch.equal(model(tokens).logits, without(tokens).logits)


@pytest.mark.parametrize("top_k", [None, 2])
def test_alignment_reaches_the_embeddings_once_edges_open(top_k):
    model, tokens = language_model(top_k=top_k, alignment=0.3), torch.randint(13, (B, 11))
    experts = model.decoder.layers[0].attention.object.output_graph

    def gradient_of(loss):
        return torch.autograd.grad(loss, [experts.edges.bias, experts.kind_embedding, experts.head_embedding])

    output = model(tokens, tokens)
    edges, *embeddings = gradient_of(output.loss)
    assert edges.ne(0).any() and all(g.eq(0).all() for g in embeddings)
    with torch.no_grad():
        experts.edges.bias.normal_(std=0.3)
    output = model(tokens, tokens)
    assert all(g.ne(0).all() for g in gradient_of(output.loss))
    output = model(tokens, tokens)
    assert all(g.ne(0).all() for g in gradient_of(output.auxiliary_loss))


def test_descending_the_alignment_turns_the_last_round_to_the_first():
    experts, (z, x) = make(rounds=2), inputs()
    losses = []
    for _ in range(50):
        asked = {"alignment": []}
        experts(z, x, losses=asked)
        losses.append(asked["alignment"][0].mean())
        for parameter, g in zip(
            experts.parameters(), torch.autograd.grad(losses[-1], list(experts.parameters()), allow_unused=True),
            strict=True,
        ):  # fmt: skip
            parameter.data -= 0.0 if g is None else 0.5 * g
    assert losses[-1] < 0.5 * losses[0]


def test_state_dict_and_deepcopy():
    experts, other = make(rounds=3), make(rounds=3)
    z, x = inputs()
    other.load_state_dict(experts.state_dict())
    assert {"kind_embedding", "head_embedding", "fusion"} <= set(experts.state_dict())
    assert torch.equal(other(z, x), experts(z, x)) and torch.equal(copy.deepcopy(experts)(z, x), experts(z, x))


def test_experts_run_in_bfloat16_and_under_autocast():
    experts = make(dtype=torch.float32)
    z, x = inputs(torch.float32)
    exact = experts(z, x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(experts(z, x).float(), exact, rtol=0.1, atol=0.1)
    torch.testing.assert_close(experts.bfloat16()(z.bfloat16(), x.bfloat16()).float(), exact, rtol=0.1, atol=0.1)


REFUSED = {
    "shared heads beyond all": lambda: make(num_shared=H + 1),
    "a negative number": lambda: make(num_shared=-1),
    "a bool": lambda: make(num_shared=True),
    "no round": lambda: make(rounds=0),
    "at the score site": lambda: goh.MultiHeadAttention(M, H, score_graph=make()),
    "as a linear map": lambda: make().matrix(inputs()[1]),
    "folded": lambda: goh.fold(goh.MultiHeadAttention(M, H, output_graph=make(edges="static"))),
}


@pytest.mark.parametrize("case", REFUSED)
def test_impossible_uses_are_refused(case):
    with pytest.raises((TypeError, ValueError), match=r"^Expected .*\(got .*\)\. Do "):
        REFUSED[case]()


def test_auxiliary_loss_of_a_model_weighs_balance_and_alignment():
    model = trained_like(goh.LanguageModel(small_config("experts")))
    seen = []
    for layer in model.decoder.layers:
        layer.attention.object.output_graph.register_forward_hook(lambda *call: seen.append(call))
    tokens = torch.randint(13, (B, 7))
    output = model(tokens, tokens)
    losses = []
    for (experts, (z, x, earlier, active), _), routing in zip(seen, output.routing, strict=True):
        last = z + sum(experts.messages(z, x, earlier, active))
        losses.append((1 - F.cosine_similarity(z, last, dim=-1))[routing.active].mean())
    balance = torch.stack([routing.balance_loss for routing in output.routing]).mean()
    weight = model.config.head_graph.routing.balance_loss
    assert_equal_to(output.auxiliary_loss, 0.1 * torch.stack(losses).mean() + weight * balance)
