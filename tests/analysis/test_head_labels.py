from __future__ import annotations

import pytest
import torch
from helpers import classifier, language_model, trained_like, translator, with_graphs
from stock_models import STOCK, stock, stock_inputs
from test_attribution_graph import hooks_of

import gohgraph as goh
from gohgraph import HeadGraphConfig, SiteConfig
from gohgraph.analysis.architectures import wiring_of
from gohgraph.analysis.network import HEAD_SCORES
from gohgraph.analysis.patterns import attention_patterns
from gohgraph.analysis.traces import run


@pytest.mark.parametrize("name", [name for name in STOCK if name != "gemma2"])
def test_patterns_are_those_of_eager_attention(name):
    model = stock(name)
    inputs = stock_inputs(name, model)
    before = hooks_of(model), model.config._attn_implementation
    found = list(attention_patterns(model, wiring_of(model), inputs))
    assert (hooks_of(model), model.config._attn_implementation) == before
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(**inputs, output_attentions=True)
    if model.config.is_encoder_decoder:
        own = [*output.encoder_attentions]
        for pair in zip(output.decoder_attentions, output.cross_attentions, strict=True):
            own += pair
    else:
        own = output.attentions
    assert len(found) == len(own)
    for (_, pattern), expected in zip(found, own, strict=True):
        torch.testing.assert_close(pattern, expected.double(), rtol=1e-5, atol=1e-6)


def test_scores_are_weights_at_known_places():
    model, tokens = stock("gpt2"), torch.tensor([[5, 9, 7, 5, 9], [3, 4, 3, 3, 8]])
    network = goh.label_heads(model, goh.composition_graph(model), tokens)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(tokens, output_attentions=True).attentions[1].double()
    a, head = weights[:, 3], 5 + 3
    previous = torch.stack([a[:, t, t - 1] for t in range(1, 5)]).mean()
    first = a[:, 1:, 0].mean()
    duplicate = (a[0, 3, 0] + a[0, 4, 1] + a[1, 2, 0] + a[1, 3, 0] + a[1, 3, 2]) / 4
    induction = (a[0, 3, 1] + a[0, 4, 2] + a[1, 2, 1] + a[1, 3, 1] + a[1, 3, 3]) / 4
    for name, expected in zip(HEAD_SCORES, (previous, induction, duplicate, first), strict=True):
        assert network[name][head].item() == pytest.approx(expected.item(), rel=1e-5)


def test_labels_stand_at_heads_and_in_files(tmp_path):
    model = stock("llama")
    network = goh.label_heads(model, goh.composition_graph(model))
    is_head = torch.tensor([kind == "head" for kind in network.kind])
    assert not network.induction[is_head].isnan().any() and network.induction[~is_head].isnan().all()
    for suffix in (".json", ".csv", ".graphml"):
        goh.save_head_graph(network, tmp_path / f"heads{suffix}")
        again = goh.load_head_graph(tmp_path / f"heads{suffix}")
        torch.testing.assert_close(again.previous_token, network.previous_token, equal_nan=True)


@pytest.mark.parametrize("name", ["t5", "bart", "whisper", "vit"])
def test_every_stack_is_labelled(name):
    model = stock(name)
    inputs, network = stock_inputs(name, model), goh.composition_graph(model)
    labelled = goh.label_heads(model, network, inputs)
    cross = torch.tensor(["cross" in block for block in network.block])
    head = torch.tensor([kind == "head" for kind in network.kind])
    assert not labelled.first_token[head].isnan().any()
    assert torch.equal(labelled.previous_token.isnan(), cross | ~head)
    no_tokens = {"vit": head, "whisper": cross | torch.tensor(["encoder" in block for block in network.block])}
    unknown = no_tokens.get(name, torch.zeros_like(head)) | ~head
    assert torch.equal(labelled.induction.isnan(), unknown) and torch.equal(labelled.duplicate_token.isnan(), unknown)
    if name in ("t5", "bart"):
        assert goh.label_heads(model, network).induction[head].isnan().sum() == 0
        return
    with pytest.raises(ValueError, match=f"which reads {model.main_input_name} .got none"):
        goh.label_heads(model, network)


def test_cross_attention_counts_all_places_of_the_source():
    model = stock("bart")
    source, target = torch.tensor([[5, 9, 7, 5]]), torch.tensor([[2, 5, 9]])
    network = goh.label_heads(model, goh.composition_graph(model), (source, target))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(input_ids=source, decoder_input_ids=target, output_attentions=True)
    a = output.cross_attentions[1][0, 2].double()
    node = network.label.index("decoder 1 cross.2")
    assert network.duplicate_token[node].item() == pytest.approx(((a[1, 0] + a[1, 3] + a[2, 1]) / 2).item(), rel=1e-5)
    assert network.induction[node].item() == pytest.approx(((a[1, 1] + a[2, 2]) / 2).item(), rel=1e-5)
    assert network.first_token[node].item() == pytest.approx(a[:, 0].mean().item(), rel=1e-5)


@pytest.mark.parametrize("graph", ["outputs", "values"])
def test_graphs_at_outputs_and_values_leave_the_patterns_to_be_asked_for(graph):
    torch.manual_seed(0)
    sites = {"outputs": None, graph: SiteConfig()}
    with_graph = trained_like(goh.LanguageModel(with_graphs(HeadGraphConfig(**sites), num_layers=2))).eval()
    tokens = torch.tensor([[5, 9, 7, 5, 9, 7]])
    found = [pattern for _, pattern in attention_patterns(with_graph, wiring_of(with_graph), tokens)]
    # The first layer's pattern asks nothing of the graph.
    plain = goh.LanguageModel(with_graphs(None, num_layers=2)).double().eval()
    plain.load_state_dict({k: v for k, v in with_graph.state_dict().items() if "graph" not in k})
    expected = next(iter(attention_patterns(plain, wiring_of(plain), tokens)))[1]
    torch.testing.assert_close(found[0], expected, rtol=1e-10, atol=1e-10)
    assert all(torch.allclose(pattern.sum(-1), torch.ones(()).double()) for pattern in found)
    assert goh.label_heads(with_graph, goh.composition_graph(with_graph)).induction.isnan().sum() == 0


def test_an_own_translator_and_classifiers_are_labelled():
    model = translator("outputs").eval()
    network = goh.label_heads(model, goh.composition_graph(model))
    assert not network.first_token.isnan().any()
    with pytest.raises(ValueError, match="for encoder and decoder .got 1"):
        goh.label_heads(model, network, torch.tensor([[3, 4, 5]]))
    words = classifier("outputs").eval()
    assert not goh.label_heads(words, goh.composition_graph(words)).first_token.isnan().any()


def test_what_has_no_patterns_is_refused():
    graphs = language_model("moh").eval()
    with pytest.raises(ValueError, match="averages of values"):
        goh.label_heads(graphs, goh.composition_graph(graphs))
    plain = language_model().eval()
    with pytest.raises(ValueError, match="a network of this model"):
        goh.label_heads(plain, goh.composition_graph(stock("gpt2")))
    before = run(plain, torch.tensor([[3, 4, 5]])).logits
    goh.label_heads(plain, goh.composition_graph(plain))
    assert torch.equal(run(plain, torch.tensor([[3, 4, 5]])).logits, before)
