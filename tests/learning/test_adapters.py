"""Low-rank updates, and adapters of tasks over a shared model."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_equal_to, small_config, trained_like
from torch import nn

from gohgraph import HeadGraphConfig, LanguageModel, SiteConfig
from gohgraph.learning.contests.matching import count_parameters
from gohgraph.learning.optim import parameter_groups
from gohgraph.learning.regimes.adapters import TaskAdapters
from gohgraph.learning.regimes.low_rank import ATTENTION, LowRankUpdate, add_low_rank, matching_rank
from gohgraph.learning.train_config import TrainConfig

TOKENS = torch.randint(13, (3, 7), generator=torch.Generator().manual_seed(1))


def model(graph: str = "outputs", low_rank: bool = False, **settings) -> LanguageModel:
    made = LanguageModel(small_config(graph, **settings)).double()
    if low_rank:
        add_low_rank(made, rank=2, alpha=6)
    return made


def random_adapters(adapters: TaskAdapters) -> TaskAdapters:
    with torch.no_grad():
        for parameter in adapters.tasks.parameters():
            parameter.normal_(std=0.3)
    return adapters


def test_a_new_update_changes_nothing_and_a_trained_one_is_its_formula():
    network = model("plain")
    before = network(TOKENS).logits
    names = add_low_rank(network, rank=2, alpha=6, targets=ATTENTION)
    assert len(names) == 3 * 4 and torch.equal(network(TOKENS).logits, before)
    layer = network.get_submodule(names[0])
    update = layer.parametrizations.weight[0]
    nn.init.normal_(update.lora_B)
    x = torch.randn(5, 30, dtype=torch.float64)
    path = F.linear(F.linear(x, update.lora_A), update.lora_B) * (6 / 2)
    assert_equal_to(layer(x), F.linear(x, layer.parametrizations.weight.original, layer.bias) + path)
    copied = model("plain")
    add_low_rank(copied, rank=2, alpha=6, targets=ATTENTION)
    copied.load_state_dict(network.state_dict())
    assert torch.equal(copied(TOKENS).logits, network(TOKENS).logits)


def test_ranks_match_a_count():
    network = model("plain")
    rank = matching_rank(network, 5000)
    before = count_parameters(network)
    add_low_rank(network, rank)
    one = count_parameters(network) - before
    assert abs(one - 5000) <= one // rank
    with pytest.raises(ValueError, match=r"without an update \(got \['"):
        add_low_rank(network, rank)
    with pytest.raises(ValueError, match="linear layers named"):
        add_low_rank(nn.Linear(3, 5), 2)
    with pytest.raises(ValueError, match="rank to be an int >= 1"):
        LowRankUpdate(3, 5, rank=0)


@pytest.mark.parametrize("graph, low_rank", [("outputs", False), ("plain", True), ("outputs", True), ("rounds", False)])
def test_every_task_begins_as_the_shared_model(graph, low_rank):
    shared = model(graph, low_rank)
    expected = shared(TOKENS).logits
    adapters = TaskAdapters(shared, num_tasks=3)
    for task in range(3):
        assert torch.equal(adapters(TOKENS, task=task).logits, expected)
    owned = sum(p.numel() for name, p in shared.named_parameters() if "graph" in name or "lora" in name)
    assert adapters.size() == owned and count_parameters(adapters) == 3 * owned


@pytest.mark.parametrize("graph, low_rank", [("outputs", False), ("outputs", True), ("scores-ring", False)])
def test_a_task_is_a_model_with_its_parameters_in_value_and_gradient(graph, low_rank):
    shared = trained_like(model(graph, low_rank))
    adapters = random_adapters(TaskAdapters(shared, num_tasks=2, frozen=False))
    alone = copy.deepcopy(shared).requires_grad_(True)
    alone.load_state_dict({**alone.state_dict(), **adapters.parameters_of(1)})
    targets = TOKENS.roll(1)
    one, other = adapters(TOKENS, targets=targets, task=1).loss, alone(TOKENS, targets=targets).loss
    assert_equal_to(one, other)
    one.backward()
    other.backward()
    own, gradients = adapters.parameters_of(1), {n: p.grad for n, p in alone.named_parameters()}
    for name, parameter in shared.named_parameters():
        if name in own:
            assert parameter.grad is None and not parameter.requires_grad
        assert_equal_to(own[name].grad if name in own else parameter.grad, gradients[name])
    assert all(parameter.grad is None for parameter in adapters.tasks[0].parameters())


def test_training_one_task_leaves_all_else_as_it_was():
    adapters = TaskAdapters(model(low_rank=True), num_tasks=3)
    before = copy.deepcopy(adapters.state_dict())
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        adapters(TOKENS, targets=TOKENS, task=1).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, value in adapters.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("tasks.1.") for name in changed)
    again = TaskAdapters(model(low_rank=True), num_tasks=3)
    again.load_state_dict(adapters.state_dict())
    assert torch.equal(again(TOKENS, task=1).logits, adapters(TOKENS, task=1).logits)


def test_head_graphs_of_tasks_are_not_decayed():
    groups = parameter_groups(TaskAdapters(model(), num_tasks=2), TrainConfig(steps=1))
    assert [group["name"] for group in groups] == ["head graphs"]


def test_a_read_out_of_its_own_and_tied_ones():
    untied = TaskAdapters(model("plain", tie_embeddings=False), num_tasks=2, names=["head"], types=())
    assert untied.size() == 13 * 30
    shared = nn.ModuleDict({"first": nn.Linear(3, 3), "second": nn.Linear(3, 3)})
    shared["second"].weight = shared["first"].weight
    with pytest.raises(ValueError, match="Do untie them"):
        TaskAdapters(shared, num_tasks=2, names=["first"], types=())


@pytest.mark.parametrize("more, message", [({}, "modules that tasks can own"), ({"names": ["nose"]}, "nose")])
def test_models_without_adapters_are_refused(more, message):
    with pytest.raises(ValueError, match=message):
        TaskAdapters(model("plain"), num_tasks=2, **more)
    with pytest.raises(ValueError, match="num_tasks to be an int >= 1"):
        TaskAdapters(model(), num_tasks=0)
    with pytest.raises(ValueError, match="task of 0..1"):
        TaskAdapters(model(), num_tasks=2)(TOKENS, task=2)


def test_the_task_is_inferred_by_likelihood():
    adapters = random_adapters(TaskAdapters(trained_like(model()), num_tasks=4))
    losses = torch.stack(
        [
            torch.stack([adapters(row[None, :-1], targets=row[None, 1:], task=task).loss for row in TOKENS])
            for task in range(4)
        ]
    )
    assert torch.equal(adapters.infer_task(TOKENS), losses.argmin(dim=0))


def test_random_graphs_are_shared_by_all_tasks():
    graph = HeadGraphConfig(SiteConfig("random", {"in_degree": 2}))
    adapters = TaskAdapters(LanguageModel(small_config().__class__(13, d_model=30, num_heads=5, d_ff=11, num_layers=2,
                                                                   head_graph=graph)), num_tasks=2)  # fmt: skip
    edges = [
        [buffer.tolist() for name, buffer in task.named_buffers() if name.endswith("edge_index")]
        for task in adapters.tasks
    ]
    assert edges[0] == edges[1] and len(edges[0]) == 2


def test_low_rank_updates_are_those_of_peft():
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    own = nn.ModuleDict({"query": nn.Linear(7, 5), "value": nn.Linear(7, 3)})
    theirs = inject_adapter_in_model(LoraConfig(r=2, lora_alpha=3, target_modules=["query"]), copy.deepcopy(own))
    add_low_rank(own, 2, alpha=3, targets=["query"])
    update, layer = own["query"].parametrizations.weight[0], theirs["query"]
    with torch.no_grad():
        for mine, other in ((update.lora_A, layer.lora_A), (update.lora_B, layer.lora_B)):
            mine.copy_(other["default"].weight.normal_())
    x = torch.randn(11, 7)
    torch.testing.assert_close(own["query"](x), theirs["query"](x))
    (own["query"](x).square().sum() + theirs["query"](x).square().sum()).backward()
    torch.testing.assert_close(update.lora_A.grad, layer.lora_A["default"].weight.grad)
    torch.testing.assert_close(update.lora_B.grad, layer.lora_B["default"].weight.grad)
