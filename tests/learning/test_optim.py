"""What is decayed, and checkpoints of versions that decayed opponents and routers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import small_config

import gohgraph as goh
from gohgraph.graphs.edge_graph import EdgeGraph
from gohgraph.graphs.protocol import Traits
from gohgraph.learning.optim import make_optimizer, parameter_groups, regroup_as_saved
from gohgraph.learning.train_config import TrainConfig

CONFIG = TrainConfig(steps=10, optimizer="adamw", learning_rate=0.01, graph_lr_factor=0.5)
SITES = {
    "graph": goh.HeadGraphConfig(),
    "gate": goh.HeadGraphConfig(goh.BaselineConfig("gate")),
    "norm": goh.HeadGraphConfig(goh.BaselineConfig("norm")),
    "dcmha": goh.HeadGraphConfig(None, goh.BaselineConfig("composition")),
    "chain": goh.HeadGraphConfig((goh.BaselineConfig("norm"), goh.SiteConfig())),
    "router": goh.HeadGraphConfig.moh(2, 2),
}


def model_of(name):
    return goh.LanguageModel(dataclasses.replace(small_config(), head_graph=SITES[name]))


def decays(model):
    groups = parameter_groups(model, CONFIG)
    return {id(p): (group["weight_decay"], group["lr"]) for group in groups for p in group["params"]}


@pytest.mark.parametrize("name", SITES)
def test_whatever_stands_at_a_site_is_treated_alike(name):
    model = model_of(name)
    found = decays(model)
    assert len(found) == len(list(model.parameters()))
    for key, parameter in model.named_parameters():
        at_a_site = "_graph" in key or ".router." in key
        expected = (0.0, 0.005) if at_a_site else (0.1 if parameter.dim() > 1 else 0.0, 0.01)
        assert found[id(parameter)] == expected, key


def test_a_graph_whose_traits_ask_for_it_is_decayed():
    model = model_of("gate")
    gate = model.decoder.layers[0].attention.object.output_graph
    gate.traits = Traits(5, gate.traits.sites, weight_decay=True)
    found = decays(model)
    others = [layer.attention.object.output_graph.weight for layer in model.decoder.layers[1:]]
    assert found[id(gate.weight)] == (0.1, 0.005) and all(found[id(weight)] == (0.0, 0.005) for weight in others)


def stepped(model, optimizer):
    tokens = torch.arange(12).reshape(2, 6)
    model(tokens, targets=tokens).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("name", ["gate", "router", "chain", "graph"])
def test_a_checkpoint_of_a_former_version_goes_on_as_it_began(tmp_path, name):
    former, device = model_of(name), torch.device("cpu")
    groups = parameter_groups(former, CONFIG, (EdgeGraph,))
    assert {group["name"] for group in groups} <= {"matrices", "vectors", "head graphs"}
    optimizer = torch.optim.AdamW(groups, lr=CONFIG.learning_rate, betas=CONFIG.betas)
    stepped(former, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.bin")
    resumed = model_of(name)
    resumed.load_state_dict(former.state_dict())
    other = make_optimizer(resumed, CONFIG, device)
    regroup_as_saved(other, resumed, CONFIG, tmp_path / "optimizer.bin")
    other.load_state_dict(torch.load(tmp_path / "optimizer.bin"))
    for one, its_optimizer in ((former, optimizer), (resumed, other)):
        its_optimizer.zero_grad()
        stepped(one, its_optimizer)
    for a, b in zip(former.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_checkpoint_of_this_version_keeps_its_groups(tmp_path):
    model = model_of("router")
    optimizer = make_optimizer(model, CONFIG, torch.device("cpu"))
    stepped(model, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.bin")
    groups = list(optimizer.param_groups)
    regroup_as_saved(optimizer, model, CONFIG, tmp_path / "optimizer.bin")
    assert optimizer.param_groups == groups
