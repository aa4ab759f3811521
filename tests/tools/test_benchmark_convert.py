"""Tests of `tools/benchmark.py convert`: what the rows are, the table, bad input."""

from __future__ import annotations

import json

import pytest
import torch
from benchmarks import convert as benchmark
from helpers import load_script

from gohgraph.graphs.conv import HeadGraphConv

CASE = benchmark.Case(d_model=20, num_heads=5, num_layers=2, tokens=7, batch=3)


@pytest.fixture(scope="module")
def tool():
    return load_script("tools", "benchmark")


@torch.no_grad()
def test_rows_share_the_backbone_and_differ_by_graphs_that_have_moved():
    stock = benchmark._stock(CASE).eval()
    tokens, state = torch.randint(benchmark.VOCABULARY, (3, 7)), stock.state_dict()
    plain = stock(input_ids=tokens).logits
    for name, config in benchmark.VARIANTS.items():
        model = benchmark._converted(stock, config)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
        graphs = [module for module in model.modules() if isinstance(module, HeadGraphConv)]
        assert len(graphs) == (0 if config is None else 2), name
        assert all(graph.edges.weight.all() for graph in graphs)
        assert torch.equal(model(input_ids=tokens).logits, plain) == (config is None)


def test_a_smoke_run_prints_and_writes_both_tables(tool, tmp_path, capsys):
    file = tmp_path / "rows.json"
    kinds = ["--kinds", "forward", "forward and backward"]
    assert tool.main(["convert", "--smoke", "--threads", "1", "--json", str(file), *kinds]) == 0
    shown = capsys.readouterr().out
    assert "**forward**, d_model 24" in shown and "**forward and backward**" in shown
    rows = json.loads(file.read_text())["rows"]
    assert [row["variant"] for row in rows] == list(benchmark.VARIANTS) * 2
    for row in rows:
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0
        stock = next(other for other in rows if other["variant"] == "stock" and other["kind"] == row["kind"])
        ratios = [own / other for own, other in zip(row["seconds"], stock["seconds"], strict=True)]
        assert row["ratio"][1] == pytest.approx(sum(ratios) / 2)


BAD = [["--sizes", "20/3/1/7/1"], ["--sizes", "20/5"], ["--repeats", "1"], ["--kinds", "x"]]


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_line(tool, flags, capsys):
    assert tool.main(["convert", *flags]) == 2
    assert capsys.readouterr().err.startswith("error: Expected")
