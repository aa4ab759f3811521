"""One converted model in several threads gives the numbers of one, in forward, generate and backward."""

from __future__ import annotations

import threading

import pytest
import torch
from helpers import moved
from torch import nn
from transformers_models import BOTH, OUTPUTS, OUTPUTS_ONLY, SEQUENCE_TO_SEQUENCE, far, inputs_of

import gohgraph as goh

THREADS, TIMES = 4, 6


def in_threads(work, arguments):
    """What every thread found, in order; the first error is raised."""
    found, errors = [None] * len(arguments), []
    start = threading.Barrier(len(arguments))

    def run(place):
        try:
            start.wait()
            found[place] = [work(arguments[place]) for _ in range(TIMES)]
        except BaseException as error:
            errors.append(error)

    pool = [threading.Thread(target=run, args=(place,)) for place in range(len(arguments))]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    if errors:
        raise errors[0]
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "t5", "bart", "whisper", "bloom", "deberta"])
def test_forward(name):
    model = far(name, OUTPUTS if name in OUTPUTS_ONLY else BOTH)
    inputs = [inputs_of(model, batch) for batch in range(1, THREADS + 1)]

    @torch.no_grad()
    def work(one):
        return model(**one).logits

    expected = list(map(work, inputs))
    for want, got in zip(expected, in_threads(work, inputs), strict=True):
        assert all(torch.allclose(one, want, atol=1e-5) for one in got)


@pytest.mark.parametrize("name", ["llama", "t5", "bloom"])
def test_generate(name):
    model = far(name, OUTPUTS if name in OUTPUTS_ONLY else BOTH)
    inputs = [inputs_of(model, 1) for _ in range(THREADS)]
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}

    def work(one):
        given = {key: value for key, value in one.items() if key != "decoder_input_ids"}
        return model.generate(**given, **settings).tolist()

    expected = list(map(work, inputs))
    assert name not in SEQUENCE_TO_SEQUENCE or len(expected) == THREADS
    for want, got in zip(expected, in_threads(work, inputs), strict=True):
        assert got == [want] * TIMES


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_gradients_under_checkpointing(reentrant):
    model = far("llama", BOTH).train()
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    edges = [parameter for name, parameter in model.named_parameters() if "output_graph" in name]
    inputs = [inputs_of(model, batch) for batch in range(1, THREADS + 1)]

    def work(one):
        loss = model(**one, use_cache=False).logits.square().mean()
        if reentrant:
            # Reentrant checkpointing has no gradients of chosen inputs.
            return loss.detach().unsqueeze(0)
        return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, edges)])

    expected = list(map(work, inputs))
    for want, got in zip(expected, in_threads(work, inputs), strict=True):
        assert all(torch.allclose(one, want, atol=1e-5) for one in got)


def test_torchs_own_attention():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(20, 4, 11, 0.0, batch_first=True), 2).eval()
    goh.convert(model, goh.HeadGraphConfig(goh.SiteConfig(), goh.SiteConfig.ring(2)))
    moved(model)
    inputs = [torch.randn(batch, 7, 20) for batch in range(1, THREADS + 1)]
    work = torch.no_grad()(model)
    expected = list(map(work, inputs))
    for want, got in zip(expected, in_threads(work, inputs), strict=True):
        assert all(torch.allclose(one, want, atol=1e-6) for one in got)
