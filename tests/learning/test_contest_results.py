"""What a contest led to: means over seeds, and which of two models is better."""

from __future__ import annotations

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


def test_the_verdict_is_what_was_measured():
    def trained(goh, plain):
        return {(0, name): {"losses": torch.tensor(own)} for name, own in (("goh", goh), ("plain", plain))}

    assert verdict(trained([1.0, 3.0, 5.0], [1.1, 3.1, 5.11])).startswith("better: goh, by 0.1033")
    assert verdict(trained([1.1, 3.1, 5.11], [1.0, 3.0, 5.0])).startswith("better: plain, by 0.1033")
    assert verdict(trained([1.0, 3.0], [1.5, 2.6])).startswith("no difference beyond noise")
    assert verdict(trained([1.0, 3.0], [1.0, 3.0])).startswith("no difference beyond noise")
