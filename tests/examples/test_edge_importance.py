from __future__ import annotations

import json
import re

import pytest
from helpers import load_script

from gohgraph.learning.cli import language_model
from gohgraph.learning.data.corpus import load_corpus


@pytest.mark.slow
def test_two_seeds_give_tables_and_curves(tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text("heads talk to heads, and some of them listen. " * 200)
    train = load_script("examples", "train_language_model")
    monkeypatch.setattr(language_model, "log_head_graphs", lambda writer, model, step: None)
    run = tmp_path / "run"
    flags = ["--data", str(text), "--smoke", "--device", "cpu", "--seeds", "0", "1"]
    flags += "--d-model 20 --num-heads 5 --num-layers 2 --d-ff 13 --length 17 --batch-size 3 --steps 8".split()
    assert train.main([*flags, "--run", str(run)]) == 0
    script = load_script("examples", "edge_importance")
    # To gather Python's documentation takes longer than all the rest.
    read = {script.PYTHON_DOCS: load_corpus(str(text))}
    monkeypatch.setattr(script, "load_corpus", read.pop)
    arguments = [str(run), "--windows", "1", "--length", "16"]
    capsys.readouterr()
    assert script.main(arguments) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^\| strength +\| +-?\d\.\d\d ± \d\.\d\d \|$", shown, flags=re.MULTILINE)
    assert not read and shown.count(" ± ") == 7 + 6 * 7 and (run / "pruning.png").is_file()
    result = json.loads((run / "seed-1" / "importance.json").read_text())
    assert [share for share, _ in result["curves"]["ablation"][0]] == list(script.KEEP)
    assert result["curves"]["ablation"][0][0] == result["curves"]["random"][2][0]

    # A second call reads what was measured; other windows would be another measurement.
    assert script.main(arguments) == 0 and capsys.readouterr().out == shown
    assert script.main([*arguments[:2], "2"]) == 2
    assert "Expected --windows and --length as in" in capsys.readouterr().err
