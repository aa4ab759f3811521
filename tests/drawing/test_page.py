"""The interactive page: its model by Bokeh's own objects, and the page itself in a headless Chromium."""

from __future__ import annotations

import re
import shutil
import sys
import time

import numpy as np
import pytest
import torch
from bokeh.models import BooleanFilter, HoverTool, MultiChoice, Slider, TapTool, Toggle
from helpers import small_config, trained_like

import gohgraph as goh
from gohgraph.analysis.record import Recording, Recordings
from gohgraph.drawing.page import page_document
from gohgraph.drawing.page_data import as_bytes, self_loops, strongest_edges, token_weights
from gohgraph.drawing.tokens import AtToken

STRINGS = ["heads", " talk", " to", " <b>", "\n", "$$x$$", "listen"]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def recorded(graph="outputs", tokens=7, **options):
    model = trained_like(goh.LanguageModel(small_config(graph)))
    with torch.no_grad(), goh.record(model, **options) as heads:
        model(torch.randint(0, 13, (1, tokens)))
    return heads


def with_tokens(graph="outputs"):
    return recorded(graph, every_token=True, token_strings=STRINGS)


def data_of(document, name):
    return document.select_one({"name": name}).data


@pytest.mark.parametrize("graph", ["outputs", "rounds", "cross-layer", "scores-ring", "moh-outputs", "outputs-static"])
def test_the_page_holds_every_edge_and_head(graph):
    heads = with_tokens(graph)
    network = goh.head_graph_of(heads)
    document = page_document(heads, network)
    document.validate()
    edges, nodes = data_of(document, "edges"), data_of(document, "heads")
    senders, receivers = network.edge_index
    between = senders != receivers
    rows = zip(edges["sender"], edges["receiver"], edges["site"], edges["round"], edges["mean"].round(9), strict=True)
    expected = {
        (network.label[j], network.label[i], network.site[e], network.round[e].item(), round(network.mean[e].item(), 9))
        for e, (j, i) in enumerate(zip(senders.tolist(), receivers.tolist(), strict=True))
        if j != i
    }
    assert set(rows) == expected and len(edges["mean"]) == int(between.sum())
    assert nodes["label"] == network.label and nodes["kind"] == network.kind
    loops = self_loops(network)
    assert np.allclose(nodes["loop"], np.where(loops < 0, 0, network.mean.numpy()[loops]))
    strip = data_of(document, "tokens")
    assert strip["text"] == ["heads", "\u2423talk", "\u2423to", "\u2423<b>", "\u21b5", "$$x$$", "listen"]


def test_the_page_has_its_controls_and_tells_numbers():
    heads = with_tokens("moh-outputs")
    blocks = {name.rpartition(".")[0]: torch.rand(5) for name in heads}
    network = goh.head_graph_of(heads, importance=blocks, edge_importance={name: torch.rand(25) for name in heads})
    document = page_document(heads, network, threshold=0.25)
    kinds = (Slider, MultiChoice, Toggle, TapTool, BooleanFilter)
    assert all(len(list(document.select({"type": kind}))) == 1 for kind in kinds)
    edges = data_of(document, "edges")
    slider = document.select_one({"name": "threshold"})
    assert slider.value == pytest.approx(0.25 * abs(edges["mean"]).max(), abs=1e-4)
    assert document.select_one({"name": "layers"}).options == ["layer 0", "layer 1", "layer 2"]
    told = {row for hover in document.select({"type": HoverTool}) for row, _ in hover.tooltips}
    assert {"edge", "mean", "std", "share", "importance", "head", "load", "self-loop", "token"} <= told
    assert slider.js_property_callbacks and document.select_one({"name": "tokens"}).selected.js_property_callbacks


@pytest.mark.parametrize("graph", ["outputs", "rounds", "cross-layer", "moh-outputs", "outputs-static"])
def test_weights_of_tokens_are_those_of_the_tokens_view(graph):
    heads = with_tokens(graph)
    weights = token_weights(heads, 7)
    for token in (0, 6):
        expected = torch.cat([AtToken(recording, token).mean.flatten() for recording in heads.values()])
        assert np.allclose(weights[token], expected.numpy(), atol=1e-6)
    numbers, scale = as_bytes(weights)
    assert np.abs(numbers * scale - weights).max() <= scale / 2 + 1e-9


def test_only_the_strongest_edges_are_on_a_large_page():
    network = goh.head_graph_of(recorded())
    chosen = strongest_edges(network, 11)
    strength = network.mean.square() + network.std.square()
    between = network.edge_index[0] != network.edge_index[1]
    assert sorted(strength[chosen].tolist()) == sorted(strength[between].tolist())[-11:]
    document = page_document(recorded(), network, most_edges=11)
    assert len(data_of(document, "edges")["mean"]) == 11
    assert document.select_one({"name": "tokens"}) is None


def test_the_file_needs_no_network(tmp_path):
    path = tmp_path / "heads.html"
    goh.save_page(with_tokens(), path, title="heads & <script>")
    text = path.read_text()
    # Nothing is loaded from elsewhere: all scripts are in the file, and no style sheet or picture is linked.
    tags = re.sub(r"(<(script|style)[^>]*>).*?</\2>", r"\1", text, flags=re.DOTALL)
    assert tags.count("<script") >= 3 and not re.search(r"<(script|link|img|iframe)[^>]*\s(src|href)=", tags)
    assert "<title>heads &amp; &lt;script&gt;</title>" in text
    assert path.stat().st_size < 3_000_000


@pytest.mark.slow
def test_64_heads_by_32_layers_are_less_than_8_megabytes(tmp_path):
    heads = Recordings({}, [f" word{number}" for number in range(256)])
    for layer in range(32):
        conv = goh.HeadGraphConv(goh.head_graph(64), head_dim=2, context_dim=2)
        name = f"decoder.layers.{layer}.attention.object.output_graph"
        heads[name] = Recording(conv, every_token=True)
        heads[name].update((torch.randn(256, 1, 4096) * 0.4 + torch.randn(4096) * 0.4).tanh())
    began = time.process_time()
    goh.save_page(heads, tmp_path / "heads.html")
    assert (tmp_path / "heads.html").stat().st_size < 8_000_000
    assert time.process_time() - began < 20


def test_bokeh_is_asked_for_when_it_is_missing(tmp_path, monkeypatch):
    heads = recorded()
    monkeypatch.setitem(sys.modules, "bokeh", None)
    with pytest.raises(ImportError, match=r"Expected bokeh .*pip install 'gohgraph\[interactive\]'"):
        goh.save_page(heads, tmp_path / "heads.html")


def test_bad_pages(tmp_path):
    with pytest.raises(ValueError, match=r"Expected a file name that ends in \.html"):
        goh.save_page(recorded(), tmp_path / "heads.htm")
    with pytest.raises(ValueError, match="Expected a threshold from 0 to 1"):
        goh.save_page(recorded(), tmp_path / "heads.html", threshold=-1)
    heads = recorded(every_token=True, token_strings=STRINGS)
    heads.token_strings = heads.token_strings[:3]
    with pytest.raises(ValueError, match=r"Expected one pass over 3 tokens \(got \[\d+\]\)"):
        goh.save_page(heads, tmp_path / "heads.html")


# Where a point of a figure is on the screen.
POINT = """([figure, x, y]) => {
  const model = Bokeh.documents[0].get_model_by_name(figure)
  const view = Bokeh.index.find_one(model)
  const box = view.el.getBoundingClientRect(), frame = view.frame
  return [box.x + frame.x_scale.compute(x), box.y + frame.y_scale.compute(y)]
}"""
# Edges that the renderer of the curves draws.
DRAWN = "Bokeh.index.find_one(Bokeh.documents[0].get_model_by_name('curves')).all_indices.count"


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: install chromium, or put one on the PATH")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install playwright")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, tmp_path):
    torch.manual_seed(0)
    heads = with_tokens()
    goh.save_page(heads, tmp_path / "heads.html")
    context = browser.new_context(viewport={"width": 1250, "height": 1100}, color_scheme="light")
    page = context.new_page()
    page.faults, page.requests, page.heads = [], [], heads
    page.on("console", lambda message: page.faults.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("request", lambda request: page.requests.append(request.url))
    page.goto(f"file://{tmp_path}/heads.html")
    page.wait_for_function("window.Bokeh && Bokeh.documents.length && Bokeh.documents[0].is_idle")
    page.wait_for_function("Bokeh.documents[0].get_model_by_name('status').text != ''")
    yield page
    assert page.faults == []
    assert page.requests == [f"file://{tmp_path}/heads.html"]
    context.close()


def counted(page):
    """The edges the page says it draws, out of how many, and those that it does draw."""
    text = page.evaluate("Bokeh.documents[0].get_model_by_name('status').text")
    said, of, where = re.fullmatch(r"(\d+) of (\d+) edges, (.*)", text).groups()
    assert int(said) == page.evaluate(DRAWN)
    return int(said), int(of), where


def weights_shown(page):
    return np.array(page.evaluate("[...Bokeh.documents[0].get_model_by_name('edges').data.weight]"))


@pytest.mark.slow
def test_moving_the_slider_hides_edges(page):
    mean = np.array(page.evaluate("[...Bokeh.documents[0].get_model_by_name('edges').data.mean]"))
    before, of, where = counted(page)
    assert of == len(mean) == 60 and where == "mean over tokens"
    assert before == (abs(mean) >= page.evaluate("Bokeh.documents[0].get_model_by_name('threshold').value")).sum()
    handle = page.locator(".noUi-handle").first.bounding_box()
    track = page.locator(".noUi-base").first.bounding_box()
    page.mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2)
    page.mouse.down()
    page.mouse.move(track["x"] + 0.5 * track["width"], handle["y"] + handle["height"] / 2, steps=5)
    page.mouse.up()
    threshold = page.evaluate("Bokeh.documents[0].get_model_by_name('threshold').value")
    after, _, _ = counted(page)
    assert threshold > 0.3 and after == (abs(mean) >= threshold).sum() < before


@pytest.mark.slow
def test_clicking_a_token_shows_its_weights_and_beside_it_the_means(page):
    strip = {name: page.evaluate(f"[...Bokeh.documents[0].get_model_by_name('tokens').data.{name}]") for name in "xy"}
    means = weights_shown(page)
    page.mouse.click(*page.evaluate(POINT, ["strip", strip["x"][2], strip["y"][2]]))
    page.wait_for_function("Bokeh.documents[0].get_model_by_name('status').text.endsWith('at token 2')")
    shown = weights_shown(page)
    network = goh.head_graph_of(page.heads)
    expected = token_weights(page.heads, 7)[2][strongest_edges(network, 4000)]
    assert np.abs(shown - expected).max() < 0.005
    drawn, _, _ = counted(page)
    threshold = page.evaluate("Bokeh.documents[0].get_model_by_name('threshold').value")
    assert drawn == (abs(shown) >= threshold).sum()
    # Two clicks at once would be a double click.
    page.wait_for_timeout(700)
    page.mouse.click(*page.evaluate(POINT, ["strip", max(strip["x"]) + 7, strip["y"][0]]))
    page.wait_for_function("Bokeh.documents[0].get_model_by_name('status').text.endsWith('mean over tokens')")
    assert np.array_equal(weights_shown(page), means)


@pytest.mark.slow
def test_layers_are_chosen_and_the_theme_changes(page):
    page.evaluate("Bokeh.documents[0].get_model_by_name('threshold').value = 0")
    assert counted(page)[0] == 60
    page.evaluate("Bokeh.documents[0].get_model_by_name('layers').value = ['layer 1']")
    assert counted(page)[0] == 20
    paper = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(paper) == "rgb(255, 255, 255)"
    page.get_by_role("button", name="dark").click()
    page.wait_for_function(f"{paper} == 'rgb(27, 29, 33)'")
    assert page.evaluate("Bokeh.documents[0].get_model_by_name('network').background_fill_color") == "#1b1d21"


@pytest.mark.slow
def test_pointing_at_a_head_tells_its_numbers(page):
    heads = "Bokeh.documents[0].get_model_by_name('heads').data"
    x, y = page.evaluate(f"[{heads}.x[3], {heads}.y[3]]")
    page.mouse.move(*page.evaluate(POINT, ["network", x, y]))
    tooltip = page.locator(".bk-tooltip-row-value", has_text="0.3, head")
    tooltip.first.wait_for(timeout=5000)
    assert tooltip.first.is_visible()


@pytest.mark.slow
def test_a_dark_system_gets_a_dark_page(browser, tmp_path):
    goh.save_page(recorded(), tmp_path / "heads.html")
    context = browser.new_context(color_scheme="dark")
    page = context.new_page()
    page.goto(f"file://{tmp_path}/heads.html")
    page.wait_for_function("document.documentElement.dataset.theme == 'dark'")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(27, 29, 33)"
    context.close()
