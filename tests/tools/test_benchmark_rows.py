"""The rows that speed is judged by: each runs, is told against its first form, and knows its limit."""

from __future__ import annotations

import json

from benchmarks import rows
from helpers import load_script

COMPILER = "compiled"


def test_every_row_runs_at_a_tiny_size(tmp_path, capsys):
    tool, file = load_script("tools", "benchmark"), tmp_path / "rows.json"
    names = [name for name in rows.ROWS if name != COMPILER]
    assert tool.main(["rows", "--smoke", "--only", *names, "--json", str(file)]) == 0
    assert capsys.readouterr().out.count("float32, 2/2") == 1
    found = json.loads(file.read_text())["rows"]
    assert list(dict.fromkeys(row["row"] for row in found)) == names
    for name in names:
        first, *others = [row for row in found if row["row"] == name]
        assert first["ratio"] == [1.0, 1.0, 1.0] and first["limit"] == 1.0 and others
        assert (first["memory"] is not None) == rows.ROWS[name].memory
    by_form = {(row["row"], row["form"]): row["limit"] for row in found}
    assert by_form["score-heads", "score-complete"] > 1 > by_form["routed-decode", "MoH 50 %"]


def test_threads_and_rounds_are_asked_for(tmp_path):
    tool, file = load_script("tools", "benchmark"), tmp_path / "rows.json"
    arguments = ["rows", "--smoke", "--only", "small-maps", "--threads", "1", "2", "--repeats", "3"]
    assert tool.main([*arguments, "--json", str(file)]) == 0
    found = json.loads(file.read_text())["rows"]
    assert [row["threads"] for row in found] == [1] * 3 + [2] * 3
    assert {len(row["seconds"]) for row in found} == {3}


def test_operators_of_a_row_beside_those_of_its_first_form(tmp_path, capsys):
    tool, file = load_script("tools", "benchmark"), tmp_path / "operators.json"
    arguments = ["operators", "--smoke", "--only", "output-heads", "drop-in", "--repeats", "1", "--json", str(file)]
    assert tool.main(arguments) == 0
    printed, found = capsys.readouterr().out, json.loads(file.read_text())["rows"]
    assert [row["form"] for row in found] == ["plain", "output", "output-ring4", "torch", "score graph"]
    assert printed.count("of the first") == 3 and "**drop-in**, torch" not in printed
    plain, output = (row["operators"] for row in found[:2])
    (_, products), (_, more) = plain["aten::addmm"], output["aten::addmm"]
    assert found[1]["first"] == plain and more == products + 1 and "aten::tanh" not in plain


def test_a_row_that_there_is_not(capsys):
    tool = load_script("tools", "benchmark")
    assert tool.main(["rows", "--only", "nothing"]) != 0
    assert "invalid choice: 'nothing'" in capsys.readouterr().err
