"""Recordings and networks in a notebook's cell, and what figures are given."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers import moved, small_config

import gohgraph as goh
from gohgraph.drawing.notebook import picture


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return moved(goh.LanguageModel(small_config("outputs", num_layers=2))).eval()


@pytest.fixture(scope="module")
def heads(model):
    with goh.record(model) as heads, torch.no_grad():
        model(torch.tensor([[3, 4, 5, 6]]))
    return heads


def test_recordings_are_read_at_a_glance(model, heads):
    one = next(iter(heads.values()))
    edge = int(one.mean[0].abs().argmax())
    sender, receiver = one.edge_index[:, edge].tolist()
    strongest = f"{sender} \u2192 {receiver}: {one.mean[0, edge]:+.4f}"
    assert repr(one).startswith("Recording(5 heads, 25 edges, 4 tokens: mean |weight| 0.") and strongest in repr(one)
    head, *lines = repr(heads).splitlines()
    assert head.startswith("head graph") and len(lines) == 2
    assert lines[0].startswith("layer 0 outputs") and strongest in lines[0]
    with goh.record(model) as empty:
        assert "nothing seen yet" in repr(next(iter(empty.values()))) and "nothing seen yet" in empty._repr_html_()
        model(torch.tensor([[3]]))


@pytest.mark.parametrize("of", ["stock", "own", "encoder-decoder", "chosen heads of each example"])
def test_recorded_attention_is_read_at_a_glance(of, model):
    """Of models without head graphs it is all there is."""
    if of == "own":
        inputs, options, tables = (torch.tensor([[3, 4, 5, 6]] * 3),), True, 2
    else:
        transformers_models = pytest.importorskip("transformers_models")
        model, tables = transformers_models.build("t5" if of == "encoder-decoder" else "bert").eval(), 1
        inputs = transformers_models.inputs_of(model)
        options = {"layers": [1], "heads": [2], "every_example": True} if of.startswith("chosen") else True
    with goh.record(model, attention=options) as heads, torch.no_grad():
        model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    *_, table = repr(heads).split("\n\n")
    first, *lines = table.splitlines()
    assert first.split("  ")[0] == "attention of" and len(lines) == len(heads.attention)
    for line, one in zip(lines, heads.attention.values(), strict=True):
        rows, columns = one.maps.shape[-2:]
        assert line.startswith(one.title) and line.endswith(f"{rows} x {columns}")
    shown = heads._repr_html_()
    assert shown.count("<table>") == tables and "data:image/png;base64," in shown


def test_a_recording_of_nothing_says_so():
    from gohgraph.analysis.recording import Recordings

    assert "no head graph" in repr(Recordings({})) and "no head graph" in Recordings({})._repr_html_()


def test_a_cell_shows_a_table_and_a_picture(heads):
    for thing in (heads, goh.head_graph_of(heads)):
        shown = thing._repr_html_()
        assert shown.count("<table>") == 1 and "data:image/png;base64," in shown
    network = goh.head_graph_of(heads)
    best = network.strongest(1)[0]
    assert f"{best['sender']} \u2192 {best['receiver']}" in network._repr_html_()
    network.mean[0] = float("nan")
    assert "Expected finite edge weights" in picture(network) and "<table>" in network._repr_html_()


def test_the_page_is_shown_in_a_frame(heads, monkeypatch):
    pytest.importorskip("bokeh")
    shown = []
    display = ModuleType("IPython.display")
    display.HTML, display.display = SimpleNamespace, shown.append
    display.HTML = lambda text: text
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    goh.show(goh.head_graph_of(heads), height=300, title="heads & edges")
    assert shown[0].startswith('<div><iframe srcdoc="') and "height: 300px" in shown[0]
    assert "heads &amp;amp; edges" in shown[0] and "<script" not in shown[0]


def test_without_a_notebook_a_file_is_recommended(heads, monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython.display", None)
    with pytest.raises(ImportError, match="^Expected a notebook.*save_page"):
        goh.show(heads)


def test_a_model_is_drawn_by_its_weights_at_rest_or_told_what_to_pass(model, heads):
    network = goh.head_graph_of(model)
    matrix = goh.draw_matrices(model).axes[0].images[0].get_array()
    edge = (network.edge_index.t() == torch.tensor([1, 0])).all(dim=1).nonzero()[0]
    assert matrix[0, 1] == pytest.approx(network.mean[edge].item(), rel=1e-5)
    assert goh.draw(model).axes[0].get_title() == goh.draw(heads).axes[0].get_title() == "layer 0 outputs"
    goh.draw_network(model)
    for thing, message in (
        (torch.nn.Linear(2, 2), r"composition_graph\(model\)"), (network, "draw_network"), (3, "Expected a recording"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=message):
            goh.draw(thing)
