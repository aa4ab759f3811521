"""Tests of `tools/benchmark.py convert`: what the rows are, what a call does, the table, bad input."""

from __future__ import annotations

import json
import time

import pytest
import torch
from benchmarks import convert as benchmark
from benchmarks.backbones import BACKBONES, VOCABULARY, Case
from helpers import assert_equal_to, load_script

from gohgraph.graphs.conv import HeadGraphConv

CASE = Case(d_model=20, num_heads=5, num_layers=2, tokens=7, batch=3, past=11)
GRAPHS = ["plain", "score graph", "score graph, ring of 2"]
backbones = pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)


@pytest.fixture(scope="module")
def tool():
    return load_script("tools", "benchmark")


def random_tokens(length):
    return torch.randint(VOCABULARY, (CASE.batch, length))


@backbones
@torch.no_grad()
def test_rows_share_the_backbone_and_differ_by_graphs_that_have_moved(backbone):
    plain = backbone.build(CASE).eval()
    tokens, state = random_tokens(7), plain.state_dict()
    expected = backbone.forward(plain, tokens).logits
    for name, config in benchmark.VARIANTS.items():
        model = benchmark.converted(plain, config)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
        graphs = [module for module in model.modules() if isinstance(module, HeadGraphConv)]
        assert len(graphs) == (0 if config is None else 2), name
        assert all(graph.edges.weight.all() for graph in graphs)
        assert torch.equal(backbone.forward(model, tokens).logits, expected) == (config is None)


def test_our_own_model_is_of_the_size_of_the_other():
    llama, own = (backbone.build(CASE) for backbone in BACKBONES.values())
    shapes = [sorted(tuple(parameter.shape) for parameter in model.parameters()) for model in (llama, own)]
    assert shapes[0] == shapes[1]


@backbones
@pytest.mark.parametrize("variant", GRAPHS)
def test_decoding_goes_on_from_the_cached_tokens_and_forgets_again(backbone, variant):
    model = benchmark.converted(backbone.build(CASE), benchmark.VARIANTS[variant]).double().eval()
    call = benchmark.Decode(backbone, model, random_tokens(7), CASE.past)
    tokens, seen = random_tokens(CASE.past + 1), []
    with torch.no_grad():
        call.cache, call.tokens = backbone.prefill(model, tokens[:, :-1]), tokens[:, -1:]
        expected = backbone.forward(model, tokens).logits[:, -1:]
    call.model.register_forward_hook(lambda module, inputs, output: seen.append(output.logits))
    for _ in range(3):
        assert call.seconds() >= 0
    assert len(seen) == 3 and all(not logits.requires_grad for logits in seen)
    for logits in seen:
        assert_equal_to(logits, expected)


@backbones
def test_a_step_leaves_the_gradients_of_its_own_loss(backbone):
    model = benchmark.converted(backbone.build(CASE), benchmark.VARIANTS["score graph"])
    call = benchmark.Step(backbone, model, random_tokens(7), CASE.past)
    found = []
    for _ in range(2):
        call.seconds()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    assert model.training and all(map(torch.equal, *found)) and all(gradient.any() for gradient in found[0])


def test_time_is_that_of_the_processor_on_a_cpu():
    backbone = BACKBONES["own"]
    model, tokens = backbone.build(CASE), random_tokens(7)
    for kind in benchmark.KINDS.values():
        call = kind(backbone, model, tokens, CASE.past)
        assert call.clock is time.process_time


def test_a_smoke_run_prints_and_writes_all_tables(tool, tmp_path, capsys):
    file, kinds = tmp_path / "rows.json", list(benchmark.KINDS)
    flags = ["--kinds", *kinds, "--past", "13", "--repeats", "3"]
    assert tool.main(["convert", "--smoke", "--threads", "1", "--json", str(file), *flags]) == 0
    shown, saved = capsys.readouterr().out, json.loads(file.read_text())
    assert "1 CPU threads" in saved["machine"] and "| CPU time (quartiles) |" in " ".join(shown.split())
    assert all(f"**{kind}**, d_model 24" in shown for kind in kinds) and shown.count("past 13") == 3
    rows = saved["rows"]
    names = [(model, variant) for model in BACKBONES for variant in benchmark.VARIANTS]
    assert [(row["model"], row["variant"]) for row in rows] == names * 3
    for row in rows:
        same = {"model": row["model"], "kind": row["kind"], "variant": "plain"}
        plain = next(other for other in rows if same.items() <= other.items())
        assert len(row["seconds"]) == 3 and row["clock"] == "processor"
        each = [own / other for own, other in zip(row["seconds"], plain["seconds"], strict=True)]
        assert row["ratio"][1] == pytest.approx(sorted(each)[1])
        assert f"{row['ratio'][1]:.3f} (" in shown and f"{sorted(row['seconds'])[1] * 1e3:.2f} ms (" in shown


def test_models_and_variants_are_chosen(tool, tmp_path):
    file = tmp_path / "rows.json"
    flags = ["--models", "own", "--only", "score graph", "--json", str(file)]
    assert tool.main(["convert", "--smoke", "--threads", "1", *flags]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [(row["model"], row["variant"]) for row in rows] == [("own", "plain"), ("own", "score graph")]


BAD = [["--sizes", "20/3/1/7/1"], ["--sizes", "20/5"], ["--sizes", "20/5/1/1/1"], ["--repeats", "1"], ["--kinds", "x"]]
BAD += [["--past", "0"], ["--models", "GPT"], ["--only", "score"]]


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_line(tool, flags, capsys):
    assert tool.main(["convert", *flags]) == 2
    assert capsys.readouterr().err.startswith("error: Expected")
