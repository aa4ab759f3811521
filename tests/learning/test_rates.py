"""The grid of learning rates: the lowest finite loss is the best, and impossible grids are refused."""

from __future__ import annotations

import argparse
import math

import pytest

from gohgraph.learning.cli.flags import add_rate_flags
from gohgraph.learning.contests.rates import best_rates, check_rates, rates_table

LOSSES = {("goh", 0.1): math.inf, ("goh", 0.2): 3.0, ("plain", 0.1): 2.0, ("plain", 0.2): math.nan}


def test_the_lowest_finite_loss_is_the_best():
    assert best_rates(LOSSES) == {"goh": 0.2, "plain": 0.1}
    assert best_rates({("goh", 0.1): 3.0, ("goh", 0.2): 2.0, ("goh", 0.4): 2.5}) == {"goh": 0.2}


def test_a_model_without_a_finite_loss_is_named():
    with pytest.raises(ValueError, match=r"one of the learning rates \[0.1, 0.2\] \(got none for low, high\)"):
        best_rates({(name, rate): math.inf for name in ("low", "high") for rate in (0.2, 0.1)} | {("mid", 0.1): 1.0})


def test_the_table_shows_every_loss_and_what_ran_away():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in rates_table(LOSSES).splitlines()]
    assert rows[0][1:] == ["0.1", "0.2"]
    assert rows[2:] == [["goh", "diverged", "3.0000"], ["plain", "2.0000", "diverged"]]


@pytest.mark.parametrize(
    "rates", [[], [0.1, 0.1], [0.1, 0.1 + 1e-9], [0.0], [-0.1, 0.1], [float("nan")], [float("inf"), 1.0]]
)
def test_impossible_rates_are_refused(rates):
    with pytest.raises(ValueError, match="different --learning-rates above 0"):
        check_rates(rates)


def test_the_flag_takes_a_grid():
    parser = argparse.ArgumentParser()
    add_rate_flags(parser, learning_rate=0.003)
    assert parser.parse_args([]).learning_rates == [0.003]
    assert parser.parse_args(["--learning-rates", "0.1", "0.2"]).learning_rates == [0.1, 0.2]
