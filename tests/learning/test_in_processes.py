"""A contest in processes: results in files that are not made twice, and one that runs away is never taken."""

from __future__ import annotations

import json

import pytest

from gohgraph.learning.contests import in_processes
from gohgraph.learning.contests.contest import Contest, Run
from gohgraph.learning.contests.grid import Grid, Point
from gohgraph.learning.contests.in_processes import InProcesses
from gohgraph.learning.contests.sweep import sweep

SEEDS, RATES = (3, 5), (0.1, 0.2, 0.4)
# The best rate of the first seed, by name.
BEST = {"low": 0.1, "high": 0.2}


def loss_of(name: str, rate: float, seed: int) -> float:
    if rate == 0.4:
        raise FloatingPointError("Expected a finite loss (got nan at step 4). Do lower the learning rate.")
    return abs(rate - BEST[name]) * (1 if seed == SEEDS[0] else -1) + seed


def arguments(run: Run) -> dict:
    return {"name": run.name, "rate": run.rate, "seed": run.seed}


def hold(folder, function=loss_of, *, names=tuple(BEST), seeds=SEEDS, rates=RATES, loss=float, **options):
    runner = InProcesses(function, arguments, folder / "results", loss=loss, **options)
    return Contest(dict.fromkeys(names), seeds, Grid.of_rates(rates), folder).hold(runner)


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in (folder / "results").iterdir()}


def test_the_other_seeds_run_at_the_best_rate_of_the_first(tmp_path):
    results = hold(tmp_path)
    assert results == {Run(name, Point.of(learning_rate=BEST[name]), seed): seed for seed in SEEDS for name in BEST}
    tried = {f"{name}-{rate:g}-{SEEDS[0]}.json" for name in BEST for rate in RATES}
    written = {path.name for path in stamps(tmp_path)}
    assert written == tried | {f"{name}-{BEST[name]:g}-5.json" for name in BEST}
    assert json.loads((tmp_path / "results" / "low-0.4-3.json").read_text())["result"] is None
    assert (tmp_path / "rates.md").read_text().count("diverged") == 2


def test_a_second_call_runs_nothing(tmp_path):
    first = hold(tmp_path)
    before = stamps(tmp_path)
    assert hold(tmp_path, lambda **run: pytest.fail("trained again")) == first
    assert stamps(tmp_path) == before


def test_a_model_that_no_rate_trains_is_named(tmp_path):
    def lost(name, rate, seed):
        raise FloatingPointError

    with pytest.raises(ValueError, match=r"one of the learning rates \[0.1, 0.4\] \(got none for low, high\)"):
        hold(tmp_path, lost, rates=[0.4, 0.1])


def test_a_loss_that_runs_away_where_nothing_is_chosen_is_an_error(tmp_path):
    with pytest.raises(FloatingPointError, match="finite loss"):
        hold(tmp_path, rates=[0.4])

    def later(name, rate, seed):
        return loss_of(name, rate if seed == SEEDS[0] else 0.4, seed)

    with pytest.raises(FloatingPointError, match="finite loss"):
        hold(tmp_path / "later", later, rates=[0.1, 0.2])


def test_a_run_left_behind_that_has_run_away_is_not_a_result(tmp_path):
    sweep(lambda **run: None, {"low-0.1-5": {"name": "low", "rate": 0.1, "seed": 5}}, tmp_path / "results")
    with pytest.raises(FloatingPointError, match=r"others in \['low-0.1-5'\]"):
        hold(tmp_path, names=["low"], rates=[0.1])


def test_rates_may_be_chosen_by_another_loss_than_what_is_reported(tmp_path):
    """A result may hold both, measured on two parts of the data that disagree on the best rate."""
    results = hold(
        tmp_path,
        lambda name, rate, seed: {"validation_loss": rate, "choosing_loss": -rate},
        loss=lambda result: result["choosing_loss"],
    )
    assert {run.rate for run in results} == {max(RATES)}
    assert {result["validation_loss"] for result in results.values()} == {max(RATES)}


def test_results_may_have_names_of_their_own(tmp_path):
    hold(tmp_path, names=["low"], rates=[0.1], file_name=lambda run: f"text_{run.name}_{run.seed}")
    assert {path.name for path in stamps(tmp_path)} == {"text_low_3.json", "text_low_5.json"}


def test_processes_are_those_of_the_sweep(tmp_path, monkeypatch):
    jobs = []

    def in_turn(*arguments, jobs_given=jobs, **options):
        jobs_given.append(options["jobs"])
        return sweep(*arguments, **{**options, "jobs": 1})

    monkeypatch.setattr(in_processes, "sweep", in_turn)
    hold(tmp_path, jobs=3)
    assert jobs == [3, 3]
