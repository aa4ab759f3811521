"""Runs every preset on a device that has neither memory nor numbers, and prints each run that it stops.

A tensor of the CPU that meets one of the device stops a run, as it would on a GPU, and so does a value that Python
reads, for which it would have to wait for a GPU. The device is what torch has for backends in Python, with fake tensors
on it; it stays registered, so this is a process of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration

import gohgraph as goh
from gohgraph.graphs.baselines.presets import PRESETS, fields_of
from gohgraph.learning.optim import make_optimizer
from gohgraph.learning.train_config import TrainConfig

VOCABULARY, HEADS = 13, 8
CONFIG = goh.TransformerConfig(VOCABULARY, d_model=16, num_heads=HEADS, num_layers=2, d_ff=16)
DEVICE = "fake:0"
# Scores longer than this are computed in tiles.
SHORT, LONG = 5, 1500
# A model of two stacks takes twice as long, and differs in the attention between them alone.
TRANSLATED = ("plain", "outputs", "scores", "weights", "moh-75")


def tokens(length: int) -> Tensor:
    """Returns token ids `[2, length]` on the device."""
    return torch.empty(2, length, dtype=torch.long, device=DEVICE)


def empty(tensor: Tensor) -> Tensor:
    """Returns a tensor like that one on the device."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)


def moved(model: nn.Module) -> nn.Module:
    """Puts a model on the device: `model.to` would copy numbers, of which a fake tensor has none."""
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(empty(weight), weight.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, empty(buffer))
    return model


def trains(model: nn.Module) -> None:
    """One training step of a language model."""
    optimizer = make_optimizer(model, TrainConfig(steps=2), torch.device(DEVICE))
    model(tokens(LONG), targets=tokens(LONG)).loss.backward()
    optimizer.step()


def translates(model: nn.Module) -> None:
    """One training step of an encoder and a decoder but for the optimizer's, the source padded."""
    keep_mask = torch.ones(2, SHORT + 2, dtype=torch.bool, device=DEVICE)
    model(tokens(SHORT + 2), tokens(SHORT), tokens(SHORT), source_keep_mask=keep_mask).loss.backward()


@torch.no_grad()
def decodes(model: nn.Module) -> None:
    """A padded prompt and one token more, over caches."""
    model, caches = model.eval(), model.decoder.new_caches()
    for length in (SHORT, 1):
        past = len(caches[0][0])
        model(tokens(length), caches=caches, keep_mask=torch.ones(2, past + length, dtype=torch.bool, device=DEVICE))


def reads(model: nn.Module) -> None:
    """Forward and backward of torch's encoder, the source padded."""
    padding = torch.ones(2, SHORT, dtype=torch.bool, device=DEVICE)
    model(torch.empty(2, SHORT, CONFIG.d_model, device=DEVICE), src_key_padding_mask=padding).sum().backward()


def adds_a_tensor_of_the_cpu(model: nn.Module) -> None:
    """What has to stop."""
    tokens(SHORT) + torch.arange(SHORT)


def reads_a_value(model: nn.Module) -> None:
    """What has to stop."""
    tokens(SHORT).tolist()


def try_out(run: Callable[[nn.Module], None], name: str, model: nn.Module) -> None:
    """Prints what stops a run with a model."""
    try:
        with FakeTensorMode():
            run(moved(model))
    except Exception as error:
        print(f"{run.__name__}, {name}: {type(error).__name__}: {error}".splitlines()[0])


def main() -> None:
    """Tries out every preset."""
    backend_registration._setup_privateuseone_for_python_backend("fake")
    torch.set_num_threads(1)
    for run in (adds_a_tensor_of_the_cpu, reads_a_value):
        try_out(run, "plain", goh.LanguageModel(CONFIG))
    for name in PRESETS:
        config = dataclasses.replace(CONFIG, **fields_of(name, HEADS))
        for run in (trains, decodes):
            try_out(run, name, goh.LanguageModel(config))
        if name in TRANSLATED:
            try_out(translates, name, goh.Transformer(config))
    for site in ("outputs", "scores"):
        layer = nn.TransformerEncoderLayer(CONFIG.d_model, HEADS, CONFIG.d_ff, batch_first=True)
        encoder = nn.TransformerEncoder(layer, num_layers=1, enable_nested_tensor=False)
        goh.convert(encoder, goh.HeadGraphConfig(**{"outputs": None, site: goh.SiteConfig()}))
        try_out(reads, f"a converted encoder, {site}", encoder)
    print("done")


if __name__ == "__main__":
    main()
