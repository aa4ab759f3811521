"""Learned topologies: what is pruned, what stays, and training that prunes."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from helpers import assert_equal_to, trained_like

import gohgraph as goh
from gohgraph.graphs.learned_topology import LearnedTopologyConv
from gohgraph.learning.loop import TrainConfig, train
from gohgraph.learning.regimes.language import next_token_output

B, T, H, D, M = 2, 7, 5, 3, 11


def conv(topology="complete", in_degree=2, **options):
    return LearnedTopologyConv(goh.head_graph(H, topology), D, M, in_degree, **options)


def nodes():
    return torch.randn(B, T, H, D).double(), torch.randn(B, T, M).double()


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("topology", ["complete", "star"])
def test_pruned_equals_a_graph_without_those_edges(topology, rounds):
    graph, (z, x) = trained_like(conv(topology, rounds=rounds)).eval(), nodes()
    graph.strength.copy_(torch.rand(graph.edges.num_edges))
    graph.prune(2)
    small = goh.HeadGraphConv(graph.topology(), D, M, rounds=rounds).double()
    state = {name: value for name, value in graph.state_dict().items() if name not in ("kept", "strength")}
    kept = graph.kept
    state["edges.bias"], state["edges.weight"] = state["edges.bias"][:, kept], state["edges.weight"][:, kept]
    small.load_state_dict({**state, "edge_index": graph.topology().edge_index})
    assert_equal_to(graph(z, x), small(z, x))


def test_the_strongest_incoming_edges_stay():
    graph = conv()
    graph.strength.copy_(torch.arange(H * H).flip(0).float().view(H, H).t().flatten())
    graph.prune(2)
    # Rows receive: the strength of sender j falls with j.
    assert graph.kept.view(H, H).nonzero()[:, 1].tolist() == [0, 1] * H
    graph.strength.copy_(torch.arange(H * H).float())
    graph.prune(3)
    assert graph.kept.sum() == 2 * H, "no edge comes back"
    graph.prune(1)
    assert torch.equal(graph.topology().edge_index, torch.tensor([[1] * H, list(range(H))]))


def test_strength_is_the_running_mean_of_weights_in_training():
    graph, (z, x) = trained_like(conv(rounds=2)), nodes()
    expected = torch.zeros(H * H).double()
    for scale in (1.0, 2.0):
        graph.train()(z, scale * x)
        alpha = torch.stack([graph.edge_weight(scale * x, r) for r in (0, 1)])
        graph.strength.copy_(expected)
        expected = expected + 0.01 * (alpha.abs().mean(dim=(0, 1, 2)) - expected)
        graph(z, scale * x)
        assert_equal_to(graph.strength, expected)
    graph.eval()(z, x)
    assert_equal_to(graph.strength, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_graph_changes_nothing(dtype):
    z, x = (tensor.to(dtype) for tensor in nodes())
    assert torch.equal(conv().to(dtype)(z, x), z)


def test_pruned_edges_get_no_gradient():
    graph, (z, x) = trained_like(conv()), nodes()
    graph(z, x)
    graph.prune(2)
    graph(z, x).square().sum().backward()
    gradient = graph.edges.weight.grad.abs().sum(dim=(0, 2))
    assert torch.equal(gradient > 0, graph.kept)


def model():
    torch.manual_seed(0)
    sites = [goh.SiteConfig(kind="learned", keep_in_degree=budget) for budget in (2, 1)]
    graphs = goh.HeadGraphConfig(*sites)
    shape = {"num_layers": 2, "d_ff": 7, "positions": "none"}
    return goh.LanguageModel(goh.TransformerConfig(13, 20, 5, **shape, head_graph=graphs))


def batch(step):
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(13, (3, 8), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def run(folder, steps=8, own=None, **settings):
    own = own or model()
    config = TrainConfig(steps=8, anneal_in_degree=6, device="cpu", log_every=1, checkpoint_every=4, **settings)
    data = batch if steps == 8 else partial(_interrupted, steps)
    log = train(own, data, next_token_output, config, folder, resume=(folder / "config.json").exists())
    return own, [row["loss"] for row in log]


def _interrupted(steps, step):
    if step >= steps:
        raise KeyboardInterrupt
    return batch(step)


def test_training_prunes_every_graph_to_its_budget(tmp_path):
    own, _ = run(tmp_path / "run")
    graphs = [module for module in own.modules() if isinstance(module, LearnedTopologyConv)]
    degrees = [torch.bincount(graph.topology().edge_index[1], minlength=5).tolist() for graph in graphs]
    # Modules in order: outputs, then scores, in each layer.
    assert degrees == [[2] * 5, [1] * 5] * 2
    own.save_pretrained(tmp_path / "model")
    again = goh.LanguageModel.from_pretrained(tmp_path / "model")
    tokens = batch(0)[0]
    assert torch.equal(again.eval()(tokens).logits, own.eval()(tokens).logits)


def test_resumed_training_prunes_the_same_edges(tmp_path):
    whole, losses = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", steps=5)
    resumed, again = run(tmp_path / "parts")
    assert again == losses
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_annealing_needs_learned_topologies(tmp_path):
    plain = goh.LanguageModel(goh.TransformerConfig(13, 20, 5, num_layers=1, d_ff=7, positions="none"))
    with pytest.raises(ValueError, match="Expected learned topologies"):
        run(tmp_path / "run", own=plain)
    with pytest.raises(ValueError, match="Expected in_degree to be an int >= 1"):
        conv(in_degree=0)
    with pytest.raises(ValueError, match="Expected keep_in_degree with kind='learned' and only there"):
        goh.SiteConfig(keep_in_degree=2, kind="keyed")


def test_the_configuration_survives_json():
    config = goh.HeadGraphConfig(goh.SiteConfig(kind="learned", keep_in_degree=3))
    assert goh.HeadGraphConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
