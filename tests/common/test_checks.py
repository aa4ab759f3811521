"""Checks of values: what passes, what is refused, and with which words."""

import math
import re

import numpy
import pytest
import torch

from gohgraph.common.checks import (
    check_bool,
    check_choice,
    check_int,
    check_number,
    check_probability,
    check_torch,
    check_weight,
)

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("bounds", [{}, {"low": -3}, {"high": 5}, {"low": -3, "high": 5}])
def test_an_int_within_the_bounds_passes(bounds):
    for value in (-3, 0, 5):
        assert check_int("size", value, **bounds) is None


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (0, {"low": 1}, "Expected size to be an int >= 1 (got 0). Do raise it."),
        (6, {"high": 5}, "Expected size to be an int <= 5 (got 6). Do lower it."),
        (1, {"low": 2, "high": 5}, "Expected size to be an int in 2..5 (got 1). Do raise it."),
        (6, {"low": 2, "high": 5}, "Expected size to be an int in 2..5 (got 6). Do lower it."),
    ],
)
def test_an_int_out_of_range_is_a_value_error(value, bounds, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_int("size", value, **bounds)


@pytest.mark.parametrize("value", [True, False, 3.0, "3", None, numpy.int64(3), torch.tensor(3), NAN, [3]])
@pytest.mark.parametrize(("bounds", "allowed"), [({}, ""), ({"low": 1}, " >= 1"), ({"low": 1, "high": 4}, " in 1..4")])
def test_what_is_no_int_is_a_type_error(value, bounds, allowed):
    message = f"Expected size to be an int{allowed} (got {value!r}). Do pass a whole number."
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        check_int("size", value, **bounds)


@pytest.mark.parametrize(
    ("value", "bounds"),
    [
        (-1e30, {}),
        (10**400, {}),
        (0, {"low": 0}),
        (0.0, {"low": 0, "high": 1}),
        (1, {"low": 0, "high": 1}),
        (1e-300, {"above": 0}),
        (1 - 1e-9, {"low": 0, "below": 1}),
    ],
)
def test_a_number_within_the_bounds_passes(value, bounds):
    assert check_number("rate", value, **bounds) is None


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (-1e-9, {"low": 0}, "a finite number >= 0 (got -1e-09). Do raise it."),
        (0, {"above": 0}, "a finite number > 0 (got 0). Do raise it."),
        (1.5, {"low": 0, "high": 1}, "a finite number >= 0 and <= 1 (got 1.5). Do lower it."),
        (1, {"low": 0, "below": 1}, "a finite number >= 0 and < 1 (got 1). Do lower it."),
        (-0.5, {"above": -0.5, "below": 1}, "a finite number > -0.5 and < 1 (got -0.5). Do raise it."),
        (NAN, {}, "a finite number (got nan). Do pass a finite one."),
        (NAN, {"low": 0, "high": 1}, "a finite number >= 0 and <= 1 (got nan). Do pass a finite one."),
        (INF, {"low": 0}, "a finite number >= 0 (got inf). Do pass a finite one."),
        (-INF, {"high": 0}, "a finite number <= 0 (got -inf). Do pass a finite one."),
    ],
)
def test_a_number_out_of_range_is_a_value_error(value, bounds, message):
    with pytest.raises(ValueError, match=f"^{re.escape(f'Expected rate to be {message}')}$"):
        check_number("rate", value, **bounds)


@pytest.mark.parametrize("value", [True, False, "0.5", None, torch.tensor(0.5), 1j, [0.5]])
@pytest.mark.parametrize("check", [check_number, check_weight, check_probability])
def test_what_is_no_number_is_a_type_error(check, value):
    with pytest.raises(TypeError, match=f"^Expected rate to be .*{re.escape(f'(got {value!r}). Do pass a number.')}$"):
        check("rate", value)


def test_weights_are_at_least_0_and_probabilities_at_most_1():
    for value in (0, 0.5, 1.0):
        assert check_weight("w", value) is None and check_probability("p", value) is None
    assert check_weight("w", 7.5) is None
    refused = [(check_weight, -0.1), (check_weight, INF), (check_probability, -0.1), (check_probability, 1.1)]
    for check, value in refused:
        with pytest.raises(ValueError, match=f"Expected x to be a finite number >= 0 .*got {value}"):
            check("x", value)


def test_only_true_and_false_are_bools():
    assert check_bool("norm", True) is None and check_bool("norm", False) is None
    for value in (0, 1, None, "True", numpy.True_):
        message = f"Expected norm to be True or False (got {value!r}). Do pass a bool."
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            check_bool("norm", value)


def test_a_choice_is_one_of_those_named():
    # Keys of a dictionary are choices too, and a value that has no hash is refused like any other.
    choices = {"tanh": 1, None: 2}
    assert check_choice("activation", "tanh", choices) is None and check_choice("activation", None, choices) is None
    for value in ("relu", 3, ["tanh"]):
        message = f"Expected activation of ['tanh', None] (got {value!r}). Do choose one of them."
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            check_choice("activation", value, choices)


def test_a_torch_at_its_bound_is_new_enough(monkeypatch):
    for version in ("2.13.0", "2.13.0+cpu", "2.13.1", "3.0"):
        monkeypatch.setattr(torch, "__version__", version)
        assert check_torch("2.13", "to run", "walk") is None
    for version in ("2.9.1", "2.12.1+cpu", "2.13.0a0"):
        monkeypatch.setattr(torch, "__version__", version)
        message = f"Expected torch 2.13 or newer to run (got {version}). Do upgrade it, or walk."
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            check_torch("2.13", "to run", "walk")
