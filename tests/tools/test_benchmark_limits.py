"""Tests of `tools/benchmark.py limits`: what a form cannot do without, and ratios to it for each number of threads."""

from __future__ import annotations

import json

import pytest
import torch
from benchmarks import limits
from benchmarks.counts import Counter
from helpers import load_script


def test_products_of_a_training_step_are_counted():
    """Against a counter of products, on whole maps: those above the diagonal are counted there, and not by us."""
    size = limits.Size(d_model=24, num_heads=4, length=7, batch=2)
    layer = limits.build("score-complete", size)
    layer.attention.object.form = "maps"
    x = torch.randn(size.batch, size.length, size.d_model, requires_grad=True)
    with Counter() as counter:
        layer(x)[0].sum().backward()
    tokens = size.batch * size.length
    # Above the diagonal: half of scores, of weights times values, and of messages, three times.
    above = 3 * (2 * tokens * size.length * size.d_model + tokens * size.length * size.num_heads**2)
    assert counter.counts.flops == pytest.approx(limits.trained_work(size, mixes=True).flops + above)


def test_the_longer_of_both_limits_counts():
    assert limits.Work(flops=8.0, bytes=1.0).seconds(sgemm=4.0, read=1.0) == 2.0
    assert limits.Work(flops=8.0, bytes=3.0).seconds(sgemm=4.0, read=1.0) == 3.0


def test_every_form_is_told_over_its_limit_for_each_number_of_threads(tmp_path, capsys):
    tool, file, threads = load_script("tools", "benchmark"), tmp_path / "out.json", torch.get_num_threads()
    assert tool.main(["limits", "--smoke", "--threads", "1", "2", "--json", str(file)]) == 0
    rows, printed = json.loads(file.read_text())["rows"], capsys.readouterr().out
    assert [row.get("limit") for row in rows] == 2 * ["sgemm", "read", None, None, None]
    assert [row["threads"] for row in rows] == 5 * [1] + 5 * [2] and torch.get_num_threads() == threads
    for row in (row for row in rows if "form" in row):
        assert 0 < row["ratio"][0] <= row["ratio"][1] <= row["ratio"][2]
    assert printed.count("| decode, plain, 24/4/2/16/7/1 ") == 2 and "1 and 2 CPU threads" in printed


def test_no_thread_is_refused(capsys):
    assert load_script("tools", "benchmark").main(["limits", "--smoke", "--threads", "1", "0"]) != 0
    assert "Expected --threads" in capsys.readouterr().err
