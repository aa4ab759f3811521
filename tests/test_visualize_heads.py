from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from helpers import load_script

import gohgraph as goh

WORDS = "heads talk to heads, and some of them listen"


@pytest.fixture(scope="module")
def tool():
    return load_script("tools", "visualize_heads")


@pytest.fixture(autouse=True)
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


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


def test_draws_and_names_the_strongest_edges(tool, tmp_path, capsys):
    model = saved(tmp_path / "model").eval()
    out = tmp_path / "heads.svg"
    assert tool.main([str(tmp_path / "model"), "--text", WORDS, "--out", str(out), "--length", "7"]) == 0
    assert out.read_bytes().startswith(b"<?xml")
    printed = capsys.readouterr().out
    assert str(out) in printed
    lines = re.findall(r"layer (\d) outputs: (\d) -> (\d)  mean ([+-][\d.]+)  sd ([\d.]+)", printed)
    assert len(lines) == 5

    # The same numbers by hand: sequences of 7 bytes and a last one of the rest.
    data = torch.tensor(list(WORDS.encode()))
    pieces = [piece[None] for piece in data.split(7)]
    with goh.record(model) as heads, torch.no_grad():
        for piece in pieces:
            model(piece)
    assert {recording.tokens for recording in heads.values()} == {len(WORDS)}
    edges = {}
    for layer, recording in enumerate(heads.values()):
        for j, i, mean, std in zip(*recording.edge_index.tolist(), recording.mean[0], recording.std[0], strict=True):
            edges[str(layer), str(j), str(i)] = (mean.item(), std.item())
    strongest = sorted(edges, key=lambda edge: -abs(edges[edge][0]))[:5]
    assert [line[:3] for line in lines] == strongest
    for *edge, mean, std in lines:
        assert (float(mean), float(std)) == pytest.approx(edges[tuple(edge)], abs=2e-4)


def test_text_from_a_file_is_cut_to_the_tokens(tool, tmp_path, capsys):
    saved(tmp_path / "model")
    (tmp_path / "text.txt").write_bytes(bytes(range(256)) * 5)
    arguments = [str(tmp_path / "model"), "--text", str(tmp_path / "text.txt"), "--tokens", "300", "--length", "64"]
    assert tool.main([*arguments, "--out", str(tmp_path / "heads.svg")]) == 0
    sequences = tool._sequences(goh.LanguageModel.from_pretrained(tmp_path / "model"), torch.arange(300) % 256, 300, 64)
    assert [tuple(batch.shape) for batch in sequences] == [(4, 64), (1, 44)]
    assert torch.equal(torch.cat([batch.flatten() for batch in sequences]), torch.arange(300) % 256)


def test_the_built_in_corpus_is_the_default(tool, tmp_path, capsys):
    saved(tmp_path / "model")
    assert tool.main([str(tmp_path / "model"), "--tokens", "99", "--out", str(tmp_path / "heads.png")]) == 0
    assert (tmp_path / "heads.png").stat().st_size > 10_000


def test_a_run_folder_gives_its_newest_checkpoint(tool, tmp_path, capsys):
    run = tmp_path / "run"
    for number, name in enumerate(("checkpoints/step-2", "checkpoints/step-10")):
        saved(run / name)
        os.utime(run / name / "model.safetensors", (number + 1, number + 1))
    assert tool.main([str(run), "--text", WORDS, "--out", str(tmp_path / "heads.svg")]) == 0
    assert "step-10" in capsys.readouterr().out


def test_both_sites_rounds_and_earlier_layers(tool, tmp_path, capsys):
    graphs = goh.HeadGraphConfig(outputs=goh.SiteConfig(cross_layer=1, rounds=2), scores=goh.SiteConfig.ring(2))
    saved(tmp_path / "model", head_graph=graphs)
    assert tool.main([str(tmp_path / "model"), "--text", WORDS, "--out", str(tmp_path / "heads.svg")]) == 0
    assert re.search(r"layer \d (outputs round \d|scores): \d( \(1 before\))? -> \d", capsys.readouterr().out)


BAD = {
    "no checkpoint": (["missing"], "Expected a checkpoint folder"),
    "a folder without one": (["."], "Expected model.safetensors in"),
    "plain attention": (["plain"], "Expected a model with head graphs"),
    "no byte-level model": (["small"], r"Expected a byte-level model \(got a vocabulary of 11\)"),
    "damaged": (["damaged"], "Expected a whole safetensors file"),
    "a mistyped text": (["model", "--text", "nan"], "Expected --text to be a file or several words"),
    "an empty text": (["model", "--text", "empty.txt"], "Expected a text of at least one byte"),
    "no tokens": (["model", "--tokens", "0"], "Expected --tokens of at least 1"),
    "no length": (["model", "--length", "-3"], "Expected --length of at least 1"),
    "too long": (["learned", "--length", "65"], "Expected --length of at most the model's max_length 64"),
    "no threads": (["model", "--threads", "0"], "Expected --threads of at least 1"),
    "a strange picture": (["model", "--out", "heads.gif"], "Expected a file name that ends in"),
    "no folder for it": (["model", "--out", "nowhere/heads.svg"], "Expected a folder for the picture"),
}


@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    for name, changes in (
        ("model", {}),
        ("plain", {"head_graph": None}),
        ("small", {"vocab_size": 11}),
        ("damaged", {}),
    ):
        saved(folder / name, **changes)
    saved(folder / "learned", positions="learned")
    os.truncate(folder / "damaged" / "model.safetensors", 100)
    (folder / "empty.txt").touch()
    (folder / "heads.svg").write_text("old")
    return folder


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_exit_code_2_and_one_sentence(tool, bad_folder, monkeypatch, capsys, name):
    arguments, sentence = BAD[name]
    if name == "a folder without one":
        (bad_folder / "none").mkdir(exist_ok=True)
        arguments = ["none"]
    monkeypatch.chdir(bad_folder)
    text = [] if "--text" in arguments else ["--text", WORDS]
    assert tool.main([*arguments, *text]) == 2
    printed = capsys.readouterr()
    assert re.match(f"error: {sentence}", printed.err) and printed.err.count("\n") == 1 and not printed.out
    assert (bad_folder / "heads.svg").read_text() == "old"


def test_a_comparison_gives_the_model_that_has_a_graph(tool, tmp_path, capsys):
    saved(tmp_path / "run" / "goh" / "model")
    saved(tmp_path / "run" / "plain" / "model", head_graph=None)
    assert tool.main([str(tmp_path / "run"), "--text", WORDS, "--out", str(tmp_path / "heads.png")]) == 0
    assert str(Path("goh", "model")) in capsys.readouterr().out
