"""Tests of `tools/benchmark.py thresholds`: what is taken is what a block takes, and the table says so."""

from __future__ import annotations

import json

import pytest
import torch
from benchmarks import forms, thresholds
from helpers import load_script

from gohgraph.attention.forms import FORMS


@pytest.mark.parametrize("graph", thresholds.GRAPHS)
@pytest.mark.parametrize("text", ["24/4/7/2", "64/8/256/1"])
def test_what_is_taken_is_what_a_block_takes(monkeypatch, graph, text):
    size, ran = forms.Size(*map(int, text.split("/"))), []
    spied = [form._replace(run=lambda call, form=form: ran.append(form.name) or form.run(call)) for form in FORMS]
    monkeypatch.setattr("gohgraph.attention.forms.FORMS", tuple(spied))
    forms.build(graph, size)(torch.randn(size.batch, size.length, size.d_model))
    assert ran == [thresholds.chosen(graph, size)]


def test_every_form_is_timed_and_the_fastest_named(tmp_path, capsys):
    tool, file = load_script("tools", "benchmark"), tmp_path / "out.json"
    assert tool.main(["thresholds", "--smoke", "--threads", "1", "--json", str(file)]) == 0
    rows, printed = json.loads(file.read_text())["rows"], capsys.readouterr().out
    assert [(row["graph"], row["form"]) for row in rows] == [
        (graph, form)
        for graph in thresholds.GRAPHS
        for form in thresholds.FORMS
        if (graph, form) != ("talking-heads", "wide")
    ]  # fmt: skip
    assert [sum(row["taken"] for row in rows if row["graph"] == graph) for graph in thresholds.GRAPHS] == [1, 1, 1, 1]
    for graph in thresholds.GRAPHS:
        fastest = min((row for row in rows if row["graph"] == graph), key=lambda row: row["ratio"][1])["form"]
        line = next(line for line in printed.splitlines() if line.startswith(f"| {graph} "))
        assert line.rstrip("| ").endswith(f" {fastest}")
