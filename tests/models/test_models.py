from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import (
    GRAPHS,
    B,
    T,
    V,
    assert_equal_to,
    classifier,
    language_model,
    random_tokens,
    translator,
)
from torch.nn import functional as F

from gohgraph.models.generation import beam_search

MODERN = {"qk_norm": True, "activation": "relu2", "norm": "unweighted-rms", "embedding_norm": True, "logit_cap": 5.0}
GQA = {"d_model": 60, "num_heads": 6, "num_kv_heads": 3}
# Every graph with rotary positions; every kind of positions and grouped keys with each way of running graphs.
VARIANTS = [
    *((graph, {}) for graph in GRAPHS),
    *((graph, {"positions": p}) for p in ("learned", "sinusoidal", "none") for graph in ("plain", "rounds")),
    ("cross-layer", {"positions": "learned"}),
    *((graph, GQA) for graph in ("plain", "outputs", "scores-ring", "scores-complete", "rounds", "moh-outputs")),
    ("outputs", {"norm_first": False, "norm": "rms", "activation": "swiglu", "tie_embeddings": True, "bias": False}),
    *((graph, MODERN) for graph in ("outputs", "moh-outputs")),
    ("scores-ring", {**GQA, **MODERN, "positions": "none"}),
]
IDS = [f"{graph}-{'-'.join(map(str, settings.values()))}" for graph, settings in VARIANTS]
variants = pytest.mark.parametrize("graph,settings", VARIANTS, ids=IDS)


def greedy_uncached(model, tokens, new):
    for _ in range(new):
        tokens = torch.cat((tokens, model(tokens).logits[:, -1:].argmax(dim=-1)), dim=1)
    return tokens


def left_padded(prompts):
    longest = max(map(len, prompts))
    tokens = torch.stack([F.pad(p, (longest - len(p), 0)) for p in prompts])
    keep = torch.stack([torch.arange(longest) >= longest - len(p) for p in prompts])
    return tokens, keep


@variants
@torch.no_grad()
def test_cached_forward_equals_uncached(graph, settings):
    model, tokens = language_model(graph, **settings), random_tokens(11)
    caches, parts = model.decoder.new_caches(), []
    for part in tokens.split([5, 1, 3, 1, 1], dim=1):
        parts.append(model(part, caches=caches).logits)
    assert_equal_to(torch.cat(parts, dim=1), model(tokens).logits)


@variants
def test_generation_equals_uncached_greedy(graph, settings):
    model, prompt = language_model(graph, **settings), random_tokens(5)
    assert torch.equal(model.generate(prompt, 11, temperature=0), greedy_uncached(model, prompt, 11))


@variants
@torch.no_grad()
def test_left_padded_prompts_equal_each_prompt_alone(graph, settings):
    model = language_model(graph, **settings)
    prompts = [random_tokens(length, batch=1)[0] for length in (7, 1, 3)]
    tokens, keep = left_padded(prompts)
    logits = model(tokens, keep_mask=keep).logits
    together = model.generate(tokens, 5, temperature=0, keep_mask=keep)
    for row, prompt in enumerate(prompts):
        assert_equal_to(logits[row, keep[row]], model(prompt[None]).logits[0])
        alone = model.generate(prompt[None], 5, temperature=0)[0]
        assert torch.equal(together[row, -len(alone) :], alone)


@variants
def test_padding_on_the_right_changes_nothing(graph, settings):
    model, tokens, targets = language_model(graph, **settings), random_tokens(T), random_tokens(T)
    keep = torch.arange(T) < torch.tensor([[T], [3]])
    other = torch.where(keep, tokens, random_tokens(T))
    targets = torch.where(keep, targets, -100)
    logits, loss, *_ = model(tokens, targets, keep_mask=keep)
    logits_of_other, loss_of_other, *_ = model(other, targets, keep_mask=keep)
    assert_equal_to(logits[keep], logits_of_other[keep])
    assert_equal_to(logits[1, :3], model(tokens[1:, :3]).logits[0])
    gradients = [torch.autograd.grad(x, list(model.parameters())) for x in (loss, loss_of_other)]
    assert all(torch.isfinite(g).all() for g in gradients[0])
    for own, same in zip(*gradients, strict=True):
        assert_equal_to(own, same)


@pytest.mark.parametrize("graph", GRAPHS)
@torch.no_grad()
def test_a_token_changes_its_own_and_later_logits_only(graph):
    model, tokens = language_model(graph), random_tokens(T)
    before = model(tokens).logits
    for t in range(T):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % V
        difference = (model(changed).logits - before).abs().amax(dim=(0, 2))
        assert (difference[:t] == 0).all() and (difference[t:] > 1e-9).all()


@pytest.mark.parametrize("is_double", [True, False])
def test_loss_is_the_mean_over_targets(is_double):
    model = language_model()
    model = model if is_double else model.bfloat16()
    tokens, targets = random_tokens(T), random_tokens(T)
    targets[0, 2:5] = -100
    logits, loss, *_ = model(tokens, targets)
    log_p = logits.to(torch.float64).log_softmax(dim=-1)
    expected = [-log_p[b, t, targets[b, t]] for b in range(B) for t in range(T) if targets[b, t] >= 0]
    tolerance = 1e-10 if is_double else 1e-5
    torch.testing.assert_close(loss.double(), torch.stack(expected).mean(), rtol=0, atol=tolerance)
    assert model(tokens).loss is None


def test_rows_that_ended_are_filled_with_eos():
    model, prompt = language_model(), random_tokens(3, batch=17)
    free = greedy_uncached(model, prompt, 11)
    eos = int(free[0, 5])
    found = model.generate(prompt, 11, temperature=0, eos=eos)
    for row, expected in zip(found.tolist(), free.tolist(), strict=True):
        at = next((t for t in range(3, len(row)) if expected[t] == eos), len(row))
        assert row == expected[:at] + [eos] * (len(row) - at)


def test_generation_stops_when_all_rows_have_ended():
    model, prompt = language_model(), random_tokens(3, batch=1)
    eos = int(model(prompt).logits[0, -1].argmax())
    assert model.generate(prompt, 11, temperature=0, eos=eos).tolist() == [[*prompt[0].tolist(), eos]]


@pytest.mark.parametrize("is_capped", [True, False])
def test_a_logit_cap_bounds_logits(is_capped):
    model, tokens = language_model("outputs", logit_cap=0.7 if is_capped else None), random_tokens(T)
    logits = model(tokens).logits
    model.config = dataclasses.replace(model.config, logit_cap=None)
    assert_equal_to(logits, 0.7 * torch.tanh(model(tokens).logits / 0.7) if is_capped else model(tokens).logits)


@pytest.mark.parametrize("graph", ["plain", "outputs", "scores-ring"])
def test_a_modern_translation_equals_uncached_greedy(graph):
    model, source = translator(graph, **MODERN), random_tokens(11)
    new = model.generate(source, bos=1, eos=2, max_new_tokens=9)
    target = torch.ones(B, 1, dtype=torch.long)
    while target.shape[1] < new.shape[1]:
        target = torch.cat((target, model(source, target).logits[:, -1:].argmax(dim=-1)), dim=1)
    ended = (new == 2).cumsum(dim=1) > 0
    assert torch.equal(torch.where(ended, 2, target), new)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("positions", ["rotary", "sinusoidal"])
def test_translation_equals_uncached_greedy(graph, positions):
    model, source = translator(graph, positions=positions), random_tokens(11, batch=3)
    keep = torch.arange(11) < torch.tensor([[11], [2], [5]])
    found = model.generate(source, bos=1, eos=2, max_new_tokens=7, source_keep_mask=keep)
    target = torch.ones(3, 1, dtype=torch.long)
    ended = torch.zeros(3, dtype=torch.bool)
    while target.shape[1] < found.shape[1]:
        token = model(source, target, source_keep_mask=keep).logits[:, -1].argmax(dim=-1)
        token = torch.where(ended, 2, token)
        ended |= token == 2
        target = torch.cat((target, token[:, None]), dim=1)
    assert torch.equal(found, target)


@pytest.mark.parametrize("graph", ["plain", "outputs", "scores-ring", "cross-layer", "moh-outputs", "experts"])
@pytest.mark.parametrize("num_beams", [2, 5])
def test_cached_beams_equal_uncached(graph, num_beams):
    model, source = translator(graph), random_tokens(11, batch=7)
    prefixes = torch.empty(7 * num_beams, 0, dtype=torch.long)

    def step(tokens, rows):
        nonlocal prefixes
        prefixes = torch.cat((prefixes[rows], tokens[:, None]), dim=1)
        return model(source.repeat_interleave(num_beams, dim=0), prefixes).logits[:, -1]

    settings = {"bos": 1, "eos": 2, "max_new_tokens": 7, "num_beams": num_beams, "length_penalty": 3.0}
    found = beam_search(step, 7, **settings)
    assert torch.equal(model.generate(source, **settings), found)
    # Not one hypothesis for all: a search that mixed up the rows of its caches would show.
    assert len(found.unique(dim=0)) > 1


@pytest.mark.parametrize("graph", ["plain", "outputs", "scores-ring", "cross-layer", "moh-outputs", "experts"])
@pytest.mark.parametrize("num_beams", [2, 5])
def test_beams_of_a_batch_equal_each_source_alone(graph, num_beams):
    model = translator(graph)
    sources = [random_tokens(length, batch=1) for length in (11, 2, 5)]
    together = torch.cat([F.pad(source, (0, 11 - source.shape[1])) for source in sources])
    keep = torch.arange(11) < torch.tensor([[11], [2], [5]])
    settings = {"bos": 1, "eos": 2, "max_new_tokens": 7, "num_beams": num_beams}
    found = model.generate(together, source_keep_mask=keep, **settings).tolist()
    for row, source in zip(found, sources, strict=True):
        alone = model.generate(source, **settings)[0].tolist()
        assert row == alone + [2] * (len(row) - len(alone))


@pytest.mark.parametrize("graph", ["plain", "scores-ring"])
def test_enough_beams_find_the_most_likely_translation(graph):
    model = translator(graph, d_model=30)
    source, longest = random_tokens(5, batch=1), 2
    found = model.generate(source, bos=1, eos=2, max_new_tokens=longest, num_beams=V**longest, length_penalty=0.0)
    candidates = [[2]] + [[a, b] for a in range(V) for b in range(V) if a != 2]

    def log_p(candidate):
        target = torch.tensor([[1, *candidate]])
        log_p = model(source, target[:, :-1]).logits.log_softmax(dim=-1)[0]
        return log_p.gather(1, target[0, 1:, None]).sum().item()

    best = max(candidates, key=log_p)
    assert found[0].tolist()[1 : 1 + len(best)] == best


@torch.no_grad()
def test_padding_of_source_and_target_changes_nothing():
    model = translator("rounds")
    source, target = random_tokens(5, batch=1), random_tokens(3, batch=1)
    padded_source, padded_target = F.pad(source, (0, 6)), F.pad(target, (0, 4))
    masks = {
        "source_keep_mask": (torch.arange(11) < 5).unsqueeze(0),
        "target_keep_mask": (torch.arange(7) < 3).unsqueeze(0),
    }
    assert_equal_to(model(padded_source, padded_target, **masks).logits[:, :3], model(source, target).logits)


@pytest.mark.parametrize("positions", ["rotary", "learned", "sinusoidal", "none"])
@pytest.mark.parametrize("graph", GRAPHS)
@torch.no_grad()
def test_classifier_ignores_padding_on_either_side(graph, positions):
    model, tokens = classifier(graph, positions), random_tokens(5, batch=1)
    expected = model(tokens).logits
    left = model(F.pad(tokens, (6, 0)), keep_mask=torch.arange(11).unsqueeze(0) >= 6).logits
    right = model(F.pad(tokens, (0, 6)), keep_mask=torch.arange(11).unsqueeze(0) < 5).logits
    assert expected.shape == (1, 3)
    assert_equal_to(left, expected)
    assert_equal_to(right, expected)


def test_classifier_reads_patches_row_by_row():
    model = classifier(positions="learned", patch_size=2, channels=3)
    images = torch.randn(B, 3, 4, 10, dtype=torch.float64)
    patches = [
        images[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(B, -1) for i in range(2) for j in range(5)
    ]
    seen = []
    model.embedding.tokens.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    logits, loss, *_ = model(images, torch.tensor([2, 0]))
    assert torch.equal(seen[0], torch.stack(patches, dim=1))
    assert_equal_to(loss, -logits.log_softmax(dim=-1)[[0, 1], [2, 0]].mean())
    assert not torch.allclose(model(images.transpose(2, 3)).logits, logits)
