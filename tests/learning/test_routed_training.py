"""Training models with routed heads: checkpointing, accumulation, data parallelism, compilation, balanced loads."""

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
    compiled,
    gradients_of,
    inputs_for,
    language_model,
    model_of,
    random_tokens,
    small_config,
    trained_like,
    with_graphs,
)
from ranks import run_ranks
from shared_statistics import statistics_of_all_ranks
from torch.utils.checkpoint import checkpoint

from gohgraph import HeadGraphConfig, LanguageModel, RoutingConfig, SiteConfig, TransformerConfig
from gohgraph.learning.recipes import RECIPES

OLD = RECIPES["old"]
kinds = pytest.mark.parametrize("kind", KINDS)
routed = pytest.mark.parametrize("graph", ROUTED)


@kinds
@routed
def test_gradient_checkpointing_changes_nothing(kind, graph):
    model = trained_like(model_of(kind, small_config(graph)))
    inputs = inputs_for(kind)
    wrapped = copy.deepcopy(model)
    stacks = [getattr(wrapped, name) for name in ("encoder", "decoder") if hasattr(wrapped, name)]
    for layer in (layer for stack in stacks for layer in stack.layers):
        forward = layer.forward
        layer.forward = lambda *a, _forward=forward, **k: checkpoint(_forward, *a, use_reentrant=False, **k)
    expected, output = model(*inputs), wrapped(*inputs)
    assert torch.equal(output.loss, expected.loss) and torch.equal(output.auxiliary_loss, expected.auxiliary_loss)
    for own, other in zip(output.routing, expected.routing, strict=True):
        assert all(map(torch.equal, own, other))
    assert_same(gradients_of(output.loss, wrapped), gradients_of(expected.loss, model), exactly=True)


@routed
def test_gradients_accumulate_but_for_the_balance_of_each_micro_batch(graph):
    model = language_model(graph)
    tokens, targets = random_tokens(T, batch=4), random_tokens(T, batch=4)

    def gradients(part):
        """Of one micro-batch: cross entropy, z-losses and balance losses."""
        output = model(tokens[part], targets[part])
        z = sum(routing.z_loss for routing in output.routing)
        balance = sum(routing.balance_loss for routing in output.routing)
        return [gradients_of(loss, model) for loss in (output.cross_entropy, z, balance)], output

    (*whole, balance), output = gradients(slice(0, 4))
    (*first, one), half = gradients(slice(0, 2))
    (*second, two), rest = gradients(slice(2, 4))
    for total, own, other in zip(whole, first, second, strict=True):
        assert_same(total, {name: (own[name] + other[name]) / 2 for name in own})
    # Loads average over micro-batches; a product of means does not.
    for total, own, other in zip(output.routing, half.routing, rest.routing, strict=True):
        assert_equal_to(total.load, (own.load + other.load) / 2)
    assert any(not torch.allclose(balance[name], (one[name] + two[name]) / 2) for name in balance)


def unbalanced(vocab=101, **settings):
    """A one-layer model whose router sends nearly all tokens to one of its four routed heads."""
    shape = {"d_model": 30, "num_heads": 5, "num_layers": 1, "d_ff": 11, **OLD.model}
    model = LanguageModel(TransformerConfig(vocab, **shape, head_graph=HeadGraphConfig.moh(1, 1, **settings)))
    attention = model.decoder.layers[0].attention
    router = attention.object.router
    with torch.no_grad():
        model.embedding.tokens.weight.normal_()
        common = attention.norm.bias.normal_()
        router.routed.normal_(std=0.2)
        router.routed[2] += 2 * common / common.square().sum()
    return model, router


def variation(loads):
    """Coefficient of variation of the routed heads' load."""
    load = torch.stack(loads).mean(dim=0)[1:]
    return (load.std(correction=0) / load.mean()).item()


@pytest.mark.parametrize("settings", [{"balance_loss": 0.1}, {"bias_rate": 0.005, "balance_loss": 0.0}], ids=str)
def test_training_balances_the_load(settings):
    model, router = unbalanced(**settings)
    loads = train(model, router, steps=200)
    assert variation(loads[:1]) > 1 and variation(loads[-50:]) < 0.3


def test_without_balance_loss_or_bias_the_load_stays_unbalanced():
    model, router = unbalanced(balance_loss=0.0)
    assert variation(train(model, router, steps=200)[-50:]) > 1


def train(model, router, steps):
    """Predicts the token after next; returns the loads of all steps."""
    optimizer, loads = torch.optim.Adam(model.parameters(), lr=3e-3), []
    for _ in range(steps):
        tokens = torch.randint(model.config.vocab_size, (8, 23))
        output = model(tokens, tokens.roll(-1, 1))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        loads.append(output.routing[0].load)
        if router.balance_bias is not None:
            router.update_balance_bias(loads[-1])
    return loads


@pytest.mark.compiles
@pytest.mark.slow
def test_a_routed_attention_compiles_to_one_graph():
    graphs = HeadGraphConfig(SiteConfig.ring(3, top_edges=2), SiteConfig.ring(2), RoutingConfig(2, 2))
    model = trained_like(LanguageModel(with_graphs(graphs, num_layers=1))).float().train()
    attention = model.decoder.layers[0].attention.object
    x, mask = torch.randn(2, T, 30), torch.arange(T) < torch.tensor([[T], [3]])

    def run(module):
        y, heads = module(x, token_mask=mask)
        routing = heads.routing
        loss = y.square().sum() + routing.balance_loss + routing.z_loss
        return [y, *routing, *torch.autograd.grad(loss, list(attention.parameters()))]

    for own, expected in zip(run(compiled(attention)), run(attention), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_statistics_are_those_of_all_ranks():
    run_ranks(2, statistics_of_all_ranks)
