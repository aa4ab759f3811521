from __future__ import annotations

import pytest
import torch
from helpers import language_model
from stock_models import STOCK, stock, stock_inputs
from test_attribution_graph import hooks_of

import gohgraph as goh
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


def test_what_has_no_patterns_is_refused():
    for name in ("t5", "vit"):
        with pytest.raises(ValueError, match="one stack that reads tokens"):
            goh.label_heads(stock(name), goh.composition_graph(stock(name)))
    graphs = language_model("outputs").eval()
    with pytest.raises(ValueError, match="averages of values"):
        goh.label_heads(graphs, goh.composition_graph(graphs))
    plain = language_model().eval()
    with pytest.raises(ValueError, match="a network of this model"):
        goh.label_heads(plain, goh.composition_graph(stock("gpt2")))
    before = run(plain, torch.tensor([[3, 4, 5]])).logits
    goh.label_heads(plain, goh.composition_graph(plain))
    assert torch.equal(run(plain, torch.tensor([[3, 4, 5]])).logits, before)
