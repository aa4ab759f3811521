"""Tests of `tools/benchmark.py quality`: fair configurations, statistics, resuming, tables, bad input."""

from __future__ import annotations

import argparse
import csv
import json
import math

import pytest
import torch
from benchmarks import quality
from benchmarks.quality_report import Entry, draw_quality, quality_table
from benchmarks.statistics import at_budget, interval, needed_budget
from benchmarks.tasks import TASKS
from benchmarks.trials import Trial, first_model
from helpers import load_script

from gohgraph.graphs.baselines.presets import PRESETS
from gohgraph.learning.contests.matching import count_parameters


@pytest.fixture(scope="module")
def tool():
    return load_script("tools", "benchmark")


@pytest.mark.parametrize("name", TASKS)
def test_all_variants_have_equal_parameters(name):
    task = TASKS[name]()
    configs = quality.equal_configs(task, list(PRESETS))
    counts = {variant: count_parameters(task.model(config)) for variant, config in configs.items()}
    unit = task.num_layers * (2 * task.d_model + 1)
    assert len(configs) == len(PRESETS) and max(counts.values()) - min(counts.values()) <= unit
    assert next(iter(configs)) == "plain"


@pytest.mark.parametrize("variant", ["norm-element-gate", "dcmha", "outputs-rank-16", "frozen-graph", "moh-50"])
def test_all_variants_start_from_the_same_base_weights(variant):
    task = TASKS["text"]()
    configs = quality.equal_configs(task, ["plain", variant])
    plain, own = (first_model(task, configs[name], configs["plain"], 3) for name in ("plain", variant))
    for name, parameter in plain.named_parameters():
        if "feed_forward" not in name:
            assert torch.equal(own.get_parameter(name), parameter), name
    again = first_model(task, configs[variant], configs["plain"], 3)
    assert all(map(torch.equal, own.parameters(), again.parameters()))
    other = first_model(task, configs[variant], configs["plain"], 4)
    assert not torch.equal(own.embedding.tokens.weight, other.embedding.tokens.weight)


def test_intervals_are_those_of_student():
    centre, half = interval([1.0, 2.0, 4.0, 5.0])
    # t of 3 degrees of freedom is 3.1824, the standard deviation sqrt(10/3).
    assert centre == 3.0 and half == pytest.approx(3.18245 * math.sqrt(10 / 3) / 2, rel=1e-5)
    assert math.isnan(interval([1.0])[1])


def test_curves_are_read_in_log_budget():
    curve = {0.5: 3.0, 1.0: 2.0, 4.0: 1.0}
    assert at_budget(curve, 2.0) == pytest.approx(1.5) and at_budget(curve, 1.0) == 2.0
    assert at_budget(curve, 0.4) is None and at_budget(curve, 4.1) is None and at_budget({1.0: 2.0}, 1.0) == 2.0
    assert needed_budget(curve, 1.5) == "2.00" and needed_budget(curve, 2.0) == "1.00"
    assert needed_budget(curve, 0.99) == "> 4" and needed_budget(curve, 3.01) == "< 0.5"
    for value in (2.7, 1.2):
        assert at_budget(curve, float(needed_budget(curve, value))) == pytest.approx(value, abs=0.02)


def entry(*ends, ratio=1.0, rate=0.002):
    return Entry(100, 7, rate, [[{"step": 5, "error": end}] for end in ends], [ratio, ratio, ratio])


def test_the_table_says_what_was_measured():
    entries = {"plain": entry(0.5, 0.7), "outputs": entry(0.4, 0.5, ratio=1.5, rate=0.004)}
    text = quality_table("two-cues", TASKS["two-cues"](), [0, 1], entries, {1.0: 0.6, 2.0: 0.4})
    plain, own = [line for line in text.splitlines() if line.startswith(("| plain", "| outputs"))]
    cells = [cell.strip() for cell in own.strip("|").split("|")]
    # t of 1 degree of freedom is 12.706; the differences are -0.1 and -0.2.
    assert cells[:6] == ["outputs", "0.004", "0.4500 ± 0.6353", "-0.1500 ± 0.6353", "1.50", "1.68"]
    beside = 0.6 - 0.2 * math.log2(1.5)
    assert cells[6] == f"{0.45 - beside:+.4f}"
    assert [cell.strip() for cell in plain.strip("|").split("|")][3:] == ["", "1.00", "1", ""]
    assert text.endswith("Plain attention by steps, as multiples of 150: 1: 0.6000, 2: 0.4000.")


def test_the_picture_has_a_panel_for_each_task():
    found = {"plain": entry(0.5, 0.7), "outputs": entry(0.4, 0.5), "scores": entry(0.6, 0.6)}
    figure = draw_quality({"mqar": found, "digits": found}, {"mqar": "error", "digits": "error"})
    assert [axis.get_title() for axis in figure.axes] == ["mqar", "digits"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["outputs", "scores"]


def test_trials_have_names_of_their_own():
    trials = [Trial(t, v, r, s, b) for t in "ab" for v in "cd" for r in (0.1, 0.2) for s in (0, 1) for b in (1.0, 1.5)]
    assert len({trial.name for trial in trials}) == len(trials) == 32


@pytest.fixture(scope="module")
def finished(tool, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality") / "run"
    argv = ["quality", "--smoke", "--jobs", "1", "--run", str(folder)]
    assert tool.main(argv) == 0
    return folder, argv


@pytest.mark.slow
def test_a_smoke_run_leaves_tables_results_and_a_picture(finished):
    folder, _ = finished
    assert "| outputs" in (folder / "tables.md").read_text()
    with open(folder / "results.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["variant"], row["seed"]) for row in rows] == [(v, s) for v in ("plain", "outputs") for s in "01"]
    saved = json.loads((folder / "results.json").read_text())["two-cues"]
    assert [float(row["value"]) for row in rows] == [
        log[-1]["error"] for variant in ("plain", "outputs") for log in saved[variant]["logs"]
    ]
    assert (folder / "quality.png").stat().st_size > 1000 and not list(folder.rglob("checkpoints"))


@pytest.mark.slow
def test_a_second_call_trains_nothing(finished, tool, monkeypatch):
    folder, argv = finished
    monkeypatch.setattr(quality, "run_trial", lambda *arguments, **named: pytest.fail("trained again"))
    before = {path: path.stat().st_mtime_ns for path in (folder / "results").iterdir()}
    assert tool.main(argv) == 0
    assert {path: path.stat().st_mtime_ns for path in (folder / "results").iterdir()} == before


@pytest.mark.slow
def test_the_factor_is_of_head_graphs_alone(finished, tool, tmp_path):
    folder, argv = finished
    assert tool.main([*argv[:-1], str(tmp_path / "run"), "--graph-lr-factor", "3"]) == 0
    first, other = (json.loads((run / "results.json").read_text())["two-cues"] for run in (folder, tmp_path / "run"))
    losses = [
        {name: [row["loss"] for log in found["logs"] for row in log] for name, found in run.items()}
        for run in (first, other)
    ]
    assert losses[0]["plain"] == losses[1]["plain"] and losses[0]["outputs"] != losses[1]["outputs"]


@pytest.mark.slow
def test_a_rate_at_which_the_loss_runs_away_is_not_taken(tool, tmp_path, capsys):
    flags = "--tasks two-cues --variants plain --steps 4 --seeds 0 1 --budgets --rounds 2 --jobs 1".split()
    argv = ["quality", "--run", str(tmp_path / "run"), *flags, "--rates", "1e30"]
    assert tool.main(argv) == 2
    assert "Expected a finite loss at one of the learning rates [1e+30] (got none for plain)" in capsys.readouterr().err
    argv[2] = str(tmp_path / "other")
    assert tool.main([*argv, "0.004"]) == 0
    with open(tmp_path / "other" / "results.csv", encoding="utf-8") as file:
        assert [row["rate"] for row in csv.DictReader(file)] == ["0.004", "0.004"]


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--seeds", "0", "0"], "Expected different --seeds"),
        (["--rates", "0"], "Expected --rates to be a finite number > 0"),
        (["--budgets", "-1"], "Expected --budgets to be a finite number > 0"),
        (["--graph-lr-factor", "0"], "Expected --graph-lr-factor to be a finite number > 0"),
        (["--steps", "1"], "Expected --steps to be an int >= 2"),
        (["--num-heads", "0"], "Expected --num-heads to be an int >= 1"),
        (["--num-heads", "7"], "d_model"),
        (["--jobs", "0"], "Expected --jobs to be an int >= 1"),
    ],
)
def test_bad_flags_are_refused_in_one_sentence(tool, tmp_path, capsys, flags, match):
    assert tool.main(["quality", "--run", str(tmp_path / "run"), *flags]) == 2
    assert match in capsys.readouterr().err


def test_every_field_of_a_task_can_be_overridden():
    parser = argparse.ArgumentParser()
    quality.add_flags(parser)
    given = "--steps 7 --rates 0.1 0.2 --d-model 24 --num-heads 3 --num-layers 1 --data book.txt"
    flags = parser.parse_args(given.split())
    expected = {"d_model": 24, "num_heads": 3, "num_layers": 1, "steps": 7, "learning_rates": [0.1, 0.2]}
    assert quality._options("text", flags) == {**expected, "data": "book.txt"}
    assert quality._options("mqar", flags) == expected
    sizes = TASKS["mqar"](**expected).shape()
    assert sizes == {"d_model": 24, "num_heads": 3, "num_layers": 1, "d_ff": 96}
