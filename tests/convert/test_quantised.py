"""Models whose weights are quantised, converted before and after: right, or refused with what to do."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from helpers import moved
from torch import nn
from transformers_models import BOTH, V

import gohgraph as goh

STATIC = goh.HeadGraphConfig(goh.SiteConfig(edges="static"))


class Int8Linear(nn.Module):
    """A projection whose weight is whole numbers and a scale for each row; nothing in it is a floating parameter."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().char())
        self.scale = (scale,)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale[0].to(x))


class Stored(torch.Tensor):
    """A weight that says it is of floats, and is no plain tensor."""


def int8(model):
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and name != "lm_head":
                setattr(module, name, Int8Linear(child))
    return model


def subclass(model):
    for module in model.modules():
        if type(module) is nn.Linear:
            module.weight = nn.Parameter(module.weight.detach().as_subclass(Stored), requires_grad=False)
    return model


def torchao(model):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def bitsandbytes(model, bits, folder):
    pytest.importorskip("bitsandbytes")
    model.save_pretrained(folder)
    config = hf.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    return hf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu").eval()


WAYS = {
    "int8 modules": lambda model, folder: int8(model),
    "a tensor of its own kind": lambda model, folder: subclass(model),
    "torchao": lambda model, folder: torchao(model),
    "bitsandbytes, 8 bits": lambda model, folder: bitsandbytes(model, 8, folder),
    "bitsandbytes, 4 bits": lambda model, folder: bitsandbytes(model, 4, folder),
}


def plain():
    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=16)
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=V, num_key_value_heads=2, **shape)).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.arange(3, 16)[None]).logits


@pytest.mark.parametrize("way", WAYS)
def test_a_quantised_model_takes_head_graphs_and_gives_them_back(way, tmp_path):
    model = WAYS[way](plain(), tmp_path / "plain")
    before = logits(model)
    report = goh.convert(model, BOTH, freeze_backbone=True)
    assert len(report.replaced) == 2 and not report.unchecked and (logits(model) - before).abs().max() < 1e-6
    graphs = {name: p for name, p in model.named_parameters() if "head_graphs" in name}
    assert {p.dtype for p in graphs.values()} == {torch.float32}
    assert (logits(moved(model)) - before).abs().max() > 1e-3
    ids = torch.arange(3, 16)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in graphs.values())
    # The head graphs alone, for a backbone that is quantised again.
    goh.save_converted(model, tmp_path / "graphs", backbone=False)
    again = goh.load_converted(tmp_path / "graphs", WAYS[way](plain(), tmp_path / "again"))
    assert torch.equal(logits(again), logits(model))
    if "bits" in way:
        goh.save_converted(model, tmp_path / "whole")
        assert torch.equal(logits(goh.load_converted(tmp_path / "whole", device_map="cpu")), logits(model))
    assert torch.equal(logits(goh.unconvert(model)), before)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_quantised_is_not_written_into_but_read(way, tmp_path):
    model = WAYS[way](plain(), tmp_path / "plain")
    goh.convert(model, STATIC)
    expected = logits(moved(model))
    with pytest.raises(ValueError, match="quantised or sharded|linear projection to fold into"):
        goh.fold(model)
    assert torch.equal(logits(model), expected)
    found, exact = goh.composition_graph(goh.unconvert(model)), goh.composition_graph(plain())
    assert torch.equal(found.edge_index, exact.edge_index)
    tolerance = 0.15 if "4 bits" in way else 0.02
    torch.testing.assert_close(found.edge_attr, exact.edge_attr, rtol=0, atol=tolerance)


@pytest.mark.parametrize("way", ["int8 modules", "torchao"])
def test_a_converted_model_that_is_quantised_keeps_its_head_graphs(way):
    model = plain()
    goh.convert(model, BOTH)
    state = {k: v.clone() for k, v in moved(model).state_dict().items() if "head_graphs" in k}
    other = WAYS[way](plain(), None)
    goh.convert(other, BOTH)
    other.load_state_dict(state, strict=False)
    assert torch.equal(logits(WAYS[way](model, None)), logits(other))
