"""The policy of a contest, whoever trains: every model at its best rate of a grid, chosen on the first seed alone."""

from __future__ import annotations

import math

import pytest

from gohgraph.learning.contests.contest import Contest, Run
from gohgraph.learning.contests.grid import Grid, Point

SEEDS, RATES = (3, 5, 7), (0.1, 0.2, 0.4)
# The loss of a model at a rate on the first seed; on the others every other rate would be better.
LOSSES = {"low": {0.1: 1.0, 0.2: 2.0, 0.4: math.inf}, "high": {0.1: math.nan, 0.2: 4.0, 0.4: 3.0}}
BEST = {"low": 0.1, "high": 0.4}
GRID = Grid.of_rates(RATES)


def at(rate):
    return Point.of(learning_rate=rate)


class Recorder:
    """A runner that trains nothing and remembers what it was asked for."""

    def __init__(self):
        self.tried, self.trained = [], []

    def try_rates(self, runs):
        self.tried += runs
        return {run: LOSSES[run.name][run.rate] if run.seed == SEEDS[0] else -run.rate for run in runs}

    def train(self, runs):
        self.trained += runs
        return {run: f"result of {run.file_name}" for run in runs}


@pytest.fixture
def runner():
    return Recorder()


def test_the_first_seed_tries_all_rates_and_all_seeds_train_at_the_best(runner, tmp_path, capsys):
    results = Contest(dict.fromkeys(LOSSES), SEEDS, GRID, tmp_path / "contest").hold(runner)
    assert runner.tried == [Run(name, at(rate), 3) for name in LOSSES for rate in RATES]
    assert runner.trained == [Run(name, at(BEST[name]), seed) for seed in SEEDS for name in LOSSES]
    assert results == {run: f"result of {run.file_name}" for run in runner.trained}
    assert list(results) == runner.trained
    written = (tmp_path / "contest" / "rates.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in written.splitlines()]
    assert rows[2:] == [["low", "1.0000", "2.0000", "diverged"], ["high", "diverged", "4.0000", "3.0000"]]
    assert written in capsys.readouterr().out


def test_of_one_rate_nothing_is_chosen(runner, tmp_path):
    results = Contest(dict.fromkeys(LOSSES), SEEDS, Grid.of_rates([0.2]), tmp_path).hold(runner)
    assert runner.tried == [] and list(results) == [Run(name, at(0.2), seed) for seed in SEEDS for name in LOSSES]
    assert not list(tmp_path.iterdir())


def test_no_finite_rate_is_an_error_that_leaves_the_table(runner, tmp_path, monkeypatch):
    monkeypatch.setitem(LOSSES, "low", dict.fromkeys(RATES, math.inf))
    with pytest.raises(ValueError, match=r"finite loss at one of the learning rates .* \(got none for low\)"):
        Contest(dict.fromkeys(LOSSES), SEEDS, GRID, tmp_path).hold(runner)
    assert runner.trained == [] and "diverged" in (tmp_path / "rates.md").read_text()


def test_each_model_searches_its_own_grid(tmp_path):
    """Rates of matrices move the search, a model with nothing to choose is not tried, and the table holds both."""

    class TwoRates(Recorder):
        def try_rates(self, runs):
            self.tried.append([str(run.point) for run in runs])
            return {run: abs(run.point["matrix_learning_rate"] - 10 * run.rate) - run.rate for run in runs}

    runner, both = TwoRates(), Grid({"learning_rate": RATES, "matrix_learning_rate": (1.0, 2.0, 4.0)})
    contest = Contest({"goh": None, "still": None}, SEEDS, {"goh": both, "still": Grid.of_rates([0.2])}, tmp_path)
    points = {run.name: run.point for run in contest.hold(runner)}
    assert points == {"goh": Point.of(learning_rate=0.2, matrix_learning_rate=2.0), "still": at(0.2)}
    assert runner.tried == [["0.1-2", "0.2-2", "0.4-2"], ["0.2-1", "0.2-4"]]
    assert (tmp_path / "rates.md").read_text().count("goh, matrix_learning_rate") == 3


@pytest.mark.parametrize(
    "seeds, rates, message",
    [
        ([3, 5, 3], [0.1], "different --seeds"),
        ([], [0.1], "different --seeds"),
    ],
)
def test_impossible_contests_are_refused(tmp_path, seeds, rates, message):
    with pytest.raises(ValueError, match=message):
        Contest({"goh": None}, seeds, Grid.of_rates(rates), tmp_path)
