from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from helpers import GRAPHS, small_config, trained_like

from gohgraph import HeadGraphConv, LanguageModel, MultiHeadAttention, Transformer, record

WITH_GRAPHS = [name for name in GRAPHS if name not in ("plain", "moh")]


def random_tokens(length=7, batch=2):
    return torch.randint(0, 13, (batch, length))


def language_model(graph="outputs"):
    return trained_like(LanguageModel(small_config(graph)))


def contexts_of(model):
    """The inputs of every attention block, as they come in."""
    seen = {name: [] for name, module in model.named_modules() if isinstance(module, MultiHeadAttention)}
    for name, own in seen.items():
        model.get_submodule(name).register_forward_pre_hook(lambda module, inputs, own=own: own.append(inputs[0]))
    return seen


def hooks_left(model):
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("graph", WITH_GRAPHS)
@pytest.mark.parametrize("lengths", [(7,), (7, 1, 11)], ids=["one-forward", "several"])
@torch.no_grad()
def test_running_statistics_equal_those_of_all_tokens_at_once(graph, lengths):
    model = language_model(graph)
    contexts = contexts_of(model)
    with record(model) as heads:
        for length in lengths:
            model(random_tokens(length))
    convs = {name: module for name, module in model.named_modules() if isinstance(module, HeadGraphConv)}
    assert list(heads) == list(convs)
    for name, conv in convs.items():
        x = torch.cat([x.flatten(0, 1) for x in contexts[name.rpartition(".")[0]]])  # [N, M]
        # The weights edges have, before routing and `top_edges` decide which of them a token uses.
        alpha = conv.edges(x).expand(len(x), -1, -1)  # [N, R, E]
        recording = heads[name]
        torch.testing.assert_close(recording.mean, alpha.mean(dim=0), rtol=0, atol=1e-12)
        torch.testing.assert_close(recording.std, alpha.std(dim=0, correction=0), rtol=0, atol=1e-12)
        assert recording.tokens == (2 * sum(lengths) if conv.edges.weight is not None else len(lengths))
        assert torch.equal(recording.edge_index, conv.edge_index) and recording.num_heads == 5


def test_generation_is_recorded_once_a_token():
    model = language_model("scores-ring")
    with record(model) as heads:
        model.generate(random_tokens(5), 3, temperature=0)
    assert {recording.tokens for recording in heads.values()} == {2 * (5 + 2)}


def test_all_stacks_of_a_translator_are_recorded():
    model = trained_like(Transformer(small_config("rounds", num_layers=1)))
    with record(model) as heads:
        model(random_tokens(11), random_tokens(7))
    blocks = ("encoder.layers.0.attention", "decoder.layers.0.attention", "decoder.layers.0.cross_attention")
    names = [f"{block}.object.{site}" for block in blocks for site in ("output_graph", "score_graph")]
    assert list(heads) == names
    assert [heads[name].tokens for name in names] == [22, 22, 14, 14, 14, 14]


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_hooks_are_removed_whatever_happens(error):
    model = language_model()
    try:
        with record(model) as heads:
            model(random_tokens())
            assert hooks_left(model) == len(heads)
            if error is not None:
                raise error
    except (RuntimeError, KeyboardInterrupt) as caught:
        assert type(caught) is error
    model(random_tokens())
    assert hooks_left(model) == 0
    assert {recording.tokens for recording in heads.values()} == {14}


@pytest.mark.parametrize("graph", WITH_GRAPHS)
def test_recording_changes_neither_outputs_nor_gradients(graph):
    model, tokens = language_model(graph), random_tokens()

    def run():
        logits = model(tokens).logits
        return [logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))]

    expected = run()
    with record(model) as heads:
        recorded = run()
    assert all(map(torch.equal, recorded, expected))
    assert not any(recording.mean.requires_grad for recording in heads.values())


def test_a_deep_copy_made_inside_is_not_recorded():
    model = language_model()
    with record(model) as heads:
        copy = deepcopy(model)
        copy(random_tokens())
        assert {recording.tokens for recording in heads.values()} == {0}
        model(random_tokens())
    copy(random_tokens())
    assert {recording.tokens for recording in heads.values()} == {14}


def test_two_recordings_do_not_disturb_each_other():
    model = language_model()
    with record(model) as outer:
        model(random_tokens(3))
        with record(model) as inner:
            model(random_tokens(7))
        model(random_tokens(1))
    assert {r.tokens for r in outer.values()} == {22} and {r.tokens for r in inner.values()} == {14}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_stay_exact_in_low_precision(dtype):
    model = language_model().to(dtype)
    with torch.no_grad(), record(model) as heads:
        for _ in range(50):
            model(random_tokens(1, batch=1).zero_())
    for recording in heads.values():
        assert recording.mean.dtype == torch.float64 and (recording.std < 1e-12).all()


def test_a_model_without_graphs_is_refused():
    with pytest.raises(ValueError, match="^Expected a model with head graphs"), record(language_model("plain")):
        pass
