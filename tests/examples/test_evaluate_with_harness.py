from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from helpers import load_script, moved
from transformers_models import BOTH

import gohgraph as goh
from gohgraph.models.byte_tokenizer import save_byte_tokenizer

PARAGRAPHS = ["heads pass messages", "naïve — and short", "over a graph"]


@pytest.fixture
def script():
    return load_script("examples", "evaluate_with_harness")


def bits_per_byte(logits_of):
    """By hand: every byte after the zero byte and those before it, over the bytes of all paragraphs."""
    total = 0.0
    for text in PARAGRAPHS:
        ids = torch.tensor([[0, *text.encode()]])
        with torch.no_grad():
            total += F.cross_entropy(logits_of(ids[:, :-1])[0], ids[0, 1:], reduction="sum").item()
    return total / math.log(2) / sum(len(text.encode()) for text in PARAGRAPHS)


@pytest.mark.parametrize("kind", ["own", "converted"])
def test_it_measures_what_is_measured_by_hand(script, kind, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    torch.manual_seed(0)
    if kind == "own":
        config = goh.TransformerConfig(256, d_model=24, num_heads=4, num_layers=2, d_ff=8)
        model = moved(goh.LanguageModel(config).eval())
        model.save_pretrained(tmp_path)
    else:
        shape = dict(hidden_size=24, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4)
        model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=256, **shape)).eval()
        goh.convert(model, BOTH)
        moved(model).save_pretrained(tmp_path)
    save_byte_tokenizer(tmp_path)
    data = tmp_path / "text.txt"
    data.write_text("\n\n".join(PARAGRAPHS), encoding="utf-8")
    assert script.main([str(tmp_path), "--data", str(data), "--batch-size", "2"]) == 0
    expected = bits_per_byte(lambda ids: model(ids).logits)
    assert f"{expected:.4f}" in capsys.readouterr().out


def test_what_it_cannot_evaluate(script, tmp_path):
    with pytest.raises(ValueError, match="Expected paragraphs in"):
        (tmp_path / "empty.txt").write_text("\n\n")
        script.paragraphs(str(tmp_path / "empty.txt"), 3)
