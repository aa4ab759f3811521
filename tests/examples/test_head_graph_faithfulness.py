from __future__ import annotations

import json

import pytest
from helpers import load_script, trained_like, with_graphs

import gohgraph as goh


@pytest.mark.parametrize("against", ["zero", "other"])
def test_edges_of_trained_graphs_are_ranked_beside_their_strength(tmp_path, capsys, against):
    graphs = goh.HeadGraphConfig(goh.SiteConfig(), goh.SiteConfig.ring(2))
    config = with_graphs(graphs, num_layers=2)
    model = trained_like(goh.LanguageModel(goh.TransformerConfig(**{**vars(config), "vocab_size": 256}))).float()
    model.save_pretrained(tmp_path / "run")
    text = tmp_path / "text.txt"
    text.write_text("heads talk to heads, and some of them listen. " * 200)
    script = load_script("examples", "head_graph_faithfulness")
    flags = ["--data", str(text), "--windows", "3", "--length", "9", "--random", "1", "--against", against]
    assert script.main([str(tmp_path / "run"), *flags]) == 0
    printed = capsys.readouterr().out
    assert "70 edges of 4 head graphs" in printed and " mean weight |" in printed and "CPR (1 is best)" in printed
    results = json.loads((tmp_path / "run" / "faithfulness.json").read_text())
    assert all(results[name]["f"][-1][0] == pytest.approx(1) for name in ("network", "strength", "random"))
    assert (tmp_path / "run" / "faithfulness.png").is_file()
    assert script.main([str(tmp_path / "run"), *flags[:-1], "nothing"]) == 2
