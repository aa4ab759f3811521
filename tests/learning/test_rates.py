"""Grids of learning rates: the search, the lowest finite loss, the table, and impossible grids."""

from __future__ import annotations

import argparse
import math

import pytest

from gohgraph.learning.cli.flags import add_rate_flags
from gohgraph.learning.contests.grid import Grid, Point, best_points
from gohgraph.learning.contests.rates import rates_table


def at(rate, matrix=None):
    return Point.of(learning_rate=rate, **({} if matrix is None else {"matrix_learning_rate": matrix}))


LOSSES = {("goh", at(0.1)): math.inf, ("goh", at(0.2)): 3.0, ("plain", at(0.1)): 2.0, ("plain", at(0.2)): math.nan}
GRID = Grid.of_rates([0.1, 0.2])


def searched(grid, loss):
    losses, rounds = {}, []
    while points := grid.next_points(losses):
        rounds.append([str(point) for point in points])
        losses |= {point: loss(point) for point in points}
    return str(grid.best(losses)), rounds


def test_the_lowest_finite_loss_is_the_best():
    assert best_points({"goh": GRID, "plain": GRID}, LOSSES) == {"goh": at(0.2), "plain": at(0.1)}
    assert GRID.best({at(0.1): 3.0, at(0.2): 2.0}) == at(0.2) and Grid.of_rates([0.3]).best({}) == at(0.3)


def test_a_model_without_a_finite_loss_is_named():
    lost = {(name, at(rate)): math.inf for name in ("low", "high") for rate in (0.2, 0.1)} | {("mid", at(0.1)): 1.0}
    with pytest.raises(ValueError, match=r"one of the learning rates \[0.1, 0.2\] \(got none for low, high\)"):
        best_points(dict.fromkeys(("low", "high", "mid"), GRID), lost)


def test_of_one_setting_all_values_are_tried_and_of_one_point_none():
    assert searched(Grid.of_rates([4, 1, 2]), lambda point: point["learning_rate"]) == ("1", [["4", "1", "2"]])
    assert Grid.of_rates([4]).next_points({}) == []


@pytest.mark.parametrize("sizes", [(3, 3), (2, 5), (3, 1), (1, 3)], ids=str)
def test_the_search_ends_where_no_setting_alone_makes_it_better(sizes):
    grid = Grid({"learning_rate": range(1, sizes[0] + 1), "matrix_learning_rate": range(1, sizes[1] + 1)})

    def loss(point):
        return (point["learning_rate"] - point["matrix_learning_rate"]) ** 2 - 0.1 * point["learning_rate"]

    best, rounds = searched(grid, loss)
    tried = [point for line in rounds for point in line]
    assert len(tried) == len(set(tried)) <= sizes[0] * sizes[1]
    found = next(point for point in grid.points if str(point) == best)
    for name, values in grid.settings.items():
        assert all(loss(found) <= loss(found.replaced(name, value)) for value in values)


def test_the_search_goes_on_from_the_better_line():
    grid = Grid({"learning_rate": [1, 2, 4], "matrix_learning_rate": [10, 20, 40]})
    best, rounds = searched(grid, lambda point: abs(point["matrix_learning_rate"] - 10 * point["learning_rate"]))
    assert (best, rounds) == ("2-20", [["1-20", "2-20", "4-20"], ["2-10", "2-40"]])


def test_equal_and_lost_losses_end_the_search():
    grid = Grid({"learning_rate": [1, 2, 4], "matrix_learning_rate": [10, 20, 40]})
    assert searched(grid, lambda point: 7.0)[0] == "1-20"
    with pytest.raises(ValueError, match="Expected a finite loss"):
        searched(grid, lambda point: math.nan)


def test_points_at_the_border_are_named():
    grid = Grid({"learning_rate": [1, 2, 4], "matrix_learning_rate": [10, 20, 40], "warmdown": [0.4]})
    assert grid.border_of(Point.of(learning_rate=2, matrix_learning_rate=40, warmdown=0.4)) == ["matrix_learning_rate"]
    assert grid.border_of(grid.centre) == []


def test_the_table_shows_every_loss_and_what_ran_away():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in rates_table(LOSSES).splitlines()]
    assert rows[0][1:] == ["0.1", "0.2"]
    assert rows[2:] == [["goh", "diverged", "3.0000"], ["plain", "2.0000", "diverged"]]
    two = rates_table({("goh", at(0.1, 0.2)): 1.0, ("goh", at(0.3, 0.4)): 2.0})
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in two.splitlines()]
    assert rows[2:] == [
        ["goh, matrix_learning_rate 0.2", "1.0000", "-"],
        ["goh, matrix_learning_rate 0.4", "-", "2.0000"],
    ]


@pytest.mark.parametrize(
    "rates", [[], [0.1, 0.1], [0.1, 0.1 + 1e-9], [0.0], [-0.1, 0.1], [float("nan")], [float("inf"), 1.0]]
)
def test_impossible_rates_are_refused(rates):
    with pytest.raises(ValueError, match="different --learning-rates above 0"):
        Grid.of_rates(rates)


def test_the_flag_takes_a_grid():
    parser = argparse.ArgumentParser()
    add_rate_flags(parser, learning_rate=0.003)
    assert parser.parse_args([]).learning_rates == [0.003]
    assert parser.parse_args(["--learning-rates", "0.1", "0.2"]).learning_rates == [0.1, 0.2]
