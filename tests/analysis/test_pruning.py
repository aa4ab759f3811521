from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import GRAPHS, assert_equal_to, small_config, trained_like

import gohgraph as goh
from gohgraph.analysis import edge_strength, pruning_curve, random_scores
from gohgraph.analysis.record import head_graphs

WITH_GRAPHS = [name for name in GRAPHS if name not in ("plain", "moh")]


def language_model(graph="outputs", **settings):
    return trained_like(goh.LanguageModel(small_config(graph, num_layers=2, **settings))).eval()


def tokens(length=7):
    return torch.randint(0, 13, (2, length))


def zeroed(model, kept):
    """The same model with the weights of edges outside `kept` set to zero: the slow form of pruning."""
    for name, conv in head_graphs(model).items():
        for edges in (conv.edges, getattr(conv, "key_edges", None)):
            if edges is not None:
                mask = kept[name]
                edges.register_forward_hook(lambda module, inputs, alpha, mask=mask: alpha * mask)
    return model


@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("graph", WITH_GRAPHS)
def test_a_pruned_model_equals_one_whose_edges_are_zero(graph, keep):
    model, x = language_model(graph), tokens()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scores = random_scores(model)
    pruned = goh.prune(model, keep, scores)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    order = torch.cat([*scores.values()]).argsort(descending=True)[: round(keep * sum(map(len, scores.values())))]
    kept = torch.zeros(sum(map(len, scores.values()))).index_fill(0, order, 1.0).split([*map(len, scores.values())])
    kept = dict(zip(scores, kept, strict=True))
    for (name, conv), whole in zip(head_graphs(pruned).items(), head_graphs(model).values(), strict=True):
        assert torch.equal(conv.edge_index, whole.edge_index[:, kept[name].bool()])
        assert conv.edges.num_edges == conv.edge_index.shape[1] == conv.edges.bias.shape[1]
    logits, gradients = run(pruned, x)
    expected, expected_gradients = run(zeroed(model, kept), x)
    assert_equal_to(logits, expected)
    for name, gradient in gradients.items():
        if ".edges." not in name and "key_edges" not in name:
            assert_equal_to(gradient, expected_gradients[name])


def run(model, x):
    logits = model(x).logits
    logits.square().sum().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_without_edges_it_is_plain_attention():
    model, x = language_model(), tokens()
    plain = goh.LanguageModel(small_config(num_layers=2)).double().eval()
    weights = {name: value for name, value in model.state_dict().items() if "output_graph" not in name}
    plain.load_state_dict(weights)
    assert torch.equal(goh.prune(model, 0)(x).logits, plain(x).logits)


@pytest.mark.parametrize("graph", WITH_GRAPHS)
def test_a_pruned_model_is_saved_and_loaded(graph, tmp_path):
    pruned, x = goh.prune(language_model(graph), 0.3), tokens()
    pruned.save_pretrained(tmp_path)
    loaded = goh.LanguageModel.from_pretrained(tmp_path).eval()
    assert goh.head_graph_of(loaded).num_edges == goh.head_graph_of(pruned).num_edges
    assert_equal_to(loaded(x).logits, pruned(x).logits)
    prompt = tokens(3)
    expected = pruned.generate(prompt, 4, temperature=0)
    assert torch.equal(loaded.generate(prompt, 4, temperature=0), expected)


def test_a_pruned_translator_is_saved_and_loaded(tmp_path):
    model = trained_like(goh.Transformer(small_config("rounds", num_layers=2))).eval()
    pruned = goh.prune(model, 0.2)
    pruned.save_pretrained(tmp_path)
    loaded = goh.Transformer.from_pretrained(tmp_path).eval()
    x, y = tokens(5), tokens(3)
    assert torch.equal(loaded(x, y).logits, pruned(x, y).logits)


def test_weights_of_another_graph_are_still_refused(tmp_path):
    whole, pruned = language_model(), goh.prune(language_model(), 0.3)
    with pytest.raises(RuntimeError, match="Expected weights of this head graph"):
        whole.load_state_dict(pruned.state_dict())


def test_learned_and_keyed_graphs_are_pruned(tmp_path):
    sites = goh.HeadGraphConfig(goh.SiteConfig(kind="learned", keep_in_degree=3), goh.SiteConfig.ring(3, kind="keyed"))
    model = trained_like(goh.LanguageModel(dataclasses.replace(small_config(num_layers=2), head_graph=sites))).eval()
    x, scores = tokens(), random_scores(model)
    pruned = goh.prune(model, 0.4, scores)
    order = torch.cat([*scores.values()]).sort(descending=True).values
    kept = {name: (values >= order[round(0.4 * len(order)) - 1]).float() for name, values in scores.items()}
    pruned.save_pretrained(tmp_path)
    loaded = goh.LanguageModel.from_pretrained(tmp_path).eval()
    logits = pruned(x).logits
    assert_equal_to(loaded(x).logits, logits)
    assert_equal_to(zeroed(model, kept)(x).logits, logits)


def test_pruned_edges_train_on():
    pruned, x = goh.prune(language_model(), 0.3).train(), tokens(11)
    optimizer = torch.optim.SGD(pruned.parameters(), lr=0.01)
    losses = []
    for _ in range(5):
        value = pruned(x[:, :-1], targets=x[:, 1:]).loss
        optimizer.zero_grad()
        value.backward()
        assert all(conv.edges.weight.grad.abs().sum() > 0 for conv in head_graphs(pruned).values())
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0]


def test_the_weakest_edges_go_first_in_all_graphs_together():
    model = language_model()
    strength = edge_strength(model)
    pruned = edge_strength(goh.prune(model, 0.2))
    kept, whole = torch.cat([*pruned.values()]), torch.cat([*strength.values()])
    torch.testing.assert_close(kept.sort().values, whole.sort().values[-10:])
    assert {name: len(values) for name, values in pruned.items()} != {name: 5 for name in strength}


def test_the_curve_is_that_of_the_pruned_models():
    model, data = language_model(), [tokens(8), tokens(8)]

    def loss(model, x):
        return model(x[:, :-1], targets=x[:, 1:])

    orders = {"strength": edge_strength(model), "random": random_scores(model, seed=3)}
    curves = pruning_curve(model, loss, data, orders, keep=(1.0, 0.4, 0.0))
    with torch.no_grad():
        for name, curve in curves.items():
            for keep, value in curve:
                pruned = goh.prune(model, keep, orders[name])
                assert value == pytest.approx(sum(loss(pruned, x).loss.item() for x in data) / 2, abs=1e-12)
    assert curves["strength"][0] == curves["random"][0] and curves["strength"][2] == curves["random"][2]


BAD = {
    "more than all": ({"keep": 1.5}, r"Expected keep to be a finite number >= 0 and <= 1 \(got 1.5\)"),
    "a switch": ({"keep": True}, r"Expected keep to be a finite number >= 0 and <= 1 \(got True\)"),
    "other graphs": ({"scores": {"graph": torch.ones(25)}}, "Expected a score for each edge of"),
    "a model without graphs": ({"model": torch.nn.Linear(2, 2)}, "Expected a model with head graphs"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    changes, sentence = BAD[name]
    with pytest.raises(TypeError if changes.get("keep") is True else ValueError, match=sentence):
        goh.prune(**{"model": language_model(), **changes})


def test_unmeasured_edges_cannot_be_ordered():
    model = language_model()
    scores = random_scores(model)
    next(iter(scores.values()))[3] = torch.nan
    with pytest.raises(ValueError, match="Expected scores of all edges .got NaN at some"):
        goh.prune(model, 0.5, scores)
    conv = next(iter(head_graphs(model).values()))
    with pytest.raises(ValueError, match=r"Expected a bool mask of shape \[25\]"):
        conv.keep_edges(torch.ones(24, dtype=torch.bool))
