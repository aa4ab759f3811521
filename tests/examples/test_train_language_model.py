"""The example that trains a language model, run in this process at tiny sizes."""

from __future__ import annotations

import csv
import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from example_runs import check_resumed, refused
from helpers import load_script

from gohgraph import LanguageModel, draw_load
from gohgraph.attention.head_load import load_cv
from gohgraph.attention.routing import routers
from gohgraph.learning.cli import comparison, language_model
from gohgraph.models.config import BEFORE

TINY = "--d-model 14 --num-heads 7 --num-layers 2 --d-ff 13 --length 17 --batch-size 3 --steps 11 --device cpu".split()
TINY += ["--eval-every", "4"]


@pytest.fixture(scope="module")
def script():
    return load_script("examples", "train_language_model")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    words = ["heads", "pass", "messages", "over", "a", "graph", "— naïvely —", "and", "attend"]
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(" ".join(random.Random(3).choices(words, k=1500)), encoding="utf-8")
    return path


@pytest.fixture
def main(script, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # A figure for every evaluation; one test draws them.
    monkeypatch.setattr(language_model, "log_head_graphs", lambda writer, model, step: None)
    monkeypatch.setattr(language_model, "draw_load", lambda load, path, **options: path.touch())
    return lambda *arguments: script.main(["--data", str(text), *TINY, *arguments])


def log(folder: Path) -> list[list[str]]:
    with open(folder / "log.csv", newline="") as file:
        return [[row[name] for name in ("step", "loss", "validation_loss", "lr")] for row in csv.DictReader(file)]


def test_one_run_leaves_everything(script, text, tmp_path, monkeypatch, capsys, figures):
    monkeypatch.chdir(tmp_path)
    flags = "--run out --sites both --cross-layer 1 --eval-every 6".split()
    assert script.main(["--data", str(text), *TINY, *flags]) == 0
    folder = tmp_path / "out"
    assert all((folder / name).stat().st_size > 5000 for name in ("curves.png", "heads.png"))
    names = "config.json log.csv curves.png checkpoints model sample.txt heads.png result.json tensorboard"
    assert {path.name for path in folder.iterdir()} == set(names.split())
    model = LanguageModel.from_pretrained(folder / "model")
    assert model.config.head_graph.outputs.cross_layer == 1 and model.config.head_graph.scores.options == {}
    result = json.loads((folder / "result.json").read_text())
    assert result["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert 1 < result["validation_loss"] < 6
    settings = json.loads((folder / "config.json").read_text())
    assert settings["flags"]["sites"] == "both" and settings["model"] == model.config.to_dict()
    shown = capsys.readouterr().out
    assert "out/heads.png" in shown and f"{result['parameters']:,}" in shown


def test_the_default_folder_and_a_smoke_run(script, main, text, tmp_path):
    assert script.main(["--data", str(text), "--smoke", "--device", "cpu"]) == 0
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"language-model"}


def test_compare_trains_both_on_the_same_data_with_equal_parameters(main, tmp_path, monkeypatch, capsys, figures):
    # Long enough for a verdict, if so few steps were.
    monkeypatch.setattr(comparison, "too_short", lambda steps: "")
    assert main("--compare", "--run", "out") == 0
    shown = capsys.readouterr().out
    results = {name: json.loads((tmp_path / "out" / name / "result.json").read_text()) for name in ("goh", "plain")}
    counts = [result["parameters"] for result in results.values()]
    assert abs(counts[0] - counts[1]) <= 2 * 14 + 1 and all(f"{count:,}" in shown for count in counts)
    plain = LanguageModel.from_pretrained(tmp_path / "out" / "plain" / "model").config
    assert plain.head_graph is None and plain.d_ff > 13
    assert (tmp_path / "out" / "curves.png").stat().st_size > 5000 and "out/curves.png, out/goh/heads.png" in shown
    assert re.search("goh is (ahead|behind) by", shown) and "this is no verdict" in shown
    # A new head graph is plain attention, but for the width of the feed-forward: equal data shows in the first losses.
    configs = [json.loads((tmp_path / "out" / name / "config.json").read_text()) for name in results]
    assert configs[0]["data"] == configs[1]["data"] and configs[0]["training"] == configs[1]["training"]
    assert main("--match-parameters", "--run", "plain") == 0
    assert log(tmp_path / "plain") == log(tmp_path / "out" / "plain")


def test_a_router_shows_its_load(script, main, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(language_model, "draw_load", draw_load)
    flags = "--router --num-shared 2 --top-k 3 1 --balance-loss 0.02 --z-loss 0.001 --bias-rate 0.01 --anneal-top-k 5"
    assert main("--run", "out", *flags.split()) == 0
    folder, shown = tmp_path / "out", capsys.readouterr().out
    model = LanguageModel.from_pretrained(folder / "model")
    routing = {"num_shared": 2, "top_k": [3, 1], "balance_loss": 0.02, "z_loss": 0.001, "bias_rate": 0.01}
    assert model.config.to_dict()["head_graph"]["routing"] == {**routing, "straight_through": False}
    assert all(router.balance_bias.abs().max() > 0 for router in routers(model))
    assert json.loads((folder / "config.json").read_text())["training"]["anneal_top_k"] == 5
    result = json.loads((folder / "result.json").read_text())
    load = torch.tensor(result["load"], dtype=torch.float64)
    assert load.shape == (2, 7) and (load[:, :2] == 1).all()
    torch.testing.assert_close(load[:, 2:].sum(1), torch.tensor([3.0, 1.0]).double(), rtol=0, atol=1e-6)
    assert result["load_cv"] == pytest.approx(load_cv(load, 2).mean().item())
    assert f"routing of out: load CV {result['load_cv']:.3f}, load entropy {result['load_entropy']:.3f}" in shown
    assert "heads as a graph, routed by token" in shown and "out/heads.png" in shown and "out/load.png" in shown
    assert (folder / "load.png").stat().st_size > 5000
    with open(folder / "log.csv", newline="") as file:
        row = list(csv.DictReader(file))[-1]
    assert all(row[name] for name in ("balance_loss", "z_loss", "load_cv", "load_entropy", "router_entropy"))


def test_routing_without_messages_is_compared_with_plain(main, tmp_path, capsys):
    assert main("--sites", "none", "--router", "--anneal-top-k", "3", "--compare", "--run", "out") == 0
    shown, folder = capsys.readouterr().out, tmp_path / "out"
    results = {name: json.loads((folder / name / "result.json").read_text()) for name in ("moh", "plain")}
    counts = [result["parameters"] for result in results.values()]
    assert abs(counts[0] - counts[1]) <= 2 * 14 + 1 and all(f"{count:,}" in shown for count in counts)
    graph = LanguageModel.from_pretrained(folder / "moh" / "model").config.head_graph
    assert graph.outputs is graph.scores is None and (graph.routing.num_shared, graph.routing.top_k) == (2, 3)
    assert [path.name for path in folder.rglob("load.png")] == ["load.png"] and not list(folder.rglob("heads.png"))
    assert "load" not in results["plain"] and "moh: heads routed by token; plain: plain attention" in shown
    assert "goh" not in shown and "no verdict: 11 steps" in shown and "moh is" not in shown
    assert main("--sites", "none", "--router", "--match-parameters", "--run", "plain") == 0
    assert log(tmp_path / "plain") == log(folder / "plain")


def test_graph_experts(main, tmp_path):
    assert main("--experts", "--rounds", "3", "--alignment", "0.1", "--top-edges", "2", "--router", "--run", "out") == 0
    graph = LanguageModel.from_pretrained(tmp_path / "out" / "model").config.head_graph
    assert (graph.outputs.topology, graph.outputs.num_shared, graph.outputs.rounds) == ("bipartite", 2, 3)
    assert graph.outputs.top_edges == 2 and graph.alignment == 0.1 and graph.routing.num_shared == 2
    assert (tmp_path / "out" / "heads.png").exists() and (tmp_path / "out" / "load.png").exists()


def test_a_run_of_before_recipes_had_names_goes_on_as_it_began(main, tmp_path, capsys):
    assert main("--run", "old", "--recipe", "old", "--checkpoint-every", "5") == 0
    expected, file = log(tmp_path / "old"), tmp_path / "old" / "config.json"
    shutil.rmtree(tmp_path / "old" / "checkpoints" / "step-000011")
    saved = json.loads(file.read_text())
    assert saved["training"]["optimizer"] == "adamw" and saved["model"]["init"] == "normal"
    for field in BEFORE:
        del saved["model"][field]
    for field in ("optimizer", "matrix_learning_rate", "warmdown"):
        del saved["training"][field]
    del saved["flags"]["recipe"]
    file.write_text(json.dumps(saved))
    assert main("--run", "old", "--checkpoint-every", "5", "--resume") == 0
    assert log(tmp_path / "old") == expected
    capsys.readouterr()
    assert "training.optimizer = 'muon'" in refused(main("--run", "old", "--resume", "--recipe", "modern"), capsys)


def test_ctrl_c_and_resume_equal_an_uninterrupted_run(main, tmp_path, monkeypatch, capsys):
    flags = "--dropout 0.1 --compare --router --bias-rate 0.01 --anneal-top-k 9".split()
    # The routed model is done then, and the plain one in its sixth step.
    check_resumed(lambda *more: main(*flags, *more), tmp_path, monkeypatch, capsys, stop_at=11 + 6)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num-heads", "3"], "multiple of num_heads"),
        (["--num-kv-heads", "4"], "num_kv_heads to divide"),
        (["--in-degree", "3"], "ring or random topology"),
        (["--topology", "ring", "--in-degree", "9"], "hops"),
        (["--topology", "ring", "--in-degree", "0"], "--in-degree of at least 1"),
        (["--edges", "static", "--rank", "3"], "rank=None with 'static'"),
        (["--score-in-degree", "2"], "no --score-in-degree with --sites outputs"),
        (["--sites", "scores", "--topology", "ring"], "no --topology with --sites scores"),
        (["--sites", "none", "--rank", "2"], "no --rank with --sites none"),
        (["--sites", "none", "--compare"], "head graph to compare"),
        (["--top-k", "3"], "no --top-k without --router"),
        (["--router", "--top-k", "6"], "top_k of at least 1 and at most"),
        (["--router", "--top-k", "3", "2", "1"], "one top_k for each of 2 layers"),
        (["--router", "--anneal-top-k", "11"], "anneal_top_k below steps = 11"),
        (["--router", "--balance-loss", "-1"], "balance_loss"),
        (["--experts", "--num-shared", "9"], "num_shared"),
        (["--compare", "--match-parameters"], "got both"),
        (["--precision", "fp16"], "on the CPU"),
        (["--steps", "0"], "steps"),
        (["--dropout", "1.5"], "dropout"),
        (["--length", "99999"], "shorter windows or a longer text"),
        (["--batch-size", "0"], "batch_size"),
        (["--resume"], "run to resume"),
    ],
)
def test_impossible_flags_are_one_sentence(main, tmp_path, capsys, flags, message):
    assert message in refused(main("--run", "out", *flags), capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [["--steps", "many"], ["--sites", "all"], ["--unknown"]])
def test_flags_that_do_not_parse_are_one_sentence(main, capsys, flags):
    assert "Expected other flags" in refused(main("--run", "out", *flags), capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what is asked for")
def test_cuda_without_cuda(main, tmp_path, capsys):
    assert "'cuda'" in refused(main("--run", "out", "--device", "cuda"), capsys)
    assert not (tmp_path / "out").exists()


def test_compile_without_a_compiler(main, tmp_path, monkeypatch, capsys):
    def failing(*arguments, **keywords):
        raise RuntimeError("No working C++ compiler found\nsee the log")

    monkeypatch.setattr(torch, "compile", failing)
    assert "got: No working C++ compiler found)" in refused(main("--run", "out", "--compile"), capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [None, b"", b"short"])
def test_missing_and_short_texts(script, tmp_path, capsys, content):
    data = tmp_path / "data.txt"
    if content is not None:
        data.write_bytes(content)
    refused(script.main(["--data", str(data), *TINY, "--run", str(tmp_path / "out")]), capsys)
    assert not (tmp_path / "out").exists()
