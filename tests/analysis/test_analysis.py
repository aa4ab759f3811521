from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import GRAPHS, assert_equal_to, small_config, trained_like
from scipy.stats import spearmanr

import gohgraph as goh
from gohgraph.analysis import (
    edge_ablation,
    edge_attribution,
    edge_strength,
    head_importance,
    measures,
    rank_agreement,
)
from gohgraph.analysis.record import head_graphs
from gohgraph.analysis.running_stats import Moments

WITH_GRAPHS = [name for name in GRAPHS if name not in ("plain", "moh")]
# Where a token's choice of edges or heads does not jump with the weight of an edge.
SMOOTH = [name for name in WITH_GRAPHS if name not in ("top-edges", "moh-outputs", "experts")]


def language_model(graph="outputs", scale=1.0, **settings):
    model = trained_like(goh.LanguageModel(small_config(graph, num_layers=2, **settings))).eval()
    with torch.no_grad():
        for conv in (module for module in model.modules() if isinstance(module, goh.HeadGraphConv)):
            conv.edges.bias *= scale
    return model


def batches(count=2, size=3):
    return [torch.randint(0, 13, (size, 8)) for _ in range(count)]


def loss(model, tokens):
    return model(tokens[:, :-1], targets=tokens[:, 1:])


def mean_loss(model, data):
    with torch.no_grad():
        return sum(loss(model, tokens).cross_entropy.item() for tokens in data) / len(data)


def hooks_left(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def a_recording(num_heads, edges, weights):
    """A recording of weights `[N, R, E]` over a graph of the given edges."""
    graph = goh.head_graph(num_heads, edges, self_loops=False)
    conv = goh.HeadGraphConv(graph, head_dim=2, context_dim=3, rounds=weights.shape[1])
    with goh.record(conv) as heads:
        pass
    (recording,) = heads.values()
    recording.update(weights)
    return recording


def test_measures_by_hand():
    edges = [(0, 0), (1, 0), (2, 0), (0, 1), (3, 2)]
    weights = torch.tensor([[[9.0, 3.0, 4.0, 1.0, -2.0]], [[9.0, 3.0, 4.0, 1.0, 2.0]]])
    found = measures({"graph": a_recording(4, edges, weights)})["graph"]
    squares = 81 + 9 + 16 + 1
    assert found.static_share == pytest.approx(squares / (squares + 4))
    assert found.degree.tolist() == pytest.approx([49 / 25, 1, 1, 0])
    assert found.received.tolist() == pytest.approx([7, 1, 2, 0]) and found.sent.tolist() == pytest.approx([1, 3, 4, 2])
    assert found.reciprocity == pytest.approx(2 * 1 / 10)
    assert found.hubs == [2]


def test_communities_and_hubs_of_two_groups():
    edges = [(j, i) for j in range(7) for i in range(7) if i != j and (j < 4) == (i < 4)] + [(0, 5)]
    weights = torch.full((1, 1, len(edges)), 0.5)
    weights[..., -1] = 0.01
    found = measures({"graph": a_recording(7, edges, weights)})["graph"]
    assert found.communities == [[0, 1, 2, 3], [4, 5, 6]] and found.static_share == 1


def test_measures_of_graphs_without_weights_or_edges():
    for edges in ([(0, 1)], []):
        found = measures({"graph": a_recording(3, edges, torch.zeros(2, 1, len(edges)))})["graph"]
        assert math.isnan(found.static_share) and math.isnan(found.reciprocity)
        assert found.hubs == [] and found.degree.tolist() == [0, 0, 0]


@torch.no_grad()
def test_static_edges_are_static_and_token_edges_are_not():
    for graph, low, high in (("outputs-static", 1.0, 1.0), ("outputs", 0.01, 0.99), ("cross-layer", 0.01, 0.99)):
        model = language_model(graph)
        with goh.record(model) as heads:
            model(torch.randint(0, 13, (2, 11)))
        for found in measures(heads).values():
            assert low <= found.static_share <= high and (found.degree <= 10 + 1e-9).all()


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_moments_of_empty_and_bare_samples(shape):
    moments, values = Moments((5, 2)), torch.randn(*shape, 5, 2).double()
    moments.update(values)
    flat = values.reshape(-1, 5, 2)
    torch.testing.assert_close(moments.mean, flat.mean(0))
    torch.testing.assert_close(moments.rms, flat.square().mean(0).sqrt())
    empty = Moments((5, 0))
    empty.update(torch.zeros(*shape, 5, 0))
    assert empty.count == len(flat)


@pytest.mark.parametrize("graph", ["plain", "outputs", "scores-ring", "scores-complete", "moh-outputs"])
def test_head_importance_is_the_slope_along_a_head(graph):
    model, data = language_model(graph), batches()
    found = head_importance(model, loss, data)
    assert hooks_left(model) == 0 and all(parameter.grad is None for parameter in model.parameters())
    for name, importance in found.items():
        output = model.get_submodule(name).output
        weight = output.weight.detach().clone()
        for head in range(5):
            slopes, step = [], 1e-5
            for sequence in (sequence for tokens in data for sequence in tokens.split(1)):
                ends = []
                for factor in (1 + step, 1 - step):
                    # The mask on a head is a factor of its columns of the output projection.
                    with torch.no_grad():
                        output.weight.copy_(weight)
                        output.weight[:, head * 6 : head * 6 + 6] *= factor
                    ends.append(mean_loss(model, [sequence]))
                slopes.append(abs(ends[0] - ends[1]) / (2 * step))
            with torch.no_grad():
                output.weight.copy_(weight)
            assert importance[head].item() == pytest.approx(sum(slopes) / len(slopes), abs=1e-8)


def test_head_importance_of_a_foreign_block():
    class Foreign(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.output_graph = trained_like(goh.HeadGraphConv(goh.head_graph(5), 3, 15))

        def forward(self, x):
            return self.output_graph(x.unflatten(-1, (5, 3)), x).flatten(-2)

    x = torch.randn(2, 7, 15).double()
    model = Foreign()
    found = head_importance(model, lambda model, x: model(x).square().mean(), [x])
    expected = 2 * model(x).unflatten(-1, (5, 3)).square().sum(dim=(1, 3)).mean(0) / (7 * 15)
    assert_equal_to(found[""], expected.detach())
    with pytest.raises(ValueError, match="Expected attention with a known output projection"):
        head_importance(torch.nn.Linear(2, 2), lambda model, x: model(x).sum(), [torch.randn(1, 2)])


@pytest.mark.parametrize("graph", WITH_GRAPHS)
def test_ablation_is_the_loss_without_the_edge(graph):
    model, data = language_model(graph), batches(1)
    effects = edge_ablation(model, loss, data, sample=6)
    assert hooks_left(model) == 0
    measured = [(name, e) for name, values in effects.items() for e in (~values.isnan()).nonzero().flatten().tolist()]
    assert len(measured) == 6
    base = mean_loss(model, data)
    for name, e in measured:
        scores = {graph: torch.ones(len(values)) for graph, values in effects.items()}
        scores[name][e] = 0
        total = sum(map(len, scores.values()))
        alone = goh.prune(model, (total - 1) / total, scores)
        assert sum(conv.edges.num_edges for conv in head_graphs(alone).values()) == total - 1
        assert effects[name][e].item() == pytest.approx(mean_loss(alone, data) - base, abs=1e-10)


@pytest.mark.parametrize("replace, at", [("zero", 0.0), ("zero", 0.5), ("mean", 0.0), ("mean", 0.3)])
@pytest.mark.parametrize("graph", SMOOTH)
def test_attribution_is_the_slope_on_the_way_to_ablation(graph, replace, at):
    model, data = language_model(graph), batches(2)
    found = edge_attribution(model, loss, data, replace=replace, at=at)
    assert hooks_left(model) == 0 and all(parameter.grad is None for parameter in model.parameters())
    means = {}
    with goh.record(model) as heads:
        mean_loss(model, data)
    for name, recording in heads.items():
        means[name] = recording.mean if replace == "mean" else torch.zeros_like(recording.mean)
    for name, conv in head_graphs(model).items():
        for e in (0, conv.edges.num_edges - 1):
            ends = [mean_loss_on_the_way(model, data, means, at, name, e, step) for step in (1e-5, -1e-5)]
            assert found[name][e].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=1e-6)


def mean_loss_on_the_way(model, data, means, at, name, e, step):
    """The loss where all edges are a part of the way to their means, and edge e of one graph is a step further."""
    hooks = []
    for other, conv in head_graphs(model).items():
        part = torch.full((conv.edges.num_edges,), at).double()
        if other == name:
            part[e] += step

        def moved(module, inputs, alpha, part=part, mean=means[other]):
            return alpha + part * (mean - alpha)

        hooks.append(conv.edges.register_forward_hook(moved))
    try:
        return mean_loss(model, data)
    finally:
        for hook in hooks:
            hook.remove()


def test_static_edges_lose_nothing_to_their_mean():
    model, data = language_model("outputs-static"), batches(1)
    # Replacements are float32.
    for measure in (edge_ablation, edge_attribution):
        effects = measure(model, loss, data, replace="mean")
        assert all(values.abs().max() < 1e-7 for values in effects.values())


def test_weak_edges_are_attributed_what_ablation_measures():
    model, data = language_model("outputs", scale=1e-4), batches(2)
    with torch.no_grad():
        for conv in head_graphs(model).values():
            conv.edges.weight *= 1e-4
    measured, estimated = edge_ablation(model, loss, data), edge_attribution(model, loss, data, at=0)
    for name in measured:
        torch.testing.assert_close(estimated[name], measured[name], rtol=0.05, atol=1e-6)
    assert rank_agreement(estimated, measured) > 0.99


def test_rank_agreement_is_spearmans_rank_correlation():
    first = {"a": torch.tensor([0.3, 0.3, 0.1, 0.9, 0.5]), "b": torch.tensor([0.2, 0.3])}
    second = {"a": torch.tensor([1.0, 2.0, math.nan, 5.0, 5.0]), "b": torch.tensor([0.0, 1.0])}
    x, y = torch.cat([*first.values()]), torch.cat([*second.values()])
    expected = spearmanr(x[~y.isnan()], y[~y.isnan()]).statistic
    assert rank_agreement(first, second) == pytest.approx(expected)
    assert rank_agreement(second | {"a": torch.arange(5.0)}, {name: -v for name, v in first.items()}) < 0
    with pytest.raises(ValueError, match="Expected scores of"):
        rank_agreement({"a": first["a"]}, second)


def test_strength_without_data_is_that_under_white_contexts():
    conv = trained_like(goh.HeadGraphConv(goh.head_graph(5), 3, 7, rounds=2, activation=None))
    with goh.record(conv) as heads, torch.no_grad():
        conv(torch.randn(20000, 5, 3).double(), torch.randn(20000, 7).double())
    torch.testing.assert_close(edge_strength(conv)[""], edge_strength(heads)[""], rtol=0.05, atol=0.05)


BAD = {
    "no batches": ({"batches": []}, "Expected a list of at least one batch"),
    "an iterator": ({"batches": iter(batches())}, "Expected a list of at least one batch"),
    "an unknown replacement": ({"replace": "noise"}, "Expected replace of"),
    "no sample": ({"sample": 0}, "Expected sample to be an int >= 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    changes, sentence = BAD[name]
    with pytest.raises(ValueError, match=sentence):
        edge_ablation(**{"model": language_model(), "loss": loss, "batches": batches(), **changes})


def test_attributions_of_a_straight_way_add_up():
    conv = trained_like(goh.HeadGraphConv(goh.head_graph(5), 3, 7))
    z, x = torch.randn(11, 5, 3).double(), torch.randn(11, 7).double()

    def squares(conv, batch):
        return conv(z, x).square().mean()

    # A quadratic loss: the midpoint rule is exact, so the parts are those of the loss without any edge.
    found = edge_attribution(conv, squares, [None])[""]
    with torch.no_grad():
        assert found.sum().item() == pytest.approx((z.square().mean() - squares(conv, None)).item(), abs=1e-10)
    with pytest.raises(ValueError, match="Expected at to be a finite number >= 0 and <= 1"):
        edge_attribution(conv, squares, [None], at=2)


def test_a_plain_scalar_is_a_loss_too():
    model, data = language_model(), batches(1)
    scalar = edge_attribution(model, lambda model, x: F.cross_entropy(model(x).logits[:, 0], x[:, 1]), data)
    assert all(values.abs().sum() > 0 for values in scalar.values())
