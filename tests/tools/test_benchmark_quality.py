"""Tests of `tools/benchmark.py quality`: fair configurations, statistics, resuming, tables, bad input."""

from __future__ import annotations

import argparse
import csv
import json
import math

import pytest
import torch
from benchmarks import quality
from benchmarks.quality_report import Entry, draw_quality, load_lines, quality_table
from benchmarks.statistics import at_budget, interval, needed_budget
from benchmarks.tasks import TASKS
from benchmarks.tasks.two_cues import TwoCues
from benchmarks.trials import Trial, first_model, run_trial
from helpers import load_script

from gohgraph.graphs.baselines.presets import PRESETS
from gohgraph.learning.contests.matching import count_parameters


@pytest.fixture(scope="module")
def tool():
    return load_script("tools", "benchmark")


@pytest.mark.parametrize("name", TASKS)
def test_all_variants_have_equal_parameters(name):
    task = TASKS[name]()
    # What stands in the last two layers needs two.
    names = [variant for variant in PRESETS if task.num_layers > 1 or variant != "mudd-values"]
    configs = quality.equal_configs(task, names)
    counts = {variant: count_parameters(task.model(config)) for variant, config in configs.items()}
    unit = task.num_layers * (2 * task.d_model + 1)
    assert len(configs) == len(names) and max(counts.values()) - min(counts.values()) <= unit
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


def test_routed_variants_tell_their_load():
    def entry_of(*loads):
        logs = [[{"error": 0.5, "worst_load_cv": 7.0}, {"error": 0.5, "worst_load_cv": load}] for load in loads]
        return Entry(100, 7, 0.002, logs, [1.0, 1.0, 1.0])

    entries = {"plain": entry(0.5, 0.7), "moh-75": entry_of(0.125, 0.254), "moh-50": entry_of(0.5, 0.25)}
    (line,) = load_lines(entries)
    assert line.endswith("worst layer of the worst seed: moh-75 0.25, moh-50 0.50.")
    assert quality_table("two-cues", TASKS["two-cues"](), [0, 1], entries, {1.0: 0.6}).endswith(line)


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


def task_runs(tmp_path, monkeypatch, *given, train=None):
    """The runs of `two-cues`, trained by a function in place of `run_trial`, without timing."""
    parser = argparse.ArgumentParser()
    quality.add_flags(parser)
    monkeypatch.setattr(quality, "run_trial", train)
    flags = ["--run", str(tmp_path), "--seeds", "0", "1", "--variants", "plain", "outputs", "--jobs", "1", *given]
    return quality.TaskRuns("two-cues", parser.parse_args(flags))


def test_each_variant_takes_the_rate_of_its_lowest_measure(tmp_path, monkeypatch):
    """The loss would choose otherwise; a rate at which it runs away is never taken."""

    def train(folder, name, *, rate, config, **others):
        if rate == 1.0:
            raise FloatingPointError
        error = abs(rate - (0.1 if config["head_graph"] is None else 0.2))
        return [{"step": 1, "error": 1.0}, {"step": 2, "error": error, "validation_loss": -error}]

    runs = task_runs(tmp_path, monkeypatch, "--rates", "0.1", "0.2", "1", train=train)
    assert runs.rates == {"plain": 0.1, "outputs": 0.2}
    assert (tmp_path / "two-cues" / "rates.md").read_text().count("diverged") == 2
    tried = {f"two-cues_{name}_{rate}_0.json" for name in ("plain", "outputs") for rate in ("0.1", "0.2", "1")}
    others = {"two-cues_plain_0.1_1.json", "two-cues_outputs_0.2_1.json"}
    assert {path.name for path in (tmp_path / "results").iterdir()} == tried | others
    monkeypatch.setattr(TwoCues, "chosen_by", "validation_loss")
    assert task_runs(tmp_path, monkeypatch, "--rates", "0.1", "0.2", "1", train=train).rates == {
        "plain": 0.2, "outputs": 0.1
    }  # fmt: skip

    def lost(*_, **__):
        raise FloatingPointError

    with pytest.raises(ValueError, match="got none for plain, outputs"):
        task_runs(tmp_path / "lost", monkeypatch, "--rates", "1", "2", train=lost)


def test_results_on_disk_are_what_they_were(tmp_path, monkeypatch):
    """Names and arguments by which a folder that is already there is continued."""
    given = {}

    def train(folder, name, **arguments):
        given[name] = arguments
        return [{"step": 2, "error": 0.5}]

    runs = task_runs(tmp_path, monkeypatch, "--rates", "0.1", "--steps", "7", train=train)
    saved = json.loads((tmp_path / "results" / "two-cues_outputs_0.1_1.json").read_text())
    assert saved == {
        "arguments": {
            "name": "two-cues_outputs_0.1_1", "task": "two-cues", "options": {"steps": 7, "learning_rates": [0.1]},
            "config": runs.configs["outputs"].to_dict(), "plain": runs.configs["plain"].to_dict(),
            "rate": 0.1, "seed": 1, "steps": 7, "graph_lr_factor": 1.0,
        },
        "result": [{"step": 2, "error": 0.5}],
    }  # fmt: skip


def test_the_factor_is_handed_to_every_run(tmp_path, monkeypatch):
    factors = []

    def train(folder, name, *, graph_lr_factor, **others):
        factors.append(graph_lr_factor)
        return [{"error": 0.5}]

    task_runs(tmp_path, monkeypatch, "--rates", "0.1", "--graph-lr-factor", "3", train=train)
    assert factors == [3.0] * 4


def test_the_factor_is_of_head_graphs_alone(tmp_path):
    task = TASKS["two-cues"]()
    configs = quality.equal_configs(task, ["plain", "outputs"])

    def losses(variant, factor):
        own, plain = (configs[name].to_dict() for name in (variant, "plain"))
        settings = {"rate": 4e-3, "seed": 0, "steps": 4, "graph_lr_factor": factor}
        log = run_trial(str(tmp_path / str(factor)), variant, "two-cues", {}, own, plain, **settings)
        return [row["loss"] for row in log]

    assert losses("plain", 1.0) == losses("plain", 3.0)
    assert losses("outputs", 1.0) != losses("outputs", 3.0)


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
