"""Tests of `tools/benchmark.py generate`: all continue the same prompts, the minimal loop computes the plain model."""

from __future__ import annotations

import json

import pytest
import torch
from benchmarks import generate as benchmark
from helpers import load_script

CASE = benchmark.Case(d_model=20, num_heads=5, num_layers=2, d_ff=11, prompt=7, batch=3)


@pytest.fixture(scope="module")
def prompts():
    return torch.randint(benchmark.VOCABULARY, (CASE.batch, CASE.prompt))


def test_minimal_loop_computes_the_plain_model(prompts):
    plain, minimal = (benchmark.build(name, CASE, 5).eval() for name in ("plain", "minimal"))
    with torch.no_grad():
        expected = plain(prompts).logits
        caches = minimal.new_caches(CASE.batch)
        shown = [minimal(prompts[:, :3], caches), *(minimal(prompts[:, t : t + 1], caches, t) for t in range(3, 7))]
    torch.testing.assert_close(torch.cat(shown, dim=1), expected, rtol=0, atol=1e-5)
    assert torch.equal(benchmark.generating(plain)(prompts, 5), benchmark.generating(minimal)(prompts, 5))


def test_all_are_of_one_size_and_generate_as_many_tokens(prompts):
    models = {name: benchmark.build(name, CASE, 5).eval() for name in (*benchmark.OURS, *benchmark.OTHERS)}
    sizes = {name: sum(parameter.numel() for parameter in model.parameters()) for name, model in models.items()}
    assert sizes["plain"] == sizes["minimal"] == sizes["Llama"]
    assert sizes["plain"] < sizes["score graph, ring of 2"] < sizes["output graph"]
    for name, model in models.items():
        call = benchmark.Generation(benchmark.generating(model), prompts, 5)
        assert call.work().shape == (CASE.batch, CASE.prompt + 5), name


@pytest.mark.compiles
def test_tokens_a_second_are_told_for_every_model(tmp_path, capsys):
    tool, file = load_script("tools", "benchmark"), tmp_path / "out.json"
    asked = ["plain", "output graph", "minimal"]
    flags = ["--smoke", "--threads", "1", "--compile", "eager", "--only", *asked[1:], "--json", str(file)]
    assert tool.main(["generate", *flags]) == 0
    asked += ["plain, compiled", "output graph, compiled"]
    rows, printed = json.loads(file.read_text())["rows"], capsys.readouterr().out
    assert [row["model"] for row in rows] == asked and rows[0]["ratio"] == [1.0, 1.0, 1.0]
    assert all(min(row["seconds"]) > 0 for row in rows) and all(f"| {name} " in printed for name in asked)
