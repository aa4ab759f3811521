from __future__ import annotations

import os
import re
import sys
import webbrowser
import xml.etree.ElementTree
from pathlib import Path

import pytest
import torch
from helpers import load_script
from PIL import Image

import gohgraph as goh
from gohgraph.analysis import edge_attribution, head_importance
from gohgraph.cli import main
from gohgraph.learning.checkpoints import find_model, load_language_model, training_steps
from gohgraph.learning.cli.draw import sources
from gohgraph.learning.data.corpus import evaluation_batches
from gohgraph.learning.regimes.demo import demo_model
from gohgraph.learning.regimes.language import byte_strings, next_token_output

WORDS = "heads talk to heads, and some of them listen"


def saved(folder, seed=0, **changes):
    """A tiny language model with random edges, in a checkpoint."""
    torch.manual_seed(seed)
    settings = {"vocab_size": 256, "d_model": 20, "num_heads": 5, "num_layers": 2, "d_ff": 7, "max_length": 64}
    config = goh.TransformerConfig(**{**settings, "head_graph": goh.HeadGraphConfig(), **changes})
    model = goh.LanguageModel(config)
    for module in model.modules():
        if isinstance(module, goh.HeadGraphConv):
            for parameter in module.edges.parameters():
                torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of a few real steps, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    text = folder.parent / "text.txt"
    text.write_text(WORDS * 200)
    script = load_script("examples", "train_language_model")
    flags = ["--data", str(text), "--smoke", "--device", "cpu", "--checkpoint-every", "5", "--keep-checkpoints", "9"]
    assert script.main([*flags, "--run", str(folder)]) == 0
    return folder


def rows_of(printed, table):
    """The rows of the first or second table that was printed: edge, site and numbers."""
    pattern = r"^  (\d\.\d) -> (\d\.\d) +(\w+(?: \d)?) +([+-][\d.]+) +([\d.]+) +([\d.]+) +([+-][\d.]+)$"
    part = re.split(r"10 (?:strongest|most important) edges", printed)[1 + table]
    return re.findall(pattern, part, flags=re.MULTILINE)


def test_the_tables_name_the_strongest_and_most_important_edges(tmp_path, capsys):
    model = saved(tmp_path / "model").eval()
    out = tmp_path / "heads.svg"
    assert main(["draw", str(tmp_path / "model"), "--text", WORDS, "--out", str(out), "--length", "7"]) == 0
    assert out.read_bytes().startswith(b"<?xml")
    printed = capsys.readouterr().out
    assert str(out) in printed and "over 42 tokens" in printed

    text = torch.tensor(list(WORDS.encode()), dtype=torch.uint8)
    batches = list(evaluation_batches(text, batch_size=8, length=7))
    with goh.record(model) as heads, torch.no_grad():
        for inputs, _ in batches:
            model(inputs)
    importance = edge_attribution(model, next_token_output, batches)
    network = goh.head_graph_of(heads, edge_importance=importance)
    for table, by in enumerate((network.mean.abs(), network.edge_importance)):
        rows = rows_of(printed, table)
        best = by.argsort(descending=True, stable=True)[:10].tolist()
        assert len(rows) == 10
        for (sender, receiver, site, *numbers), e in zip(rows, best, strict=True):
            j, i = network.edge_index[:, e].tolist()
            assert (sender, receiver, site) == (network.label[j], network.label[i], "outputs")
            expected = [network[name][e].item() for name in ("mean", "std", "share", "edge_importance")]
            assert list(map(float, numbers)) == pytest.approx(expected, abs=2e-4)


PICTURES = ("circle png", "matrix png", "network png", "pruning png", "tokens png", "tokens svg", "tokens pdf")


@pytest.mark.parametrize("view, suffix", [picture.split() for picture in PICTURES])
def test_views_are_drawn_in_the_format_of_the_file(tmp_path, view, suffix):
    saved(tmp_path / "model")
    out = tmp_path / f"heads.{suffix}"
    assert main(["draw", str(tmp_path / "model"), "--text", WORDS, "--view", view, "--out", str(out)]) == 0
    assert out.stat().st_size > 5000


def test_a_layer_and_a_token_are_chosen(tmp_path):
    saved(tmp_path / "model")
    arguments = [str(tmp_path / "model"), "--text", WORDS, "--layer", "1", "--out", str(tmp_path / "heads.svg")]
    for more in ([], ["--view", "matrix"], ["--view", "tokens", "--token", "5"]):
        assert main(["draw", *arguments, *more]) == 0
    whole = tmp_path / "whole.svg"
    assert main(["draw", *arguments[:3], "--view", "tokens", "--token", "5", "--out", str(whole)]) == 0
    assert (tmp_path / "heads.svg").stat().st_size < whole.stat().st_size


def test_attention_is_drawn_and_stands_in_the_page(tmp_path, capsys):
    saved(tmp_path / "model")
    arguments = [str(tmp_path / "model"), "--text", WORDS, "--attention"]
    sizes = []
    for more in ([], ["--layer", "1"], ["--layer", "1", "--head", "3"]):
        assert main(["draw", *arguments, *more, "--out", str(tmp_path / "heads.svg")]) == 0
        assert "model: attention over 44 tokens" in capsys.readouterr().out
        sizes.append((tmp_path / "heads.svg").stat().st_size)
    assert len(set(sizes)) == 3
    assert main(["draw", *arguments, "--limit", "0.5", "--out", str(tmp_path / "heads.html")]) == 0
    assert "sender pattern" in (tmp_path / "heads.html").read_text()


def test_head_graphs_of_rounds_are_attributed_without_their_edges(tmp_path, capsys):
    saved(tmp_path / "model", head_graph=goh.HeadGraphConfig(outputs=goh.SiteConfig(rounds=2)))
    arguments = ["draw", str(tmp_path / "model"), "--text", WORDS, "--from", "attribution"]
    out = tmp_path / "heads.json"
    assert main([*arguments, "--out", str(out)]) == 2
    assert "2 rounds" in (printed := capsys.readouterr().err) and "--no-learned" in printed
    assert main([*arguments, "--no-learned", "--out", str(out)]) == 0
    assert set(goh.load_head_graph(out).site) == {"queries", "keys", "values"}


@pytest.mark.parametrize("suffix", ["graphml", "gexf", "json", "csv"])
def test_the_network_is_exported_with_importances(tmp_path, suffix):
    model = saved(tmp_path / "model").eval()
    out = tmp_path / f"heads.{suffix}"
    assert main(["draw", str(tmp_path / "model"), "--text", WORDS, "--out", str(out)]) == 0
    network = goh.load_head_graph(out)
    assert network.num_nodes == 10 and network.num_edges == 50
    batches = list(evaluation_batches(torch.tensor(list(WORDS.encode()), dtype=torch.uint8), batch_size=8, length=43))
    importance = head_importance(model, next_token_output, batches)
    torch.testing.assert_close(network.importance, torch.cat([*importance.values()]).double())
    assert not network.edge_importance.isnan().any()


def test_the_page_is_the_default_and_opened_when_asked(tmp_path, monkeypatch):
    saved(tmp_path / "model")
    opened = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(webbrowser, "open", opened.append)
    assert main(["draw", "model", "--text", "h\u00e9ads & <b>", "--open"]) == 0
    page = (tmp_path / "heads.html").read_text()
    assert opened == [(tmp_path / "heads.html").as_uri()] and "model: mean edge weights over" in page


def test_two_checkpoints_and_two_texts_are_compared(tmp_path):
    saved(tmp_path / "model")
    saved(tmp_path / "other", seed=1)
    (tmp_path / "other.txt").write_text("other words, for the same heads")
    arguments = [str(tmp_path / "model"), "--text", WORDS, "--view", "difference", "--title", ""]
    for number, other in enumerate(("other", "other.txt", "model")):
        out = str(tmp_path / f"{number}.png")
        assert main(["draw", *arguments, "--compare", str(tmp_path / other), "--out", out]) == 0
    first, second, same = (Image.open(tmp_path / f"{number}.png").convert("L").tobytes() for number in range(3))
    assert len({first, second, same}) == 3


def test_a_film_shows_the_steps_of_a_run(run_folder, tmp_path, capsys):
    assert list(training_steps(run_folder)) == [5, 10, 15, 20]
    assert main(["draw", str(run_folder), "--out", str(tmp_path / "film.gif"), "--text", WORDS]) == 0
    assert Image.open(tmp_path / "film.gif").n_frames == 4


def test_a_step_of_a_run_is_a_checkpoint(run_folder, tmp_path):
    steps = training_steps(run_folder)
    last, saved_model = load_language_model(steps[20]), goh.LanguageModel.from_pretrained(run_folder / "model")
    assert all(torch.equal(last.state_dict()[name], value) for name, value in saved_model.state_dict().items())
    assert not last.training and find_model(steps[5]) == steps[5]
    arguments = [str(steps[20]), "--text", WORDS, "--view", "difference", "--out", str(tmp_path / "change.png")]
    assert main(["draw", *arguments, "--compare", str(steps[5])]) == 0


def test_training_is_logged_for_tensorboard(run_folder):
    assert list((run_folder / "tensorboard").glob("events.out.tfevents.*"))


@pytest.mark.slow
def test_the_demo_needs_no_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sources, "demo_model", lambda: demo_model(steps=3))
    assert main(["draw", "--demo", "--out", str(tmp_path / "heads.html")]) == 0
    assert (tmp_path / "heads.html").stat().st_size > 1_000_000 and "demo: mean" in capsys.readouterr().out


def test_the_built_in_corpus_is_the_default(tmp_path, capsys):
    saved(tmp_path / "model")
    assert main(["draw", str(tmp_path / "model"), "--tokens", "300", "--out", str(tmp_path / "heads.png")]) == 0
    assert (tmp_path / "heads.png").stat().st_size > 10_000 and "over 256 tokens" in capsys.readouterr().out


def test_text_from_a_file(tmp_path, capsys):
    saved(tmp_path / "model")
    (tmp_path / "text.txt").write_bytes(bytes(range(256)) * 5)
    arguments = [str(tmp_path / "model"), "--text-file", str(tmp_path / "text.txt"), "--tokens", "300"]
    assert main(["draw", *arguments, "--length", "64", "--out", str(tmp_path / "heads.svg")]) == 0
    assert "over 256 tokens" in capsys.readouterr().out


def test_a_run_folder_gives_its_newest_checkpoint(tmp_path, capsys):
    run = tmp_path / "run"
    for number, name in enumerate(("checkpoints/step-2", "checkpoints/step-10")):
        saved(run / name)
        os.utime(run / name / "model.safetensors", (number + 1, number + 1))
    assert find_model(run) == run / "checkpoints" / "step-10"
    saved(run / "plain" / "model", head_graph=None)
    assert find_model(run) == run / "checkpoints" / "step-10"
    # Which of several is shown is said, for pictures of any source.
    for source in ("graph", "weights", "attribution"):
        text = [] if source == "weights" else ["--text", WORDS]
        assert main(["draw", str(run), "--from", source, *text, "--out", str(tmp_path / "heads.json")]) == 0
        assert f"the newest model in the folder, {Path('checkpoints', 'step-10')}" in capsys.readouterr().out
    saved(run / "model")
    for folder in (run / "model", run / "checkpoints" / "step-2"):
        assert main(["draw", str(folder), "--text", WORDS, "--out", str(tmp_path / "heads.json")]) == 0
        assert "newest" not in capsys.readouterr().out


def test_both_sites_rounds_and_earlier_layers(tmp_path, capsys):
    graphs = goh.HeadGraphConfig(outputs=goh.SiteConfig(cross_layer=1, rounds=2), scores=goh.SiteConfig.ring(2))
    saved(tmp_path / "model", head_graph=graphs)
    for view in ("circle", "network", "matrix"):
        arguments = ["--text", WORDS, "--view", view, "--out", str(tmp_path / "heads.svg")]
        assert main(["draw", str(tmp_path / "model"), *arguments]) == 0
    rows = rows_of(capsys.readouterr().out, 0)
    assert {site for _, _, site, *_ in rows} <= {"outputs 1", "outputs 2", "scores 1"}


def test_pictures_are_whole_documents(tmp_path):
    saved(tmp_path / "model")
    assert main(["draw", str(tmp_path / "model"), "--text", "$a & <b>$ \\", "--view", "tokens", "--out",
                      str(tmp_path / "heads.svg")]) == 0  # fmt: skip
    xml.etree.ElementTree.parse(tmp_path / "heads.svg")


def test_characters_of_several_bytes_stand_at_their_last():
    assert byte_strings(torch.tensor(list("h\u20ac".encode()))) == ["h", "", "", "\u20ac"]
    assert byte_strings(torch.tensor([255, 104])) == ["\ufffd", "h"]


BAD = {
    "no checkpoint": (["missing"], r"Expected a folder or a name on the hub, owner/model \(got missing"),
    "a folder without one": (["none"], "Expected model.safetensors in"),
    "plain attention": (["plain", "--from", "graph"], "Expected a model with head graphs"),
    "no byte-level model": (["small"], r"Expected a byte-level model \(got a vocabulary of 11\)"),
    "damaged": (["damaged"], "Expected a whole safetensors file"),
    "a mistyped text": (["model", "--text-file", "nan"], r"\[Errno 2\] No such file"),
    "an empty text": (["model", "--text-file", "empty.txt"], "Expected a text of at least two tokens"),
    "two texts": (["model", "--text-file", "empty.txt", "--text", WORDS], "Expected --text or --text-file"),
    "no tokens": (["model", "--tokens", "0"], "Expected --tokens to be an int >= 1"),
    "no length": (["model", "--length", "-3"], "Expected --length to be an int >= 1"),
    "too long": (["learned", "--length", "65"], "Expected --length up to the model's max_length 64"),
    "no threads": (["model", "--threads", "0"], "Expected --threads to be an int >= 1"),
    "a strange picture": (["model", "--out", "heads.bmp"], "Expected a file name that ends in"),
    "no folder for it": (["model", "--out", "nowhere/heads.svg"], "Expected a folder for heads.svg"),
    "an unknown view": (["model", "--view", "cube"], "Expected other flags"),
    "a page of a view": (["model", "--view", "matrix", "--out", "heads.html"], "Expected --out of .png, .svg, .pdf"),
    "a film as picture": (["model", "--view", "film"], "Expected --out of .gif, .mp4 for --view film"),
    "a film without a run": (["model", "--out", "film.gif"], "Expected the folder of one run with checkpoints"),
    "nothing to compare": (["model", "--view", "difference"], "Expected --compare for --view difference"),
    "another shape": (["model", "--view", "difference", "--compare", "wide"], "Expected two recordings of the same"),
    "an idle flag": (["model", "--view", "network", "--layer", "1"], "Expected --layer with --view circle or matrix"),
    "no such layer": (["model", "--layer", "9"], r"Expected a layer of \['layer 0', 'layer 1'\] \(got 9\)"),
    "no such layer of attention": (["model", "--attention", "--layer", "9"], r"Expected a layer of \['layer 0'.* 9\)"),
    "a head without its layer": (["model", "--attention", "--head", "1"], "Expected --layer with --head 1"),
    "a head of no pattern": (["model", "--layer", "1", "--head", "1"], "Expected --head with --view attention"),
    "two views": (["model", "--attention", "--view", "matrix"], "Expected no --view matrix with --attention"),
    "a file of attention": (["model", "--attention", "--out", "h.json"], "Expected a picture or a page for --att"),
    "a limit of attention": (["model", "--attention", "--limit", "1"], "Expected no --limit for --view attention"),
    "attention of weights": (["model", "--attention", "--from", "weights"], "Expected --attention of a model"),
    "edges to leave out": (["model", "--no-learned"], "Expected --no-learned with --from weights or attribution"),
    "no such token": (["model", "--view", "tokens", "--token", "99"], "Expected a token from 0 to 42"),
    "a strange threshold": (["model", "--threshold", "7"], "Expected a threshold from 0 to 1"),
    "neither": ([], r"Expected a model or --demo \(got neither\)"),
    "both": (["model", "--demo"], r"Expected a model or --demo \(got both\)"),
    "a film of the demo": (["--demo", "--out", "film.gif"], "Expected a run folder for a film"),
}


@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    for name, changes in (
        ("model", {}),
        ("plain", {"head_graph": None}),
        ("small", {"vocab_size": 11}),
        ("wide", {"num_heads": 10}),
        ("damaged", {}),
    ):
        saved(folder / name, **changes)
    saved(folder / "learned", positions="learned")
    os.truncate(folder / "damaged" / "model.safetensors", 100)
    (folder / "none").mkdir()
    (folder / "empty.txt").touch()
    (folder / "heads.svg").write_text("old")
    return folder


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_exit_code_2_and_one_sentence(bad_folder, monkeypatch, capsys, name):
    arguments, sentence = BAD[name]
    monkeypatch.chdir(bad_folder)
    text = [] if "--text-file" in arguments else ["--text", WORDS]
    out = [] if "--out" in arguments else ["--out", "heads.svg"]
    assert main(["draw", *arguments, *text, *out]) == 2
    printed = capsys.readouterr()
    assert re.match(f"error: {sentence}", printed.err) and printed.err.count("\n") == 1 and not printed.out
    assert (bad_folder / "heads.svg").read_text() == "old"


def test_a_missing_extra_is_named(tmp_path, monkeypatch, capsys):
    saved(tmp_path / "model")
    monkeypatch.setitem(sys.modules, "bokeh", None)
    assert main(["draw", str(tmp_path / "model"), "--text", WORDS, "--out", str(tmp_path / "heads.html")]) == 2
    assert "gohgraph[interactive]" in capsys.readouterr().err


def test_a_comparison_gives_the_model_that_has_a_graph(tmp_path):
    saved(tmp_path / "run" / "goh" / "model")
    saved(tmp_path / "run" / "plain" / "model", head_graph=None)
    assert find_model(tmp_path / "run") == tmp_path / "run" / Path("goh", "model")
