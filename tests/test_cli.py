"""The command `gohgraph`: help with examples, the nearest flag, and a short demo that is drawn and resumed."""

from __future__ import annotations

import re
import warnings

import pytest
import torch

import gohgraph as goh
from gohgraph.cli import main
from gohgraph.learning.checkpoints import load_own_model
from gohgraph.learning.cli import language_model

TINY = "--d-model 8 --num-heads 2 --num-layers 1 --d-ff 8 --length 8 --batch-size 2 --device cpu".split()


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(language_model, "log_head_graphs", lambda writer, model, step: None)
    (tmp_path / "text.txt").write_text("heads talk to heads, and some of them listen. " * 40)
    return "text.txt"


HELP = (([], "gohgraph demo "), (["draw"], "gohgraph draw runs/demo/goh"), (["demo"], "gohgraph demo --smoke"))


@pytest.mark.parametrize("argv, shown", HELP)
def test_help_has_examples(argv, shown, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--help"])
    assert stop.value.code == 0 and shown in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["draw", "x", "--treshold", "0.1"], r"got --treshold 0.1; the nearest is --threshold\)"),
        (["demo", "--stpes=3"], r"got --stpes=3; the nearest is --steps\). Do see gohgraph demo --help"),
        (["drew"], "Expected other flags .*invalid choice: 'drew'"),
        (["demo", "--num-heads", "7"], "Expected d_model"),
        (["demo", "--top-k", "2"], "Expected no --top-k without --router"),
        (["demo", "--learning-rates", "-1"], "Expected learning_rate"),
    ],
)
def test_bad_flags_are_refused_before_data_is_read(argv, sentence, capsys, monkeypatch):
    monkeypatch.setattr(language_model, "load_corpus", None)
    assert main(argv) == 2
    assert re.search(sentence, capsys.readouterr().err)


def test_what_pyg_says_of_torch_jit_is_not_shown(monkeypatch):
    texts = ["`torch.jit.script` is deprecated. Please switch to `torch.compile`", "something else"]

    def warn(flags):
        for text in texts:
            warnings.warn(text, FutureWarning, stacklevel=1)

    monkeypatch.setattr("gohgraph.cli.draw_model", warn)
    with pytest.warns(FutureWarning) as shown:
        assert main(["draw", "x"]) == 0
    assert [str(one.message) for one in shown] == texts[1:]


def test_a_short_demo_says_so_and_goes_on_with_its_own_flags(text, tmp_path, capsys):
    assert main(["demo", "--data", text, "--steps", "5", *TINY, "--run", "out"]) == 0
    shown = capsys.readouterr().out
    assert "no verdict: 5 steps show that it runs" in shown and "goh is" not in shown
    assert "tokens/s" in shown and "ratio: of a step to plain" in shown and "gohgraph draw out/goh" in shown
    (tmp_path / "out" / "goh" / "result.json").unlink()
    # Of all flags, the run alone is named.
    assert main(["demo", "--run", "out", "--resume"]) == 0
    assert (tmp_path / "out" / "goh" / "result.json").is_file()
    assert load_own_model("out/goh").config.d_model == 8
    capsys.readouterr()
    assert main(["demo", "--run", "out", "--resume", "--steps", "6"]) == 2
    assert "training.steps = 6 for 5" in capsys.readouterr().err


def test_one_model_has_no_legend_of_another(text, capsys):
    assert language_model.LanguageModelTraining.main(["--data", text, "--steps", "2", *TINY, "--run", "out"]) == 0
    shown = capsys.readouterr().out
    assert "goh: heads as a graph" in shown and "plain" not in shown and "ratio:" not in shown


def test_own_models_of_every_kind_are_drawn(tmp_path, monkeypatch, capsys):
    """A classifier and an encoder-decoder, by their graphs and by attribution."""
    from gohgraph.learning.data.parallel_text import Subwords

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    shape = dict(d_model=8, num_heads=2, num_layers=2, d_ff=8)
    graph = goh.HeadGraphConfig(outputs=goh.SiteConfig(edges="frozen"))
    classes = goh.ClassifierConfig(goh.TransformerConfig(256, **shape, head_graph=graph), 3)
    goh.Classifier(classes).save_pretrained("classes")
    said = ["--text", "heads talk to heads, and some of them listen"]
    assert main(["draw", "classes", *said, "--length", "9", "--out", "classes.png"]) == 0
    assert "classes the model predicts itself" in capsys.readouterr().out
    assert main(["draw", "classes", *said, "--from", "attribution", "--target", "1|2", "--out", "classes.json"]) == 0
    assert "logit('1') - logit('2')" in capsys.readouterr().out
    subwords = Subwords.train(["ein haus", "a house"], 270)
    goh.Transformer(goh.TransformerConfig(len(subwords), **shape, head_graph=graph)).save_pretrained("run/model")
    (tmp_path / "run" / "tokenizer.json").write_text(subwords.to_json())
    assert main(["draw", "run", "--text", "a house\nein haus", "--out", "run.gexf"]) == 0
    assert "encoder 0.0 -> encoder" in capsys.readouterr().out
    asked = ["--from", "attribution", "--target", "ein haus", "--out", "r.json"]
    assert main(["draw", "run", "--text", "a house", *asked]) == 0
    assert "log p of the translation 'ein haus'" in capsys.readouterr().out
    assert goh.load_head_graph("r.json").num_nodes == 12


def test_blocks_of_one_number_are_chosen_by_their_title(tmp_path, monkeypatch, capsys):
    """An encoder-decoder has three blocks of number 0."""
    from gohgraph.learning.data.parallel_text import Subwords

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    graph = goh.HeadGraphConfig(outputs=goh.SiteConfig(edges="frozen"))
    subwords = Subwords.train(["ein haus", "a house"], 270)
    config = goh.TransformerConfig(len(subwords), d_model=8, num_heads=2, num_layers=2, d_ff=8, head_graph=graph)
    goh.Transformer(config).save_pretrained("run/model")
    (tmp_path / "run" / "tokenizer.json").write_text(subwords.to_json())
    draw = ["draw", "run", "--text", "a house", "--out", "run.svg"]
    one, several = ["--layer", "decoder layer 0 cross"], ["--layer", "0"]
    sizes = []
    for view in (["--view", "circle"], ["--view", "matrix"], ["--attention"]):
        for layer in (one, several):
            assert main([*draw, *view, *layer]) == 0
            sizes.append((tmp_path / "run.svg").stat().st_size)
    assert sizes[0] < sizes[1] and sizes[2] < sizes[3] and sizes[4] < sizes[5]
    printed = capsys.readouterr().out
    # Long names push no column out of its place.
    rows = [line for line in printed.splitlines() if " outputs " in line and "->" in line]
    assert any("cross." in row for row in rows) and len({row.index(" outputs ") for row in rows}) == 1
    assert main([*draw, "--attention", *one, "--head", "1"]) == 0
    assert main([*draw, "--attention", *several, "--head", "1"]) == 2
    assert "Expected one layer of the head" in capsys.readouterr().err
    for view in (["--view", "circle"], ["--attention"]):
        assert main([*draw, *view, "--layer", "decoder layer 7"]) == 2
        assert "'decoder layer 0 cross'" in capsys.readouterr().err


@pytest.mark.parametrize("text, code", [("house", 0), ("", 2)])
def test_one_token_is_a_text_for_what_predicts_no_next_one(text, code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shape = dict(d_model=8, num_heads=2, num_layers=2, d_ff=8)
    graph = goh.HeadGraphConfig(outputs=goh.SiteConfig(edges="frozen"))
    goh.Classifier(goh.ClassifierConfig(goh.TransformerConfig(256, **shape, head_graph=graph), 3)).save_pretrained("c")
    goh.LanguageModel(goh.TransformerConfig(256, **shape, head_graph=graph)).save_pretrained("lm")
    from_text = ["--text", text[:1], "--from", "attribution", "--out", "heads.json"]
    assert main(["draw", "c", *from_text]) == code
    assert ("at least one token (got none)" in capsys.readouterr().err) == (code == 2)
    assert main(["draw", "lm", *from_text]) == 2
    assert "at least two tokens" in capsys.readouterr().err
