"""Measures of how evenly heads are loaded."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_equal_to

from gohgraph.attention.head_load import load_cv, load_entropy


@pytest.mark.parametrize(
    "load, num_shared, cv, entropy",
    [
        ([1, 0.5, 0.5, 0.5], 1, 0.0, 1.0),
        ([1, 1, 0, 0, 0], 1, math.sqrt(3), 0.0),
        ([0.9, 0.3], 0, 0.5, -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)),
        ([1, 1, 0.3], 2, 0.0, 1.0),
        ([1, 1], 2, 0.0, 1.0),
        ([1, 0, 0], 1, 0.0, 0.0),
    ],
)
def test_measures_of_load(load, num_shared, cv, entropy):
    load = torch.tensor([load, load], dtype=torch.float64)
    assert_equal_to(load_cv(load, num_shared), torch.full((2,), cv, dtype=torch.float64))
    assert_equal_to(load_entropy(load, num_shared), torch.full((2,), entropy, dtype=torch.float64))
