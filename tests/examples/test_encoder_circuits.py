from __future__ import annotations

import json

import numpy
import pytest
import torch
import transformers as hf
from helpers import load_script
from PIL import Image

import gohgraph as goh


def measured(flags, out):
    script = load_script("examples", "encoder_circuits")
    assert script.main([*flags, "--examples", "2", "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"circuit.json", "circuit.png", "faithfulness.png", "results.json"}
    f = json.loads((out / "results.json").read_text())["faithfulness"]["network"]["f"]
    assert f[-1][0] == pytest.approx(1)
    return goh.load_head_graph(out / "circuit.json")


def test_sentences_of_one_other_word(tmp_path):
    torch.manual_seed(0)
    script = load_script("examples", "encoder_circuits")
    words = {word.strip(".").lower() for text in script.SENTENCES for word in text.split()} - {"{}"}
    # Of all pairs these two alone have words of one token.
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *sorted(words), "dog", "cat", "king", "farmer"]
    (tmp_path / "vocab.txt").write_text("\n".join(known))
    sizes = {"hidden_size": 24, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3}
    hf.BertModel(hf.BertConfig(vocab_size=len(known), **sizes)).save_pretrained(tmp_path / "model")
    hf.BertTokenizer(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "model")
    network = measured([str(tmp_path / "model")], tmp_path / "run")
    assert network.num_nodes == 2 * 3 + 2 + 2 and "logits" in network.kind


def test_crops_of_two_pictures(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "mlp_ratio": 2, "num_hidden_layers": 2, "num_attention_heads": 3}
    model = hf.Dinov2Model(hf.Dinov2Config(**sizes, image_size=12, patch_size=4, layerscale_value=0.5))
    model.save_pretrained(tmp_path / "model")
    pictures = [tmp_path / f"{name}.png" for name in "ab"]
    for number, path in enumerate(pictures):
        colours = numpy.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=numpy.uint8)
        Image.fromarray(colours).save(path)
    flags = [str(tmp_path / "model"), "--pictures", *map(str, pictures), "--size", "12"]
    network = measured(flags, tmp_path / "run")
    assert network.num_edges == len(network.site) > 0
