"""The one sharded head graph equals the whole one in value and every gradient, on a mesh and in a process group."""

from __future__ import annotations

import pytest
from ranks import run_ranks
from sharded_graphs import SITES, check_sites


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_equal_the_whole_graph_in_value_and_every_gradient(ranks):
    for checked in run_ranks(ranks, check_sites):
        assert len(checked) == len(set(checked)) == 4 * len(SITES) - 2 * sum(site.rounds > 1 for site in SITES.values())
