"""Tests of `tools/benchmark.py quality`: fair configurations, statistics, resuming, tables, bad input."""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import signal
from dataclasses import replace

import pytest
import torch
from benchmarks import quality, task_runs
from benchmarks.quality_report import Entry, beside_table, draw_quality, load_lines, quality_table
from benchmarks.statistics import at_budget, holm, interval, needed_budget, paired_p
from benchmarks.task_runs import TaskRuns, equal_configs
from benchmarks.tasks import TASKS
from benchmarks.tasks.two_cues import TwoCues
from benchmarks.trials import Trial, first_model, run_trial
from helpers import load_script
from pairs import EXHAUSTIVE

from gohgraph.common.command_line import fill_in
from gohgraph.graphs.baselines.presets import PRESETS
from gohgraph.learning.contests.grid import Point
from gohgraph.learning.contests.matching import count_parameters
from gohgraph.learning.recipes import RECIPES
from gohgraph.learning.train_config import TrainConfig


@pytest.fixture(scope="module")
def tool():
    return load_script("tools", "benchmark")


# Tasks of one and the same model, to which the variants are dealt out.
HALVES = {"text": 0, "mqar": 1, "find-block": 0}


@pytest.mark.parametrize("name", TASKS)
def test_all_variants_have_equal_parameters(name):
    task = TASKS[name]()
    # What stands in the last two layers needs two; more are more of the same.
    task = replace(task, num_layers=min(task.num_layers, 2))
    names = [variant for variant in PRESETS if task.num_layers > 1 or variant != "mudd"]
    if name in HALVES and not EXHAUSTIVE:
        names = [names[0], *names[1 + HALVES[name] :: 2]]
    configs = equal_configs(task, names)
    counts = {variant: count_parameters(task.model(config)) for variant, config in configs.items()}
    stacks = 2 if name == "translation" else 1
    unit = stacks * task.num_layers * (2 * task.d_model + 1)
    assert len(configs) == len(names) and max(counts.values()) - min(counts.values()) <= unit
    assert next(iter(configs)) == "plain"


@pytest.mark.parametrize("variant", ["norm-element-gate", "dcmha", "outputs-rank-16", "frozen-graph", "moh-50"])
def test_all_variants_start_from_the_same_base_weights(variant):
    task = TASKS["text"]()
    configs = equal_configs(task, ["plain", variant])
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


def test_p_values_are_those_of_a_paired_t_test():
    # scipy.stats.ttest_1samp; t of 1 degree of freedom is Cauchy's.
    assert paired_p([0.1, 0.2, 0.4, 0.3]) == pytest.approx(0.03046629166217096, rel=1e-9)
    assert paired_p([1.0, 3.0]) == pytest.approx(1 - 2 * math.atan(2.0) / math.pi, rel=1e-9)
    assert paired_p([-0.1, 0.1]) == 1 and paired_p([0.0, 0.0]) == 1 and paired_p([0.5, 0.5]) == 0
    assert math.isnan(paired_p([0.1]))


def test_p_values_are_corrected_for_their_number():
    # The example of R's p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05), "holm").
    assert holm([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == [] and holm([0.3]) == [0.3]


def test_curves_are_read_in_log_budget():
    curve = {0.5: 3.0, 1.0: 2.0, 4.0: 1.0}
    assert at_budget(curve, 2.0) == pytest.approx(1.5) and at_budget(curve, 1.0) == 2.0
    assert at_budget(curve, 0.4) is None and at_budget(curve, 4.1) is None and at_budget({1.0: 2.0}, 1.0) == 2.0
    assert needed_budget(curve, 1.5) == "2.00" and needed_budget(curve, 2.0) == "1.00"
    assert needed_budget(curve, 0.99) == "> 4" and needed_budget(curve, 3.01) == "< 0.5"
    for value in (2.7, 1.2):
        assert at_budget(curve, float(needed_budget(curve, value))) == pytest.approx(value, abs=0.02)


def entry(*ends, ratio=1.0, rate=0.002, **more):
    logs = [[{"step": 5, "error": end}] for end in ends]
    return Entry(100, 7, {"learning_rate": rate}, logs, [ratio, ratio, ratio], 1234.5, **more)


def test_the_table_says_what_was_measured():
    entries = {"plain": entry(0.5, 0.7), "outputs": entry(0.4, 0.5, ratio=1.5, rate=0.004)}
    text = quality_table("two-cues", TASKS["two-cues"](), [0, 1], entries, {1.0: 0.6, 2.0: 0.4})
    plain, own = [line for line in text.splitlines() if line.startswith(("| plain", "| outputs"))]
    cells = [cell.strip() for cell in own.strip("|").split("|")]
    # t of 1 degree of freedom is 12.706; the differences are -0.1 and -0.2, so t is -3.
    p = f"{1 - 2 * math.atan(3) / math.pi:.3g}"
    shown = ["outputs", "0.004", "0.4500 ± 0.6353", "-0.1500 ± 0.6353", f"{p} ({p})", "1.50", "1,234", "1.68"]
    assert cells[:8] == shown
    beside = 0.6 - 0.2 * math.log2(1.5)
    assert cells[8] == f"{0.45 - beside:+.4f}"
    assert [cell.strip() for cell in plain.strip("|").split("|")][3:] == ["", "", "1.00", "1,234", "1", ""]
    assert "1 comparisons; rates: learning_rate, * at the border" in text
    assert text.endswith("as multiples of 150, on the first three seeds: 1: 0.6000, 2: 0.4000.")


@pytest.mark.parametrize("shift", [0.0, -0.3, 0.3])
def test_more_steps_are_held_against_what_a_variant_changes_on_the_same_seeds(shift):
    # The curve is of fewer seeds, whose mean may be another.
    entries = {"plain": entry(0.5, 0.7), "outputs": entry(0.4, 0.5, ratio=1.5), "scores": entry(0.6, 0.7, ratio=1.5)}
    text = quality_table("two-cues", TASKS["two-cues"](), [0, 1], entries, {1.0: 0.6 + shift, 2.0: 0.4 + shift})
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    needed = {row[0]: row[7] for row in rows if row[0] in entries}
    assert needed == {"plain": "1", "outputs": "1.68", "scores": "< 1"}


def test_a_curve_of_one_point_has_no_columns():
    entries = {"plain": entry(0.5, 0.7), "outputs": entry(0.4, 0.5)}
    text = quality_table("two-cues", TASKS["two-cues"](), [0, 1], entries, {1.0: 0.9})
    assert "steps plain needs" not in text and "equal time" not in text and "by steps" not in text


def test_the_table_shows_borders_runs_of_equal_time_and_bleu():
    shorter = [[{"error": 0.45}], [{"error": 0.75}]]
    entries = {"plain": entry(0.5, 0.7), "outputs": entry(0.4, 0.5, border=["learning_rate"], equal_time_logs=shorter)}
    entries["outputs"].point["graph_lr_factor"] = 0.25
    for own in entries.values():
        own.logs[0][-1]["bleu"], own.logs[1][-1]["bleu"] = 30.0, 32.0
    text = quality_table("two-cues", TASKS["two-cues"](), [0, 1], entries, {1.0: 0.6})
    (own,) = [line for line in text.splitlines() if line.startswith("| outputs")]
    cells = [cell.strip() for cell in own.strip("|").split("|")]
    assert cells[1] == "0.002* / 0.25" and cells[7] == "+0.0000 ± 0.6353" and cells[8] == "31.00 ± 12.71"
    assert "rates: learning_rate / graph_lr_factor" in text


def test_routed_variants_tell_their_load():
    def entry_of(*loads):
        logs = [[{"error": 0.5, "worst_load_cv": 7.0}, {"error": 0.5, "worst_load_cv": load}] for load in loads]
        return Entry(100, 7, {"learning_rate": 0.002}, logs, [1.0, 1.0, 1.0])

    entries = {"plain": entry(0.5, 0.7), "moh-75": entry_of(0.125, 0.254), "moh-50": entry_of(0.5, 0.25)}
    (line,) = load_lines(entries)
    assert line.endswith("worst layer of the worst seed: moh-75 0.25, moh-50 0.50.")
    assert quality_table("two-cues", TASKS["two-cues"](), [0, 1], entries, {1.0: 0.6}).endswith(line)


def test_a_second_table_has_training_and_the_part_that_rates_are_chosen_on():
    entries = {"plain": entry(0.5, 0.7), "outputs": entry(0.4, 0.5)}
    for name, training, choosing in (("plain", (1.5, 1.7), (0.3, 0.5)), ("outputs", (1.4, 1.5), (0.5, 0.8))):
        for log, loss, chosen in zip(entries[name].logs, training, choosing, strict=True):
            log[-1] |= {"loss": loss, "choosing_error": chosen}
    head, _, plain, own = [line for line in beside_table(TASKS["two-cues"](), entries).splitlines() if line[:1] == "|"]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, plain, own)]
    assert cells[0] == ["attention", "loss", "minus plain", "choosing error", "minus plain"]
    assert cells[1] == ["plain", "1.6000 ± 1.2706", "", "0.4000 ± 1.2706", ""]
    # Differences of -0.1 and -0.2, and of 0.2 and 0.3; t of 1 degree of freedom is 12.706.
    assert cells[2] == ["outputs", "1.4500 ± 0.6353", "-0.1500 ± 0.6353", "0.6500 ± 1.9059", "+0.2500 ± 0.6353"]


def test_the_picture_has_a_panel_for_each_task():
    found = {"plain": entry(0.5, 0.7), "outputs": entry(0.4, 0.5), "scores": entry(0.6, 0.6)}
    figure = draw_quality({"mqar": found, "digits": found}, {"mqar": "error", "digits": "error"})
    assert [axis.get_title() for axis in figure.axes] == ["mqar", "digits"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["outputs", "scores"]


def test_trials_have_names_of_their_own():
    points = [Point.of(learning_rate=0.1), Point.of(learning_rate=0.1, matrix_learning_rate=0.2)]
    trials = [Trial(t, v, p, s, b) for t in "ab" for v in "cd" for p in points for s in (0, 1) for b in (1.0, 1.5)]
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
    text = (folder / "tables.md").read_text()
    assert text.count("\n| outputs") == 2 and "Beside it: in training" in text
    with open(folder / "results.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["variant"], row["seed"]) for row in rows] == [(v, s) for v in ("plain", "outputs") for s in "01"]
    saved = json.loads((folder / "results.json").read_text())["two-cues"]
    assert [float(row["value"]) for row in rows] == [
        log[-1]["error"] for variant in ("plain", "outputs") for log in saved[variant]["logs"]
    ]
    assert (folder / "quality.png").stat().st_size > 1000 and not list(folder.rglob("checkpoints"))
    # What keeps it under a minute: six trainings of so many steps.
    steps = [int(count) for count in re.findall(r", (\d+) steps in ", (folder / "log.txt").read_text())]
    assert sorted(steps) == [4, 4, 4, 4, 8, 8]


@pytest.mark.slow
def test_a_second_call_trains_nothing(finished, tool, monkeypatch):
    folder, argv = finished
    monkeypatch.setattr(task_runs, "run_trial", lambda *arguments, **named: pytest.fail("trained again"))
    before = {path: path.stat().st_mtime_ns for path in (folder / "results").iterdir()}
    assert tool.main(argv) == 0
    assert {path: path.stat().st_mtime_ns for path in (folder / "results").iterdir()} == before


def runs_of_two_cues(tmp_path, monkeypatch, *given, train=None):
    """The runs of `two-cues`, trained by a function in place of `run_trial`, without timing."""
    parser = argparse.ArgumentParser()
    quality.add_flags(parser)
    monkeypatch.setattr(task_runs, "run_trial", train)
    flags = ["--recipe", "old", "--run", str(tmp_path), "--seeds", "0", "1", "--variants", "plain", "outputs"]
    parsed = parser.parse_args([*flags, *given])
    quality.fill_in(parsed, quality.FULL)
    quality._check(parsed)
    return TaskRuns("two-cues", quality._options("two-cues", parsed), parsed)


def rates_of(runs):
    return {name: point["learning_rate"] for name, point in runs.points.items()}


def test_each_variant_takes_the_rate_of_its_lowest_measure_on_the_choosing_part(tmp_path, monkeypatch):
    """What is reported would choose otherwise; a rate at which the loss runs away is never taken."""

    def train(folder, name, *, training, config, **others):
        rate = training["learning_rate"]
        if rate == 1.0:
            raise FloatingPointError
        error = abs(rate - (0.1 if config["head_graph"] is None else 0.2))
        measured = {"choosing_error": error, "error": -error, "validation_loss": -error}
        return [{"step": 1, "error": 1.0}, {"step": 2, **measured}]

    runs = runs_of_two_cues(tmp_path, monkeypatch, "--rates", "0.1", "0.2", "1", train=train)
    assert rates_of(runs) == {"plain": 0.1, "outputs": 0.2}
    assert (tmp_path / "two-cues" / "rates.md").read_text().count("diverged") == 2
    tried = {f"two-cues_{name}_{rate}_0.json" for name in ("plain", "outputs") for rate in ("0.1", "0.2", "1")}
    others = {"two-cues_plain_0.1_1.json", "two-cues_outputs_0.2_1.json"}
    assert {path.name for path in (tmp_path / "results").iterdir()} == tried | others
    monkeypatch.setattr(TwoCues, "chosen_by", "validation_loss")
    again = runs_of_two_cues(tmp_path, monkeypatch, "--rates", "0.1", "0.2", "1", train=train)
    assert rates_of(again) == {"plain": 0.2, "outputs": 0.1}

    def lost(*_, **__):
        raise FloatingPointError

    with pytest.raises(ValueError, match="got none for plain, outputs"):
        runs_of_two_cues(tmp_path / "lost", monkeypatch, "--rates", "1", "2", train=lost)


LOG = [{"step": 2, "error": 0.5, "choosing_error": 0.5, "seconds": 3.0}]


def test_results_on_disk_are_what_they_were(tmp_path, monkeypatch):
    """Names and arguments by which a folder that is already there is continued."""
    given = {}

    def train(folder, name, **arguments):
        given[name] = arguments
        return LOG

    runs = runs_of_two_cues(tmp_path, monkeypatch, "--rates", "0.1", "--steps", "7", train=train)
    saved = json.loads((tmp_path / "results" / "two-cues_outputs_0.1_1.json").read_text())
    training = {"steps": 7, "graph_lr_factor": 1.0, "warmup": 0, "learning_rate": 0.1, **RECIPES["old"].training}
    assert saved == {
        "arguments": {
            "name": "two-cues_outputs_0.1_1", "task": "two-cues", "options": {"steps": 7, "learning_rates": [0.1]},
            "config": runs.configs["outputs"].to_dict(), "plain": runs.configs["plain"].to_dict(),
            "training": training, "seed": 1, "threads": 1,
        },
        "result": LOG,
    }  # fmt: skip
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert len(lines) == 4
    assert lines[-1].endswith("two-cues_outputs_0.1_1: error 0.5000, choosing_error 0.5000, 2 steps in 3 s")

    for path in (tmp_path / "results").iterdir():
        before_the_field = json.loads(path.read_text())
        for config in ("config", "plain"):
            assert before_the_field["arguments"][config].pop("residual") == "plain"
        path.write_text(json.dumps(before_the_field))
    runs_of_two_cues(tmp_path, monkeypatch, "--rates", "0.1", "--steps", "7", train=pytest.fail)


def test_the_factor_is_handed_to_every_run(tmp_path, monkeypatch):
    factors = []

    def train(folder, name, *, training, **others):
        factors.append(training["graph_lr_factor"])
        return LOG

    runs_of_two_cues(tmp_path, monkeypatch, "--rates", "0.1", "--graph-lr-factor", "3", train=train)
    assert factors == [3.0] * 4


def test_what_is_searched_for_graphs_is_not_searched_for_plain_attention(tmp_path, monkeypatch):
    tried = {"plain": [], "outputs": []}

    def train(folder, name, *, training, config, **others):
        point = training["learning_rate"], training["graph_lr_factor"]
        tried["plain" if config["head_graph"] is None else "outputs"].append(point)
        return [{**LOG[0], "choosing_error": sum(point)}]

    grid = ["--rates", "0.1", "0.2", "--grid", "graph_lr_factor=0.25,1"]
    runs = runs_of_two_cues(tmp_path, monkeypatch, *grid, train=train)
    assert tried == {
        "plain": [(0.1, 1.0), (0.2, 1.0), (0.1, 1.0)],
        "outputs": [(0.1, 0.25), (0.2, 0.25), (0.1, 1.0), (0.1, 0.25)],
    }
    assert {name: str(point) for name, point in runs.points.items()} == {"plain": "0.1", "outputs": "0.1-0.25"}


@pytest.mark.parametrize(
    ("variant", "searched"),
    [("outputs", True), ("element-gate", True), ("value-residual", True), ("moh-50", True)]
    + [("xsa", False), ("hyper-connections", False), ("plain", False)],
)
def test_the_rate_of_graphs_is_searched_where_something_learns_at_it(tmp_path, monkeypatch, variant, searched):
    grid = ["--rates", "0.1", "--grid", "graph_lr_factor=0.25,1", "--variants", variant]
    runs = runs_of_two_cues(tmp_path, monkeypatch, *grid, train=lambda *_, **__: LOG)
    assert ("graph_lr_factor" in runs.grids[variant].settings) is searched


@pytest.mark.parametrize(
    ("variant", "searched"),
    [("outputs", {"graph_lr_factor", "graph_matrix_lr_factor"}), ("element-gate", {"graph_matrix_lr_factor"})]
    + [("talking-heads", {"graph_lr_factor"}), ("xsa", set())],
)
def test_both_rates_of_graphs_are_searched_where_something_learns_at_them(tmp_path, monkeypatch, variant, searched):
    grid = ["graph_lr_factor=0.25,1", "graph_matrix_lr_factor=0.5", "--variants", variant]
    runs = runs_of_two_cues(tmp_path, monkeypatch, "--rates", "0.1", "--grid", *grid, train=lambda *_, **__: LOG)
    assert set(runs.grids[variant].settings) & {"graph_lr_factor", "graph_matrix_lr_factor"} == searched


def test_equal_time_is_a_whole_training_of_fewer_steps(tmp_path, monkeypatch):
    steps = {}

    def train(folder, name, *, training, **others):
        steps[name] = training["steps"]
        return LOG

    runs = runs_of_two_cues(tmp_path, monkeypatch, "--rates", "0.1", "--equal-time", "--steps", "100", train=train)
    seconds = {"plain": [0.1, 0.1], "outputs": [0.125, 0.125]}
    monkeypatch.setattr(runs, "_seconds", lambda variants: seconds)
    entries = runs.entries()
    assert steps["two-cues_outputs_0.1_1_x0.8"] == 80 and len(entries["outputs"].equal_time_logs) == 2
    assert entries["plain"].equal_time_logs is None
    # 64 episodes of 17 positions.
    assert entries["outputs"].tokens_per_second == pytest.approx(64 * 17 / 0.125)
    # Measured once: a second call trains and times nothing.
    monkeypatch.setattr(runs, "_seconds", lambda variants: pytest.fail("timed again"))
    assert runs.entries() == entries


@pytest.mark.parametrize("variant", ["plain", "outputs"])
def test_the_modern_recipe_is_handed_to_model_and_training(tmp_path, monkeypatch, variant):
    seen = {}

    def train(folder, name, *, training, config, **others):
        seen[name] = (config, training)
        return LOG

    grid = ["--rates", "0.004", "--grid", "matrix_learning_rate=0.02", "graph_lr_factor=0.25", "--rounds", "2"]
    runs = runs_of_two_cues(tmp_path, monkeypatch, "--recipe", "modern", "--steps", "40", *grid, train=train)
    config, training = seen[f"two-cues_{variant}_{runs.points[variant]}_1"]
    assert config["qk_norm"] and config["init"] == "fan-in"
    assert TrainConfig(**training).optimizer == "muon" and training["matrix_learning_rate"] == 0.02
    assert training["warmup"] == 2
    assert training["graph_lr_factor"] == (0.25 if variant == "outputs" else 1.0)
    log = run_trial(
        str(tmp_path / "runs"), variant, "two-cues", {}, config, runs.configs["plain"].to_dict(), training, seed=0
    )
    assert len(log) == 10 and log[-1]["loss"] < log[0]["loss"]
    assert all(seconds == seconds for seconds in runs._seconds(["outputs"])["outputs"])


def test_what_scores_start_with_is_searched_and_is_the_models(tmp_path, monkeypatch):
    seen = {}

    def train(folder, name, *, training, config, plain, **others):
        seen[name] = (config["qk_norm"], plain["qk_norm"])
        assert "qk_norm" not in training
        return LOG

    grid = ["--rates", "0.1", "--grid", "graph_lr_factor=1", "qk_norm=0.25,0.5"]
    runs = runs_of_two_cues(tmp_path, monkeypatch, *grid, train=train)
    # Weights that are plain attention's start where its own do: at the same gain.
    assert seen["two-cues_outputs_0.1-1-0.25_0"] == (0.25, 0.25) and seen["two-cues_plain_0.1-0.5_0"] == (0.5, 0.5)
    assert runs._seconds(["outputs"])["outputs"]


def test_rates_of_the_command_line_go_over_the_recipes(tmp_path, monkeypatch):
    given = ["--recipe", "modern", "--rates", "0.1", "--grid", "matrix_learning_rate=0.3"]
    runs = runs_of_two_cues(tmp_path, monkeypatch, *given, train=lambda *_, **__: LOG)
    assert runs.grids["plain"].settings == {"learning_rate": (0.1,), "matrix_learning_rate": (0.3,)}
    assert runs.grids["outputs"].settings["graph_lr_factor"] == (0.25, 1.0)
    own = runs_of_two_cues(tmp_path / "own", monkeypatch, "--recipe", "modern", train=lambda *_, **__: LOG)
    assert own.grids["plain"].settings == TwoCues.grid


def test_models_have_the_parameters_asked_for():
    task = TASKS["two-cues"]()
    for config in equal_configs(task, ["outputs"], parameters=70_000).values():
        assert abs(count_parameters(task.model(config)) - 70_000) <= 2 * task.d_model + 1
    with pytest.raises(ValueError, match="at most 20000 parameters"):
        equal_configs(task, ["outputs"], parameters=20_000)


def test_an_interrupted_run_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    """SIGTERM in the middle of a run: it leaves a checkpoint, and the log becomes that of an uninterrupted one."""
    task = TASKS["two-cues"]()
    config = task.config().to_dict()
    call = {"task": "two-cues", "options": {}, "config": config, "plain": config, "seed": 0}
    call["training"] = {"steps": 20, "learning_rate": 4e-3}
    whole = run_trial(str(tmp_path), "whole", **call)
    batch, asked = TwoCues.batch, []

    def stop(self, index, seed):
        asked.append(index)
        if len(asked) == 13:
            signal.raise_signal(signal.SIGTERM)
        return batch(self, index, seed)

    monkeypatch.setattr(TwoCues, "batch", stop)
    with pytest.raises(KeyboardInterrupt):
        run_trial(str(tmp_path), "stopped", **call)
    resumed = run_trial(str(tmp_path), "stopped", **call)
    assert asked == list(range(20))
    timed = ("seconds", "tokens_per_second")
    without = [[{k: v for k, v in row.items() if k not in timed} for row in rows] for rows in (whole, resumed)]
    assert without[0] == without[1] and len(whole) == 10


def test_the_factor_is_of_head_graphs_alone(tmp_path):
    task = TASKS["two-cues"]()
    configs = equal_configs(task, ["plain", "outputs"])

    def losses(variant, factor):
        own, plain = (configs[name].to_dict() for name in (variant, "plain"))
        training = {"learning_rate": 4e-3, "steps": 4, "graph_lr_factor": factor}
        log = run_trial(str(tmp_path / str(factor)), variant, "two-cues", {}, own, plain, training, seed=0)
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
        (["--num-kv-heads", "3"], "Expected num_kv_heads to divide num_heads = 8"),
        (["--grid", "rate=1"], "Expected one of ['learning_rate'"),
        (["--grid", "weight_decay=a"], "Expected numbers after '='"),
        (["--grid", "graph_lr_factor=1,1"], "Expected different --graph-lr-factors above 0"),
        (["--parameters", "0"], "Expected --parameters to be an int >= 1"),
        (["--jobs", "0"], "Expected --jobs to be an int >= 1"),
    ],
)
def test_bad_flags_are_refused_in_one_sentence(tool, tmp_path, capsys, flags, match):
    assert tool.main(["quality", "--run", str(tmp_path / "run"), *flags]) == 2
    assert match in capsys.readouterr().err


def test_text_is_of_many_documents_unless_told_otherwise_and_small_in_a_smoke_run():
    parser = argparse.ArgumentParser()
    quality.add_flags(parser)
    for defaults, data in ((quality.FULL, "python-packages"), ({**quality.FULL, **quality.SMOKE}, "python-docs")):
        flags = parser.parse_args([])
        fill_in(flags, defaults)
        assert quality._options("text", flags)["data"] == data


def test_every_field_of_a_task_can_be_overridden():
    parser = argparse.ArgumentParser()
    quality.add_flags(parser)
    shape = "--d-model 24 --num-heads 6 --num-kv-heads 3 --num-layers 1 --d-ff 32 --length 11"
    given = f"--steps 7 --rates 0.1 0.2 --batch-size 5 {shape}"
    flags = parser.parse_args([*given.split(), "--data", "book.txt", "--pairs", "folder"])
    sizes = {"d_model": 24, "num_heads": 6, "num_kv_heads": 3, "num_layers": 1, "d_ff": 32}
    expected = {**sizes, "steps": 7, "batch_size": 5, "learning_rates": [0.1, 0.2]}
    assert quality._options("text", flags) == {**expected, "length": 11, "data": "book.txt"}
    assert quality._options("mqar", flags) == expected
    assert quality._options("translation", flags) == {**expected, "pairs": "folder"}
    assert TASKS["mqar"](**expected).shape() == sizes
    assert [TASKS[name]().shape()["d_ff"] for name in ("mqar", "two-cues", "translation")] == [256, 128, 256]
