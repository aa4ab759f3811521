"""The sweep over classes of transformers: its checks find what they should, rows go on, the table says it all."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import load_script
from sweeping import checks
from sweeping.small_models import build, classes
from sweeping.table import table

import gohgraph as goh


@pytest.fixture
def script():
    return load_script("tools", "model_sweep")


def test_a_sweep_goes_on_where_it_stopped_and_writes_its_table(script, tmp_path, monkeypatch):
    rows, page, ran = tmp_path / "rows.jsonl", tmp_path / "models.md", []

    def here(kind, name, seconds):
        ran.append(name)
        return checks.check(kind, name)

    monkeypatch.setattr(script, "_in_process", here)
    names = ["LlamaForCausalLM", "MambaForCausalLM", "BertForMaskedLM"]
    for count in (2, 3):
        with pytest.raises(SystemExit) as done:
            script.main(["--rows", str(rows), "--table", str(page), "--only", *names[:count]])
        assert done.value.code == 0
    assert sorted(ran) == sorted(names)
    found = {row["class"]: row for row in map(json.loads, rows.read_text().splitlines())}
    assert found["LlamaForCausalLM"]["status"] == "equal" and found["MambaForCausalLM"]["status"] == "refused"
    assert {found["LlamaForCausalLM"][check] for check in ("moves", "causal", "cached", "loaded", "undone")} == {"yes"}
    text = page.read_text()
    assert "3 classes, 0 silent differences" in text and "| llama | LlamaForCausalLM | outputs and scores | 2 |" in text


def test_a_class_runs_in_a_process_of_its_own_within_its_time(script):
    row = script._in_process("causal", "LlamaForCausalLM", 0.0)
    assert row["status"] == "not built" and "no result in 0 s" in row["reason"]


def test_a_model_that_a_conversion_changes_is_a_silent_difference(monkeypatch):
    convert = goh.convert

    def changing(model, config):
        report = convert(model, config)
        with torch.no_grad():
            next(model.parameters()).add_(1.0)
        return report

    monkeypatch.setattr(checks.goh, "convert", changing)
    row = checks.check("causal", "LlamaForCausalLM")
    assert row["status"] == "DIFFERENT" and "1 silent differences" in table([row])


def test_classes_are_many_and_small():
    found = classes()
    assert len(found) > 250 and len({name for *_, name in found}) == len(found)
    assert sum(parameter.numel() for parameter in build("T5ForConditionalGeneration").parameters()) < 100_000
