"""Compiled decoding: the tokens of eager decoding, one program for all of them, and what does not fit."""

from __future__ import annotations

import pytest
import torch
from helpers import B, T, V, small_config, trained_like, with_graphs
from torch._dynamo.utils import counters

from gohgraph import HeadGraphConfig, LanguageModel
from gohgraph.graphs.site_config import BaselineConfig
from gohgraph.models import steps

NEW = 9
FITS = ("plain", "cross-layer", "moh-outputs")


@pytest.fixture(autouse=True)
def from_nothing_compiled():
    torch.compiler.reset()
    counters.clear()


def own_model(graph, **settings):
    torch.manual_seed(0)
    return trained_like(LanguageModel(small_config(graph, num_layers=2, **settings))).eval()


@pytest.fixture
def prompts():
    return torch.randint(V, (B, T))


@pytest.mark.compiles
@pytest.mark.parametrize("graph", FITS)
def test_compiled_steps_give_the_logits_and_tokens_of_eager_ones(graph, prompts):
    model = own_model(graph, positions="learned" if graph == "plain" else "rotary")
    keep = torch.arange(T) >= torch.tensor([[0], [3]])
    eager, compiled = steps.Steps(model, keep, T + NEW), steps.CompiledSteps(model, keep, T + NEW, backend="aot_eager")
    new = prompts
    with torch.no_grad():
        for _ in range(NEW):
            expected, found = eager(new), compiled(new)
            torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
            new = expected.argmax(-1, keepdim=True)
    assert counters["stats"]["unique_graphs"] == 1
    texts = [model.generate(prompts, NEW, temperature=0, keep_mask=keep, compile=how) for how in (False, "aot_eager")]
    assert torch.equal(*texts) and texts[0].shape == (B, T + NEW)
    # A second text is written by the same program.
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.compiles
def test_every_length_has_one_of_two_programs(prompts, monkeypatch):
    monkeypatch.setattr(steps, "KEYS_AT_ONCE", 5)
    model = own_model("outputs")
    for new in (3, 9, 14, 19):
        for tokens in (prompts, prompts[:, :5]):
            settings = {"temperature": 0, "eos": 3}
            expected = model.generate(tokens, new, **settings)
            assert torch.equal(model.generate(tokens, new, compile="aot_eager", **settings), expected)
    assert 1 <= counters["stats"]["unique_graphs"] <= 2


@pytest.mark.compiles
def test_sampling_draws_the_same_tokens(prompts):
    model = own_model("outputs")
    texts = []
    for compile in (False, "aot_eager"):
        torch.manual_seed(3)
        texts.append(model.generate(prompts, NEW, temperature=0.8, top_k=5, compile=compile))
    assert torch.equal(*texts)


@pytest.mark.compiles
def test_values_of_the_tokens_themselves_are_read_where_they_stand(prompts):
    graphs = HeadGraphConfig(BaselineConfig("exclusive"))
    model = trained_like(LanguageModel(with_graphs(graphs, num_layers=1))).eval()
    texts = [model.generate(prompts, NEW, temperature=0, compile=how) for how in (False, "aot_eager")]
    assert torch.equal(*texts)


@pytest.mark.compiles
@pytest.mark.parametrize("case", ["hook", "joined keys", "sharded"])
def test_what_does_not_fit_is_refused(case, prompts):
    graphs = HeadGraphConfig(None, BaselineConfig("paired")) if case == "joined keys" else None
    model = LanguageModel(with_graphs(graphs, d_model=24, num_heads=4))
    if case == "hook":
        model.decoder.layers[1].register_forward_hook(lambda *_: None)
    if case == "sharded":
        weight = torch.nn.Parameter(model.embedding.tokens.weight.data.as_subclass(type("Shard", (torch.Tensor,), {})))
        model.embedding.tokens.weight = weight
    said = {"hook": "forward hooks in 'decoder.layers.1'", "joined keys": "the keys of several heads"}
    with pytest.raises(ValueError, match=rf"can be compiled \(got .*{said.get(case, 'sharded or quantised')}.*Do gen"):
        model.generate(prompts, 2, compile="aot_eager")


def test_an_old_torch_is_refused(prompts, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.0")
    with pytest.raises(ValueError, match=r"Expected torch 2\.11 or newer to compile steps \(got 2\.9\.0\)"):
        own_model("outputs").generate(prompts, 2, compile=True)
