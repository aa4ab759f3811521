"""The example that trains a classifier, at smoke size."""

from __future__ import annotations

import json

import pytest
from example_runs import refused
from helpers import load_script

from gohgraph import Classifier


@pytest.fixture
def main(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = load_script("examples", "train_classifier")
    return lambda *arguments: script.main(["--smoke", "--device", "cpu", *arguments])


def test_compare_leaves_everything_and_equal_parameters(main, tmp_path, capsys):
    assert main("--compare", "--run", "out") == 0
    shown = capsys.readouterr().out
    results = {name: json.loads((tmp_path / "out" / name / "result.json").read_text()) for name in ("goh", "plain")}
    counts = [result["parameters"] for result in results.values()]
    assert abs(counts[0] - counts[1]) <= 2 * 8 + 1 and all(f"{count:,}" in shown for count in counts)
    for result in results.values():
        matrix = result["confusion"]
        assert sum(map(sum, matrix)) == 359
        assert result["accuracy"] == pytest.approx(sum(matrix[i][i] for i in range(10)) / 359)
    names = "config.json log.csv curves.png checkpoints model confusion.png heads.png result.json"
    assert {path.name for path in (tmp_path / "out" / "goh").iterdir()} == set(names.split())
    assert Classifier.from_pretrained(tmp_path / "out" / "plain" / "model").config.transformer.head_graph is None


def test_text_and_a_router(main, tmp_path):
    for name, letter in (("bees", "b"), ("ants", "a")):
        (tmp_path / f"{name}.txt").write_text(letter * 3000)
    flags = ["--task", "text", "--data", ".", "--sites", "none", "--router", "--steps", "40"]
    assert main(*flags, "--learning-rates", "0.02", "--run", "out") == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["classes"] == ["ants", "bees"] and result["accuracy"] == 1.0
    assert not (tmp_path / "out" / "heads.png").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--data", "."], "Do add --task text"),
        (["--task", "text", "--data", "missing"], "two .txt files"),
        (["--batch-size", "0"], "--batch-size"),
        (["--sites", "none", "--compare"], "head graph to compare"),
        (["--num-heads", "3"], "multiple of num_heads"),
        (["--resume"], "run to resume"),
    ],
)
def test_impossible_flags_are_one_sentence(main, tmp_path, capsys, flags, message):
    assert message in refused(main("--run", "out", *flags), capsys)
    assert not (tmp_path / "out").exists()
