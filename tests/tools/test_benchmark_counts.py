"""Budgets of every form's step, counted: copied caches, whole maps and calls that have crept in fail here."""

from __future__ import annotations

import json

import pytest
import torch
from benchmarks import counts
from helpers import load_script
from torch.torch_version import TorchVersion

from gohgraph.attention import forms

# Releases of torch split their operators a little differently.
MARGIN = 1.05
FOUND = "python tools/benchmark.py counts --json tools/benchmarks/budgets.json"


def over(found: counts.Counts, budget: counts.Counts) -> list[str]:
    """The names of what costs more than its budget."""
    return [name for name in found._fields if getattr(found, name) > MARGIN * getattr(budget, name)]


@pytest.fixture(scope="module")
def found():
    return counts.all_counts()


def test_no_form_costs_more_than_its_budget(found):
    if TorchVersion(torch.__version__) < "2.13":
        pytest.skip("older releases of torch make a sixth more calls for the same")
    budgets = counts.budgets()
    assert set(found) == set(budgets), f"Do run {FOUND}"
    exceeded = {name: over(found[name], budgets[name]) for name in found if over(found[name], budgets[name])}
    assert not exceeded, f"{ {name: (found[name], budgets[name]) for name in exceeded} }: if that is meant, {FOUND}"


def test_counts_are_the_same_every_time(found):
    for name in ("score-ring2", "output"):
        assert counts.trained(name) == found[f"block, {name}"]
        assert counts.decoded(name) == found[f"decode, {name}"]


def test_leaving_the_tiles_is_over_budget():
    assert over(counts.trained("score-complete", "maps"), counts.budgets()["block, score-complete"]) == [
        "bytes", "largest"
    ]  # fmt: skip


def test_holding_the_matrices_of_many_heads_is_over_budget(monkeypatch):
    monkeypatch.setattr(forms, "_many_edges", lambda call: None)
    exceeded = over(counts.trained("score-complete", size=counts.MANY["64 heads"]),
                    counts.budgets()["block of 64 heads, score-complete"])  # fmt: skip
    assert "bytes" in exceeded


def test_copying_the_cache_for_every_token_is_over_budget():
    exceeded = over(counts.decoded("score-ring2", "wide"), counts.budgets()["decode, score-ring2"])
    assert {"bytes", "largest"} <= set(exceeded)


def test_what_is_counted():
    x, out = torch.randn(5, 3), torch.empty(5, 5)
    call = counts.counted(lambda: (torch.mm(x, x.t(), out=out), x.view(15), torch.cat((x, x))))
    # The product into a tensor that is there and the views allocate nothing.
    assert call == counts.Counts(calls=4, flops=2 * 5 * 3 * 5, bytes=120, largest=120)


def test_the_table_and_the_file_are_the_counts(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(counts, "all_counts", lambda: {"a": counts.Counts(7, 2_500_000, 2048, 1024)})
    tool, file = load_script("tools", "benchmark"), tmp_path / "budgets.json"
    assert tool.main(["counts", "--json", str(file)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].replace("|", "").split() == ["a", "7", "2.50", "2", "1"]
    assert json.loads(file.read_text()) == {"a": {"calls": 7, "flops": 2_500_000, "bytes": 2048, "largest": 1024}}
