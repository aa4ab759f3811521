"""What models refuse, and what they store."""

from __future__ import annotations

import pytest
import torch
from helpers import GRAPHS, B, T, V, classifier, language_model, random_tokens, small_config, trained_like, translator

from gohgraph import LanguageModel

TOKENS, MASK = torch.zeros(B, T, dtype=torch.long), torch.ones(B, T, dtype=torch.bool)
LEARNED = {"positions": "learned", "max_length": T}


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("build", [language_model, translator, classifier])
@torch.no_grad()
def test_save_and_load_give_the_same_outputs(tmp_path, build, graph):
    # The random state of a fresh process is not that of this one: nothing may come from initialisation.
    model = build(graph).float().eval()
    model.save_pretrained(tmp_path / "run")
    torch.manual_seed(99)
    again = type(model).from_pretrained(tmp_path / "run").eval()
    inputs = (random_tokens(T), random_tokens(5)) if build is translator else (random_tokens(T),)
    assert again.config == model.config
    assert torch.equal(again(*inputs).logits, model(*inputs).logits)
    state, loaded = model.state_dict(), again.state_dict()
    assert list(state) == list(loaded) and all(torch.equal(loaded[name], state[name]) for name in state)


def test_untied_embeddings_are_stored(tmp_path):
    model = trained_like(LanguageModel(small_config(tie_embeddings=False))).float()
    model.save_pretrained(tmp_path / "run")
    again = LanguageModel.from_pretrained(tmp_path / "run")
    tokens = random_tokens(T)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert not torch.equal(again.head.weight, again.embedding.tokens.weight)


REFUSED = {
    "float tokens": (language_model, {}, lambda m: m(TOKENS.float())),
    "tokens without batch": (language_model, {}, lambda m: m(TOKENS[0])),
    "mask of another shape": (language_model, {}, lambda m: m(TOKENS, keep_mask=MASK[:, 1:])),
    "float mask": (language_model, {}, lambda m: m(TOKENS, keep_mask=MASK.float())),
    "targets of another shape": (language_model, {}, lambda m: m(TOKENS, TOKENS.t())),
    "too long": (language_model, LEARNED, lambda m: m(torch.zeros(B, T + 1, dtype=torch.long))),
    "too long to generate": (language_model, LEARNED, lambda m: m.generate(TOKENS, 2)),
    "empty prompt": (language_model, {}, lambda m: m.generate(TOKENS[:, :0], 2)),
    "prompt padded on the right": (language_model, {}, lambda m: m.generate(TOKENS, 2, keep_mask=right_padded())),
    "mask longer than prompt": (language_model, {}, lambda m: m.generate(TOKENS[:, 1:], 2, keep_mask=MASK)),
    "no new tokens": (language_model, {}, lambda m: m.generate(TOKENS, 0)),
    "eos out of range": (language_model, {}, lambda m: m.generate(TOKENS, 2, eos=V)),
    "float source": (translator, {}, lambda m: m(TOKENS.float(), TOKENS)),
    "no beams": (translator, {}, lambda m: m.generate(TOKENS, bos=1, eos=2, max_new_tokens=2, num_beams=0)),
    "bos out of range": (translator, {}, lambda m: m.generate(TOKENS, bos=V, eos=2, max_new_tokens=2)),
    "translation too long": (translator, LEARNED, lambda m: m.generate(TOKENS, bos=1, eos=2, max_new_tokens=T + 1)),
    "source too long": (translator, LEARNED, lambda m: m.encode(torch.zeros(B, T + 1, dtype=torch.long))),
    "side of an image": (classifier, {"patch_size": 2}, lambda m: m(torch.zeros(B, 3, 4, 5))),
    "channels of an image": (classifier, {"patch_size": 2}, lambda m: m(torch.zeros(B, 1, 4, 4))),
    "bytes as an image": (classifier, {"patch_size": 2}, lambda m: m(torch.zeros(B, 3, 4, 4, dtype=torch.uint8))),
}


def right_padded():
    return torch.arange(T) < torch.tensor([[T], [3]])


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_input_is_refused(case):
    build, settings, use = REFUSED[case]
    with pytest.raises((TypeError, ValueError), match=r"^Expected .*\(got .*\)\. Do "):
        use(build(**settings))


def test_learned_positions_serve_their_whole_length():
    model = language_model(**LEARNED)
    assert model.generate(TOKENS[:, :3], T - 3 + 1, temperature=0).shape == (B, T + 1)
    with pytest.raises(ValueError, match="^Expected at most 7 tokens"):
        caches = model.decoder.new_caches()
        model(TOKENS, caches=caches)
        model(TOKENS[:, :1], caches=caches)


@pytest.mark.parametrize(
    ("build", "inputs"),
    [(language_model, {}), (translator, {}), (translator, {"source": TOKENS}), (classifier, {})],
)
def test_missing_inputs_are_named(build, inputs):
    with pytest.raises(TypeError, match=r"Expected (tokens|source|target|inputs) \(got none\)"):
        build()(**inputs)
