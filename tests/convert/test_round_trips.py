"""Every way a converted model is written and read again: it computes the same to the last bit, or is refused."""

from __future__ import annotations

import copy
import io
from functools import cache, partial

import pytest
import torch
import transformers as hf
from helpers import moved
from pairs import pairwise
from transformers_models import INTERFACE, inputs_of, tokens

import gohgraph as goh
from gohgraph import HeadGraphConfig, RoutingConfig, SiteConfig

MODELS = ("llama", "gpt2", "bert", "t5", "vit")
CONFIGS = {
    "output": HeadGraphConfig(),
    "score": HeadGraphConfig(None, SiteConfig.ring(2)),
    "both": HeadGraphConfig(SiteConfig(rank=3), SiteConfig.ring(2)),
    "routed": HeadGraphConfig(routing=RoutingConfig(1, 1)),
    "pruned": HeadGraphConfig(SiteConfig(), SiteConfig.ring(2)),
    "static": HeadGraphConfig(SiteConfig(edges="static")),
}
AUTO = {
    "llama": hf.AutoModelForCausalLM, "gpt2": hf.AutoModelForCausalLM, "bert": hf.AutoModelForMaskedLM,
    "t5": hf.AutoModelForSeq2SeqLM, "vit": hf.AutoModelForImageClassification,
}  # fmt: skip


@cache
def case(name, config):
    """A converted model with trained edges, its inputs, and its logits."""
    torch.manual_seed(0)
    model = INTERFACE[name]().eval()
    goh.convert(model, CONFIGS[config])
    model = moved(model)
    if config == "pruned":
        model = goh.prune(model, keep=0.4)
    inputs = inputs_of(model)
    return model, inputs, logits(model, inputs)


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


def by_auto_class(name, config, folder):
    model, *_ = case(name, config)
    model.save_pretrained(folder)
    return AUTO[name].from_pretrained(folder)


def by_trainer(name, config, folder):
    model, inputs, _ = case(name, config)
    arguments = hf.TrainingArguments(
        str(folder), max_steps=1, save_steps=1, learning_rate=0.0, report_to=[], use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=1, save_only_model=True,
    )  # fmt: skip
    labels = torch.tensor(1) if name == "vit" else tokens(1)[0]
    row = {key: value[0] for key, value in inputs.items()} | {"labels": labels}
    hf.Trainer(copy.deepcopy(model), arguments, train_dataset=[row]).train()
    return AUTO[name].from_pretrained(folder / "checkpoint-1")


def by_pickle(name, config, folder):
    file = io.BytesIO()
    torch.save(case(name, config)[0], file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_state_dict(name, config, folder):
    model = INTERFACE[name]().eval()
    goh.convert(model, CONFIGS[config])
    model.load_state_dict(case(name, config)[0].state_dict())
    return model


def by_save_converted(name, config, folder):
    goh.save_converted(case(name, config)[0], folder)
    return goh.load_converted(folder)


def by_head_graphs_alone(name, config, folder):
    model = case(name, config)[0]
    goh.save_converted(model, folder, backbone=False)
    stock = goh.unconvert(copy.deepcopy(model))
    return goh.load_converted(folder, stock)


DOORS = (by_auto_class, by_trainer, by_pickle, by_state_dict, by_save_converted, by_head_graphs_alone)


@pytest.mark.parametrize(
    ("door", "config", "name"),
    pairwise(DOORS, CONFIGS, MODELS),
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_model_comes_back_as_it_was(door, config, name, tmp_path):
    again = partial(door, name, config, tmp_path)
    if door is by_state_dict and config == "pruned":
        # A new model has all edges again.
        with pytest.raises(RuntimeError, match="got another graph"):
            again()
        return
    model, inputs, expected = case(name, config)
    loaded = again()
    assert type(loaded) is type(model) and type(loaded.config) is type(model.config)
    assert torch.equal(logits(loaded.eval(), inputs), expected)
    goh.unconvert(loaded)
    assert not torch.equal(logits(loaded, inputs), expected)
