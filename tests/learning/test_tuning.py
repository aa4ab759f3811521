"""Learning rates are chosen on the first seed alone, and one at which the loss runs away never is."""

from __future__ import annotations

import json
import math

import pytest

from gohgraph.learning.contests.sweep import sweep
from gohgraph.learning.contests.tuning import best_rates, check_rates, tuned_sweep

SEEDS, RATES = (3, 5), (0.1, 0.2, 0.4)
# The best rate of the first seed, by name.
BEST = {"low": 0.1, "high": 0.2}


def loss_of(name: str, rate: float, seed: int) -> float:
    if rate == 0.4:
        raise FloatingPointError("Expected a finite loss (got nan at step 4). Do lower the learning rate.")
    return abs(rate - BEST[name]) * (1 if seed == SEEDS[0] else -1) + seed


def runs(names=tuple(BEST), seeds=SEEDS, rates=RATES):
    return {
        (name, rate, seed): {"name": name, "rate": rate, "seed": seed}
        for seed in seeds for name in names for rate in rates
    }  # fmt: skip


def test_the_other_seeds_run_at_the_best_rate_of_the_first(tmp_path):
    rates, results = tuned_sweep(loss_of, runs(), tmp_path, loss=lambda loss: loss)
    assert rates == BEST
    assert results == {(name, seed): seed for seed in SEEDS for name in BEST}
    tried = {f"{name}-{rate:g}-{SEEDS[0]}.json" for name in BEST for rate in RATES}
    assert {path.name for path in tmp_path.iterdir()} == tried | {f"{name}-{BEST[name]:g}-5.json" for name in BEST}
    assert json.loads((tmp_path / "low-0.4-3.json").read_text())["result"] is None


def test_a_second_call_runs_nothing(tmp_path):
    first = tuned_sweep(loss_of, runs(), tmp_path, loss=lambda loss: loss)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert tuned_sweep(loss_of, runs(), tmp_path, loss=lambda loss: loss) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_model_that_no_rate_trains_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"one of the learning rates \[0.4\] \(got none for low, high\)"):
        tuned_sweep(loss_of, runs(rates=[0.4]), tmp_path, loss=lambda loss: loss)


def test_a_loss_that_runs_away_on_a_later_seed_is_an_error(tmp_path):
    later = {**runs(("low",), SEEDS[:1], [0.1]), ("low", 0.1, 5): {"name": "low", "rate": 0.4, "seed": 5}}
    with pytest.raises(FloatingPointError, match="finite loss"):
        tuned_sweep(loss_of, later, tmp_path, loss=lambda loss: loss)


def test_a_run_left_behind_that_has_run_away_is_not_a_result(tmp_path):
    sweep(lambda seed: None, {"low-0.1-5": {"seed": 5}}, tmp_path)
    with pytest.raises(FloatingPointError, match=r"others in \['low-0.1-5'\]"):
        tuned_sweep(float, {("low", 0.1, 3): {}, ("low", 0.1, 5): {"seed": 5}}, tmp_path, loss=lambda loss: loss)


LOST = {"lost": {"name": "low", "rate": 0.4, "seed": 0}}


def test_a_sweep_stops_at_a_loss_that_runs_away(tmp_path):
    with pytest.raises(FloatingPointError):
        sweep(loss_of, LOST, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_sweep_goes_on_where_losses_may_run_away(tmp_path, jobs):
    assert sweep(loss_of, LOST, tmp_path, jobs=jobs, may_diverge=True) == {"lost": None}


def test_the_lowest_finite_loss_is_the_best():
    losses = {("goh", 0.1): math.inf, ("goh", 0.2): 3.0, ("plain", 0.1): 2.0, ("plain", 0.2): math.nan}
    assert best_rates(losses) == {"goh": 0.2, "plain": 0.1}


@pytest.mark.parametrize("rates", [[0.1, 0.1], [0.0], [-0.1, 0.1], [float("nan")], [float("inf"), 1.0]])
def test_impossible_rates_are_refused(rates):
    with pytest.raises(ValueError, match="different --learning-rates above 0"):
        check_rates(rates)
