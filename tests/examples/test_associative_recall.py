"""The example runs: its smoke form, its table, its refusals."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from helpers import load_script


@pytest.fixture(scope="module")
def example():
    return load_script("examples", "associative_recall")


@pytest.fixture(autouse=True)
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def smoke(example, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recall") / "run"
    assert example.main(["--smoke", "--jobs", "1", "--run", str(folder)]) == 0
    return folder


def row(example, variant="plain", steps=(100, 200), **changes):
    values = {"num_cues": 32, "parameters": 7, "d_ff": 3, "rate": 0.01, "cap": 500, "accuracy": 0.5}
    return example.Row(variant=variant, steps=steps, **{**values, **changes})


def test_smoke_writes_everything(example, smoke):
    assert len(list((smoke / "runs").glob("*.json"))) == len(example.VARIANTS)
    assert (smoke / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    table = (smoke / "table.md").read_text()
    with open(smoke / "results.csv", newline="") as file:
        runs = list(csv.DictReader(file))
    saved = json.loads((smoke / "results.json").read_text())["rows"]
    for variant, run, kept in zip(example.VARIANTS, runs, saved, strict=True):
        assert f"| {variant} | {kept['parameters']:,} |" in table
        assert run["variant"] == kept["variant"] == variant
        assert float(run["accuracy"]) == kept["accuracy"] > 0


def test_finished_runs_are_kept(example, smoke, monkeypatch, capsys):
    table = (smoke / "table.md").read_text()
    monkeypatch.setattr(example, "train", lambda **arguments: pytest.fail("trained again"))
    assert example.main(["--smoke", "--jobs", "1", "--run", str(smoke)]) == 0
    assert capsys.readouterr().out.startswith(table)


def test_parameters_are_equal(example):
    task = example.RecallTask(num_cues=32)
    configs = example.equal_configs(task)
    counts = [example.count_parameters(example.RecallModel(task, config)) for config in configs.values()]
    assert max(counts) - min(counts) <= 0.002 * max(counts)
    assert configs["plain"].d_ff > configs["score-ring-4"].d_ff > configs["score-complete"].d_ff


def test_training_repeats_itself(example):
    task = example.RecallTask(num_cues=5, num_items=4, batch_size=3)
    arguments = {"rate": 0.01, "steps": 5, "every": 2, "threads": 1}
    config = example.equal_configs(task)["score-ring-2"].to_dict()
    task = example.dataclasses.asdict(task)
    first, again, other = (example.train(task, config, seed=seed, **arguments) for seed in (0, 0, 1))
    assert first == again != other
    assert [step for step, _ in first] == [2, 4, 5]


def test_a_ratio_of_bounds_is_no_number(example):
    plain, fast, slow = row(example), row(example, "a", (50, 70)), row(example, "b", (100, None))
    assert (plain.show_steps(), plain.show_ratio(plain)) == ("150 ± 71", "1")
    assert fast.show_ratio(plain) == "0.40"
    assert (slow.show_steps(), slow.show_ratio(plain)) == ("> 300 (1 of 2 seeds)", "> 2.00")
    assert fast.show_ratio(slow) == "< 0.20"
    assert slow.show_ratio(row(example, steps=(None, None))) == "–"


def test_each_variant_is_shown_at_its_best_learning_rate(example):
    def curve(reached, last):
        return [(10, reached), (20, last)]

    curves = {
        example.Trial(32, "plain", 0.1, 0): curve(0.1, 0.2),
        example.Trial(32, "plain", 0.2, 0): curve(0.95, 0.1),
        example.Trial(32, "score-ring-2", 0.1, 0): curve(0.1, 0.3),
        example.Trial(32, "score-ring-2", 0.2, 0): curve(0.2, 0.2),
    }
    configs = example.equal_configs(example.RecallTask(num_cues=32))
    best = {name: example._best_row(32, name, configs[name], curves) for name in ("plain", "score-ring-2")}
    assert (best["plain"].rate, best["plain"].steps, best["plain"].accuracy) == (0.2, (10,), 0.1)
    assert (best["score-ring-2"].rate, best["score-ring-2"].steps) == (0.1, (None,))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--steps", "0"],
        ["--jobs", "0"],
        ["--sizes", "3"],
        ["--seeds", "1", "1"],
        ["--seeds", "-1"],
        ["--learning-rates", "nan"],
        ["--learning-rates", "0"],
    ],
)
def test_bad_input_is_one_sentence(example, arguments, tmp_path, capsys):
    assert example.main(["--smoke", "--run", str(tmp_path / "run"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: Expected ") and error.count("\n") == 1
    assert not (tmp_path / "run" / "table.md").exists()


def test_bad_folders_are_refused(example, smoke, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    assert example.main(["--smoke", "--run", str(tmp_path / "file")]) == 2
    assert (tmp_path / "file").read_text() == "kept"
    assert example.main(["--smoke", "--jobs", "1", "--run", str(smoke), "--steps", "30"]) == 2
    assert "Do choose another run folder" in capsys.readouterr().err
