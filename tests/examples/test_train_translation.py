"""The example that trains a translator, at smoke size."""

from __future__ import annotations

import json

import pytest
from example_runs import refused
from helpers import load_script

from gohgraph import Transformer


@pytest.fixture(scope="module")
def script():
    return load_script("examples", "train_translation")


@pytest.fixture
def main(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: script.main(["--smoke", "--device", "cpu", *arguments])


def test_compare_leaves_everything_and_equal_parameters(main, tmp_path, capsys):
    assert main("--compare", "--run", "out") == 0
    shown = capsys.readouterr().out
    results = {name: json.loads((tmp_path / "out" / name / "result.json").read_text()) for name in ("goh", "plain")}
    counts = [result["parameters"] for result in results.values()]
    assert abs(counts[0] - counts[1]) <= 2 * 33 + 1 and all(f"{count:,}" in shown for count in counts)
    assert all(0 <= result["bleu"] <= 100 and 1 < result["validation_loss"] < 8 for result in results.values())
    names = "config.json log.csv curves.png checkpoints model tokenizer.json translations.txt heads.png result.json"
    assert {path.name for path in (tmp_path / "out" / "goh").iterdir()} == set(names.split())
    assert Transformer.from_pretrained(tmp_path / "out" / "plain" / "model").config.head_graph is None
    settings = json.loads((tmp_path / "out" / "goh" / "config.json").read_text())
    assert settings["training"]["optimizer"] == "muon" and "BLEU" in shown and "no verdict:" in shown


def test_a_folder_of_sentences_and_another_direction(main, tmp_path):
    for split in ("train", "val"):
        (tmp_path / f"{split}.en").write_text("a house\nthe red house\ngo\n" * 3)
        (tmp_path / f"{split}.de").write_text("ein haus\ndas rote haus\ngeh\n" * 3)
    assert main("--data", ".", "--source", "de", "--target", "en", "--sites", "none", "--run", "out") == 0
    assert "das rote haus" in (tmp_path / "out" / "translations.txt").read_text().splitlines()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--data", "missing"], "a folder with train.en"),
        (["--vocab-size", "7"], "vocab_size of at least 259"),
        (["--beams", "0"], "--beams"),
        (["--label-smoothing", "1"], "--label-smoothing"),
        (["--sites", "none", "--compare"], "head graph to compare"),
        (["--recipe", "old", "--warmup", "0"], "warmup"),
        (["--resume"], "run to resume"),
    ],
)
def test_impossible_flags_are_one_sentence(main, tmp_path, capsys, flags, message):
    flags = [*flags, "--warmup", "1"] if "--warmup" not in flags else flags
    assert message in refused(main("--run", "out", *flags), capsys)
    assert not (tmp_path / "out").exists()
