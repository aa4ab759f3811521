"""What a contest led to: means over seeds, and which of two models is better."""

from __future__ import annotations

import pytest
import torch

from gohgraph.learning.contests.results import by_model, results_table, verdict

ENDS = {"goh": 5.0, "plain": 5.5}


def test_means_over_seeds_and_the_better_one():
    trained = {
        (seed, name): {
            "learning_rate": {"goh": 0.2, "plain": 0.1}[name],
            "parameters": 1234,
            "validation_loss": end + seed,
            "losses": torch.tensor([end + seed, end + seed + 1]),
        }
        for seed in (0, 2, 4)
        for name, end in ENDS.items()
    }
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in
             results_table(trained, {"loss": ("validation_loss", 2, 1)}).splitlines()]  # fmt: skip
    assert table[2:] == [["goh", "0.2", "1,234", "7.00 ± 2.00"], ["plain", "0.1", "1,234", "7.50 ± 2.00"]]
    assert verdict(trained) == "better: goh, by 0.5000 ± 0.0000 nats (3 seeds)"
    assert by_model(trained) == {name: [trained[seed, name] for seed in (0, 2, 4)] for name in ENDS}


def trained(goh, plain):
    """Results of as many seeds as there are rows."""
    rows = {"goh": goh, "plain": plain}
    return {(seed, name): {"losses": torch.tensor(row)} for name, own in rows.items() for seed, row in enumerate(own)}


def test_one_seed_is_no_verdict_however_sure_the_examples_are():
    told = verdict(trained([[1.0, 3.0, 5.0]], [[1.1, 3.1, 5.11]]))
    assert told.startswith("goh is ahead by 0.1033 ± 0.0033 nats over the examples; of one seed, this is no verdict")


def test_one_seed_may_be_behind():
    told = verdict(trained([[1.1, 3.1, 5.11]], [[1.0, 3.0, 5.0]]))
    assert told.startswith("goh is behind by 0.1033 ± 0.0033 nats")


@pytest.mark.parametrize("gains,better", [([0.1, 0.11, 0.12], "goh"), ([-0.1, -0.11, -0.12], "plain")])
def test_seeds_that_agree_are_a_verdict(gains, better):
    told = verdict(trained([[2.0 - gain] * 2 for gain in gains], [[2.0, 2.0]] * 3))
    # 4.303 standard errors of three seeds.
    assert told == f"better: {better}, by 0.1100 ± 0.0248 nats (3 seeds)"


@pytest.mark.parametrize("gains", [[0.1, 0.2], [0.01, 0.1, 0.2], [0.0, 0.0]])
def test_seeds_that_differ_as_much_as_they_gain_are_none(gains):
    told = verdict(trained([[2.0 - gain] * 2 for gain in gains], [[2.0, 2.0]] * len(gains)))
    assert told.startswith("no difference beyond noise: goh is ahead by +0.")
