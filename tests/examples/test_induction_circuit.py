from __future__ import annotations

import json

import pytest
import torch
import transformers as hf
from helpers import load_script

import gohgraph as goh


def test_it_finds_measures_and_draws(tmp_path, capsys):
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = hf.LlamaConfig(vocab_size=53, num_key_value_heads=2, **shape)
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    script, out = load_script("examples", "induction_circuit"), tmp_path / "run"
    flags = ["--examples", "3", "--length", "5", "--steps", "2", "--layers", "1", "2", "--page", "--out", str(out)]
    assert script.main([str(tmp_path / "model"), *flags]) == 0
    printed = capsys.readouterr().out
    assert "96 edges" in printed and "CPR" in printed and "previous-token head" in printed
    results = json.loads((out / "results.json").read_text())
    assert results["faithfulness"]["network"]["f"][-1][0] == pytest.approx(1)
    network = goh.load_head_graph(out / "circuit.json")
    assert network.num_edges == 96 and "previous_token" in network
    files = {"circuit.json", "circuit.png", "circuit.html", "faithfulness.png", "results.json"}
    assert {path.name for path in out.iterdir()} == files
