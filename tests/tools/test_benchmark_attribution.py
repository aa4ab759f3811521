"""Tests of `tools/benchmark.py attribution`: the table, the difference to an opponent, a folder that is streamed."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from benchmarks import attribution, rival, streamed
from helpers import load_script

import gohgraph as goh


@pytest.fixture(scope="module")
def tool():
    return load_script("tools", "benchmark")


@pytest.fixture
def in_this_process(monkeypatch):
    """A process of its own takes 10 s to start."""
    monkeypatch.setattr(attribution, "in_own_process", attribution.measure)


def test_composition_and_attribution_are_measured(tool, tmp_path, capsys, in_this_process):
    file = tmp_path / "out.json"
    assert tool.main(["attribution", "--smoke", "--tokens", "5", "--json", str(file)]) == 0
    rows, shown = json.loads(file.read_text())["rows"], capsys.readouterr().out
    kinds = [(row["kind"], row["who"], row["edges"][0]) for row in rows]
    assert kinds[:2] == [("composition", "gohgraph", 27), ("attribution", "gohgraph", 75)]
    assert kinds[2][:2] == ("attribution", attribution.PASSES)
    assert all(len(row["cpu_seconds"]) == 2 and min(row["cpu_seconds"]) >= 0 for row in rows)
    assert "| 2 x 3 " in shown and "gohgraph" in shown


def test_an_opponent_is_compared_edge_by_edge(monkeypatch, in_this_process):
    """The opponent here is ours with one edge moved."""

    def work(case, model, clean, other):
        run, told = attribution._work(case._replace(who=attribution.OURS))
        return run, lambda network: {edge: value + 0.1 * (edge[2] == "logits") for edge, value in told(network).items()}

    monkeypatch.setattr(rival, "work", work)
    cases = [attribution.Case("attribution", who, 2, 3, 12, 5, values=True) for who in (attribution.OURS, rival.WHOLE)]
    rows = attribution._measured(cases, 1)
    largest = max(map(abs, rows[0]["values"].values()))
    assert rows[1]["difference"] == pytest.approx(0.1 / largest) and "difference" not in rows[0]
    with pytest.raises(ValueError, match="the same edges"):
        attribution._difference({("a", "b", "keys"): 1.0}, {("a", "b", "values"): 1.0})


def test_a_streamed_folder_is_a_whole_model(tool, tmp_path, capsys, in_this_process):
    shape = streamed.Shape.of("2/4/2/16/24/11")
    total = streamed.write_folder(tmp_path / "model", shape) if (tmp_path / "model").mkdir() is None else 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert total == 2 * sum(p.numel() for p in model.parameters())
    expected, found = goh.composition_graph(model), goh.composition_graph(tmp_path / "model")
    torch.testing.assert_close(found.mean, expected.mean)
    assert tool.main(["attribution", "--smoke", "--stream", "2/4/2/16/24/11", "--folder", str(tmp_path)]) == 0
    assert "streamed composition" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert tool.main(["attribution", "--stream", "2/4"]) == 2
    assert tool.main(["attribution", "--sizes", "2/4"]) == 2
