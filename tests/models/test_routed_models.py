"""Models with routed heads and graph experts: neutrality, losses, copies, checkpointing, accumulation, training."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import (
    KINDS,
    ROUTED,
    T,
    assert_equal_to,
    assert_same,
    classifier,
    gradients_of,
    inputs_for,
    language_model,
    model_of,
    random_tokens,
    small_config,
    trained_like,
    translator,
    with_graphs,
)

from gohgraph import HeadGraphConfig, HeadRouter, LanguageModel, RoutingConfig, Transformer
from gohgraph.attention.routing import routers

kinds = pytest.mark.parametrize("kind", KINDS)
routed = pytest.mark.parametrize("graph", ROUTED)


@kinds
@pytest.mark.parametrize("shared", [0, 1, 2, 5])
@pytest.mark.parametrize("is_hard", [False, True], ids=["soft", "straight-through"])
def test_all_heads_and_zero_weights_are_plain_attention_bit_for_bit(kind, shared, is_hard):
    plain = model_of(kind, small_config(dropout=0.0))
    routing = RoutingConfig(shared, 5 - shared, straight_through=is_hard, balance_loss=0.0)
    model = model_of(kind, with_graphs(HeadGraphConfig(None, routing=routing)))
    left = model.load_state_dict(plain.state_dict(), strict=False)
    assert not left.unexpected_keys and all(".router." in name for name in left.missing_keys)
    inputs = inputs_for(kind)
    expected = plain(*inputs)
    if is_hard:
        # Whatever the weights; gradients through the gates differ then.
        output = model(*inputs)
        assert torch.equal(output.logits, expected.logits) and torch.equal(output.loss, expected.loss)
    for router in routers(model):
        for weight in router.parameters():
            weight.data.zero_()
    output = model(*inputs)
    assert torch.equal(output.logits, expected.logits) and torch.equal(output.loss, expected.loss)
    own = {name: g for name, g in gradients_of(output.loss, model).items() if ".router." not in name}
    assert_same(own, gradients_of(expected.loss, plain), exactly=True)
    assert len(output.routing) == {"language": 3, "translation": 9, "classes": 3}[kind]
    assert output.auxiliary_loss is None and expected.routing == ()


@kinds
@routed
def test_loss_is_cross_entropy_plus_auxiliary(kind, graph):
    model = trained_like(model_of(kind, small_config(graph)))
    inputs = inputs_for(kind)
    output = model(*inputs)
    logits = output.logits.reshape(-1, output.logits.shape[-1])
    cross_entropy = torch.nn.functional.cross_entropy(logits, inputs[-1].reshape(-1))
    assert_equal_to(output.loss, cross_entropy + output.auxiliary_loss)
    assert_equal_to(output.cross_entropy, cross_entropy)
    graphs = small_config(graph).head_graph
    balance = sum(routing.balance_loss for routing in output.routing) / len(output.routing)
    assert graphs.routing.balance_loss > 0 and output.auxiliary_loss > 0
    if not graphs.alignment:
        assert_equal_to(output.auxiliary_loss, graphs.routing.balance_loss * balance)
    without = model(*inputs[:-1])
    assert without.loss is None and without.cross_entropy is None
    assert_equal_to(without.auxiliary_loss, output.auxiliary_loss)


def test_the_z_loss_is_weighed_in():
    graphs = HeadGraphConfig.moh(2, 2, balance_loss=0.0, z_loss=0.7)
    model = trained_like(LanguageModel(with_graphs(graphs)))
    output = model(random_tokens(T))
    assert_equal_to(output.auxiliary_loss, 0.7 * sum(routing.z_loss for routing in output.routing) / 3)


@kinds
def test_routing_is_listed_in_model_order(kind):
    model = trained_like(model_of(kind, small_config("moh")))
    seen = []
    for router in routers(model):
        router.register_forward_hook(lambda module, inputs, routing: seen.append((module, routing)))
    output = model(*inputs_for(kind))
    assert [module for module, _ in seen] == routers(model)
    assert all(own is other for own, (_, other) in zip(output.routing, seen, strict=True))
    if kind == "translation":
        names = [name.split(".") for name, module in model.named_modules() if isinstance(module, HeadRouter)]
        sites = [(stack, int(layer), site) for stack, _, layer, site, *_ in names]
        assert sites == [("encoder", i, "attention") for i in range(3)] + [
            ("decoder", i, site) for i in range(3) for site in ("attention", "cross_attention")
        ]
        # Cross attention routes the target's tokens.
        lengths = [routing.gates.shape[1] for routing in output.routing]
        assert lengths == [5] * 3 + [T] * 6


def test_every_layer_has_its_own_budget():
    graphs = HeadGraphConfig.moh(1, (4, 1, 3))
    model = trained_like(LanguageModel(with_graphs(graphs)))
    active = [routing.active.sum(-1).unique().tolist() for routing in model(random_tokens(T)).routing]
    assert active == [[5], [2], [4]]
    both = trained_like(Transformer(with_graphs(graphs)))
    active = [routing.active.sum(-1).unique().item() for routing in both(random_tokens(5), random_tokens(T)).routing]
    assert active == [5, 2, 4, 5, 5, 2, 2, 4, 4]


@routed
def test_padding_changes_no_routing_statistic(graph):
    model, keep = language_model(graph), torch.arange(T) < torch.tensor([[T], [3]])
    tokens = random_tokens(T)
    own = model(tokens, keep_mask=keep)
    other = model(torch.where(keep, tokens, random_tokens(T)), keep_mask=keep)
    assert_equal_to(own.auxiliary_loss, other.auxiliary_loss)
    for routing in own.routing:
        assert_equal_to(routing.load, routing.active[keep].double().mean(dim=0))
    for first, second in zip(own.routing, other.routing, strict=True):
        for name in ("balance_loss", "z_loss", "load", "entropy"):
            assert_equal_to(getattr(first, name), getattr(second, name))


def test_padding_of_source_and_target_changes_no_routing_statistic():
    model = translator("experts")
    source, target = random_tokens(5, batch=1), random_tokens(3, batch=1)
    pad = torch.nn.functional.pad
    keep = {
        "source_keep_mask": (torch.arange(11) < 5)[None],
        "target_keep_mask": (torch.arange(T) < 3)[None],
    }
    padded = model(pad(source, (0, 6)), pad(target, (0, 4)), **keep)
    alone = model(source, target)
    assert_equal_to(padded.auxiliary_loss, alone.auxiliary_loss)
    for own, expected in zip(padded.routing, alone.routing, strict=True):
        for name in ("balance_loss", "z_loss", "load", "entropy"):
            assert_equal_to(getattr(own, name), getattr(expected, name))
    model = classifier("experts")
    padded = model(pad(source, (6, 0)), keep_mask=(torch.arange(11) >= 6)[None])
    assert_equal_to(padded.auxiliary_loss, model(source).auxiliary_loss)


@routed
@torch.no_grad()
def test_weights_of_a_head_nobody_chose_do_not_matter(graph):
    model, tokens = language_model(graph, num_layers=2), random_tokens(T)
    attention = model.decoder.layers[0].attention.object
    head = 4
    attention.router.register_buffer("balance_bias", torch.zeros(3, dtype=torch.float64))
    attention.router.balance_bias[head - 2] = -10.0
    before = model(tokens)
    assert not before.routing[0].active[..., head].any() and before.routing[0].active[..., head - 1].any()
    rows = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
    for linear in (attention.query, attention.key, attention.value):
        linear.weight[rows] += 1.0
        linear.bias[rows] -= 1.0
    attention.output.weight[:, rows] *= 3.0
    after = model(tokens)
    assert torch.equal(after.logits, before.logits)


@routed
def test_two_models_share_nothing(graph):
    one, other = language_model(graph), language_model(graph)
    twin = copy.deepcopy(one)
    tokens, targets = random_tokens(T), random_tokens(T)
    expected = one(tokens, targets)
    output, more = one(tokens, targets), other(tokens, targets)
    more.loss.backward()
    for _ in range(3):
        other(random_tokens(5)).auxiliary_loss.backward()
    assert all(p.grad is None for p in one.parameters())
    for again in (output, twin(tokens, targets), one(tokens, targets)):
        assert torch.equal(again.loss, expected.loss) and torch.equal(again.auxiliary_loss, expected.auxiliary_loss)
        assert torch.equal(again.logits, expected.logits)
    assert_same(gradients_of(output.loss, one), gradients_of(expected.loss, one), exactly=True)


@routed
def test_bfloat16_models_route_in_float32(graph):
    model = language_model(graph).bfloat16()
    output = model(random_tokens(T), random_tokens(T))
    assert output.logits.dtype == torch.bfloat16 and output.loss.dtype == torch.float32
    assert output.auxiliary_loss.dtype == torch.float32
    for routing in output.routing:
        assert routing.gates.dtype == routing.load.dtype == torch.float32
    output.loss.backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in model.parameters())


@routed
def test_autocast_keeps_the_router_in_float32(graph):
    model, tokens = language_model(graph).float(), random_tokens(T)
    seen = []
    for router in routers(model):
        router.register_forward_hook(lambda module, inputs, routing: seen.append((module, inputs, routing)))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(tokens, random_tokens(T))
    assert output.auxiliary_loss.dtype == output.loss.dtype == torch.float32
    for router, inputs, routing in list(seen):
        outside = router(*inputs)
        for own, expected in zip(routing, outside, strict=True):
            assert own.dtype in (torch.float32, torch.bool)
            torch.testing.assert_close(own, expected, rtol=1e-6, atol=1e-6)


@routed
def test_saved_models_keep_bias_and_choice(graph, tmp_path):
    graphs = small_config(graph).head_graph
    routing = RoutingConfig(2, 2, bias_rate=0.01, straight_through=True)
    model = LanguageModel(with_graphs(HeadGraphConfig(graphs.outputs, graphs.scores, routing, graphs.alignment)))
    model = trained_like(model).float()
    for router in routers(model):
        for _ in range(7):
            router.update_balance_bias(torch.rand(5))
    model.save_pretrained(tmp_path / "run")
    torch.manual_seed(99)
    again = LanguageModel.from_pretrained(tmp_path / "run")
    tokens = random_tokens(T)
    assert again.config == model.config
    for own, other in zip(again(tokens).routing, model(tokens).routing, strict=True):
        assert all(map(torch.equal, own, other))
    biases = [router.balance_bias for router in routers(again)]
    assert len(biases) == 3 and all(bias.abs().max() > 0.005 for bias in biases)


@torch.no_grad()
def test_generation_follows_a_changed_budget():
    model, prompt = language_model("moh"), random_tokens(5)
    before = model.generate(prompt, 11, temperature=0)
    logits = model(prompt).logits
    for router in routers(model):
        router.top_k = 1
    assert not torch.equal(model(prompt).logits, logits)
    tokens = prompt
    for _ in range(11):
        tokens = torch.cat((tokens, model(tokens).logits[:, -1:].argmax(dim=-1)), dim=1)
    assert torch.equal(model.generate(prompt, 11, temperature=0), tokens) and before.shape == tokens.shape
