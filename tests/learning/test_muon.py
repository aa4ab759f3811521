"""Muon: its steps, its state, and what it trains."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from helpers import small_config, with_graphs
from torch import nn

import gohgraph as goh
from gohgraph.learning.muon import Muon, MuonWithAdamW, orthogonalized
from gohgraph.learning.optim import make_optimizer, parameter_groups
from gohgraph.learning.regimes.low_rank import add_low_rank
from gohgraph.learning.train_config import TrainConfig
from gohgraph.models.streams import DenseConnection, StreamWeights

CONFIG = TrainConfig(steps=10, optimizer="muon", learning_rate=0.01, matrix_learning_rate=0.03, graph_lr_factor=0.5)
SHAPES = [(5, 7), (7, 5), (7, 5), (5, 5), (1, 3)]


def reference(weight, gradient, momentum, *, lr, decay, mu=0.95):
    """One step of one matrix, term by term."""
    momentum = mu * momentum + (1 - mu) * gradient
    x = (1 - mu) * gradient + mu * momentum
    x = x / x.square().sum().sqrt()
    for _ in range(5):
        gram = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x
        inner = -4.7750 * gram + 2.0315 * gram @ gram
        x = 3.4445 * x + (inner @ x if x.shape[0] <= x.shape[1] else x @ inner)
    scale = max(1, weight.shape[0] / weight.shape[1]) ** 0.5
    return weight * (1 - lr * decay) - lr * scale * x, momentum


def test_steps_follow_the_equation():
    weights = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    expected = [(weight.detach().double(), torch.zeros(weight.shape, dtype=torch.float64)) for weight in weights]
    optimizer = Muon(weights, lr=0.05, weight_decay=0.2)
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        gradients = [weight.grad.double() for weight in weights]
        optimizer.step()
        expected = [
            reference(weight, gradient, momentum, lr=0.05, decay=0.2)
            for (weight, momentum), gradient in zip(expected, gradients, strict=True)
        ]
        for weight, (value, _) in zip(weights, expected, strict=True):
            torch.testing.assert_close(weight.double(), value, rtol=0, atol=1e-5)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has had it since 2.9")
def test_steps_are_those_of_torch_to_the_precision_of_bfloat16():
    weights = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    others = copy.deepcopy(weights)
    options = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.95}
    own, torchs = Muon(weights, **options), torch.optim.Muon(others, adjust_lr_fn="original", **options)
    for weight, other in zip(weights, others, strict=True):
        weight.grad = torch.randn_like(weight)
        other.grad = weight.grad.clone()
    own.step(), torchs.step()
    for weight, other in zip(weights, others, strict=True):
        torch.testing.assert_close(weight, other, rtol=0, atol=0.02)


def test_singular_values_come_near_one():
    values = torch.linalg.svdvals(orthogonalized(torch.randn(3, 31, 17)))
    assert values.min() > 0.5 and values.max() < 1.3


def test_a_stack_moves_as_its_matrices():
    stack = nn.Parameter(torch.randn(2, 5, 3))
    alone = [nn.Parameter(part.detach().clone()) for part in stack]
    one, other = Muon([stack], lr=0.05, weight_decay=0.2), Muon(alone, lr=0.05, weight_decay=0.2)
    for _ in range(2):
        stack.grad = torch.randn_like(stack)
        for part, gradient in zip(alone, stack.grad, strict=True):
            part.grad = gradient.clone()
        one.step(), other.step()
        torch.testing.assert_close(stack, torch.stack(tuple(alone)), rtol=0, atol=1e-6)


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match=r"Expected matrices for Muon .got a parameter of shape \[3\]"):
        Muon([nn.Parameter(torch.zeros(3))])


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_inside_layers_are_muons(tied):
    model = goh.LanguageModel(small_config("moh-outputs", tie_embeddings=tied, positions="learned"))
    groups = {group["name"]: group for group in parameter_groups(model, CONFIG)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    members = {kind: {names[id(p)] for p in group["params"]} for kind, group in groups.items()}
    assert sum(map(len, members.values())) == len(names)
    assert members["embeddings"] == {"embedding.tokens.weight", "embedding.positions.weight"} | (
        set() if tied else {"head.weight"}
    )
    ends = ("query.weight", "key.weight", "value.weight", "output.weight", "inner.weight", "outer.weight")
    assert members["matrices"] == {name for name in names.values() if name.endswith(ends) and "graph" not in name}
    assert {kind: group["lr"] for kind, group in groups.items()} == {
        "matrices": 0.03, "embeddings": 0.01, "vectors": 0.01, "head graphs": 0.005
    }  # fmt: skip


def test_matrices_of_graphs_are_muons_where_they_have_a_rate_of_its():
    """Biases and gains, two dimensions though they have, and routers stay with AdamW."""
    low_rank, gate = goh.SiteConfig(rank=2, norm=True, rounds=2), goh.BaselineConfig("gate")
    graphs = goh.HeadGraphConfig((low_rank, gate), routing=goh.RoutingConfig(2, 2))
    model = goh.LanguageModel(with_graphs(graphs, num_layers=1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    with_rate = dataclasses.replace(CONFIG, graph_matrix_lr_factor=0.25)
    groups = {group["name"]: group for group in parameter_groups(model, with_rate)}
    ends = {kind: {names[id(p)].split("object.")[-1] for p in groups[kind]["params"]} for kind in groups}
    site = "output_graph."
    assert ends["matrices of graphs"] == {f"{site}0.edges.weight", f"{site}0.edges.down", f"{site}1.weight"}
    assert {f"{site}0.edges.bias", f"{site}0.gain"} < ends["head graphs"]
    assert any("router" in name for name in ends["head graphs"])
    assert groups["matrices of graphs"]["lr"] == 0.0075 and groups["matrices of graphs"]["weight_decay"] == 0
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained(model, *optimizer_of(model, with_rate), range(2))
    assert not any(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_low_rank_updates_count_as_vectors():
    model = goh.LanguageModel(small_config("plain", num_layers=1))
    add_low_rank(model, 2)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {group["name"]: group for group in parameter_groups(model, CONFIG)}
    members = {kind: {names[id(p)] for p in group["params"]} for kind, group in groups.items()}
    updates = {name for name in names.values() if "lora" in name}
    assert updates and updates <= members["vectors"]
    assert groups["vectors"]["lr"] == CONFIG.learning_rate and groups["vectors"]["weight_decay"] == 0


def test_a_rate_of_muons_needs_muon():
    with pytest.raises(ValueError, match="Expected optimizer 'muon' with graph_matrix_lr_factor.* .got 'adamw'"):
        TrainConfig(steps=1, optimizer="adamw", graph_matrix_lr_factor=0.25)


@pytest.mark.parametrize("residual", ["hyper", "dynamic-hyper", "dense"])
def test_residual_paths_count_as_vectors(residual):
    model = goh.LanguageModel(small_config(residual=residual))
    groups = {group["name"]: group for group in parameter_groups(model, CONFIG)}
    parts = (DenseConnection, StreamWeights)
    own = {id(p) for part in model.modules() if isinstance(part, parts) for p in part.parameters()}
    assert own and own <= {id(p) for p in groups["vectors"]["params"]} and groups["vectors"]["weight_decay"] == 0


def test_factors_of_graphs_multiply():
    quick, slow = goh.SiteConfig(edges="static", learning_rate_factor=7.0), goh.SiteConfig(learning_rate_factor=0.5)
    model = goh.LanguageModel(with_graphs(goh.HeadGraphConfig((quick, goh.SiteConfig()), values=slow)))
    rates = {}
    for group in parameter_groups(model, CONFIG):
        rates |= {id(parameter): group["lr"] for parameter in group["params"]}
    for layer in model.decoder.layers:
        attention = layer.attention.object
        graphs = (*attention.output_graph.children(), attention.inner_graphs["value"])
        graphs = [part for graph in graphs for part in graph.modules() if isinstance(part, goh.HeadGraphConv)]
        found = [{rates[id(parameter)] for parameter in graph.parameters()} for graph in graphs]
        assert found == [{0.035}, {0.005}, {0.0025}]


def trained(model, optimizer, schedule, steps):
    for step in steps:
        tokens = torch.randint(13, (2, 7), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(tokens, targets=tokens).loss.backward()
        optimizer.step()
        schedule.step()


def optimizer_of(model, config):
    optimizer = make_optimizer(model, config, torch.device("cpu"))
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, config.learning_rate_factor)


@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(CONFIG, graph_matrix_lr_factor=0.5)])
def test_a_saved_state_goes_on_as_if_it_had_never_stopped(config):
    def begun():
        torch.manual_seed(0)
        model = goh.LanguageModel(small_config("outputs"))
        return model, *optimizer_of(model, config)

    whole, first, second = begun(), begun(), begun()
    trained(*whole, range(5))
    trained(*first, range(2))
    for one, other in zip(first, second, strict=True):
        other.load_state_dict(copy.deepcopy(one.state_dict()))
    trained(*second, range(2, 5))
    assert isinstance(second[1], MuonWithAdamW)
    for a, b in zip(whole[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)
