"""The interactive page: its model by Bokeh's own objects, and the page itself in a headless Chromium."""

from __future__ import annotations

import re
import shutil
import sys

import numpy as np
import pytest
import torch
from bokeh.models import (
    BooleanFilter,
    CheckboxButtonGroup,
    HoverTool,
    LinearColorMapper,
    MultiChoice,
    Slider,
    TapTool,
    Toggle,
)
from helpers import small_config, trained_like
from stock_models import stock

import gohgraph as goh
from gohgraph.analysis.faithfulness import Faithfulness
from gohgraph.analysis.recording import Recording, Recordings
from gohgraph.drawing import page_controls, page_patterns
from gohgraph.drawing.layered import self_loops
from gohgraph.drawing.page import page_document
from gohgraph.drawing.page_data import as_bytes, strongest_edges, token_weights
from gohgraph.drawing.page_patterns import pattern_columns
from gohgraph.drawing.tokens import AtToken

STRINGS = ["heads", " talk", " to", " <b>", "\n", "$$x$$", "listen"]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def recorded(graph="outputs", tokens=7, **options):
    model = trained_like(goh.LanguageModel(small_config(graph)))
    with torch.no_grad(), goh.record(model, **options) as heads:
        model(torch.randint(0, 13, (1, tokens)))
    return heads


def with_tokens(graph="outputs", **options):
    return recorded(graph, every_token=True, token_strings=STRINGS, **options)


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
    # A ring for the self-loops of every site and round.
    rings = self_loops(network)
    assert sum((loops >= 0).sum() for loops in rings.values()) == int((~between).sum())
    for number, loops in enumerate(rings.values()):
        assert np.allclose(nodes[f"mean_{number}"], np.where(loops < 0, 0, network.mean.numpy()[loops]))
    strip = data_of(document, "tokens")
    assert strip["text"] == ["heads", "\u2423talk", "\u2423to", "\u2423<b>", "\u21b5", "$$x$$", "listen"]


def test_the_page_has_its_controls_and_tells_numbers():
    heads = with_tokens("moh-outputs")
    blocks = {name.rpartition(".")[0]: torch.rand(5) for name in heads}
    network = goh.head_graph_of(heads, importance=blocks, edge_importance={name: torch.rand(25) for name in heads})
    document = page_document(heads, network, threshold=0.25)
    kinds = (Slider, MultiChoice, Toggle, CheckboxButtonGroup)
    assert all(len(list(document.select({"type": kind}))) == 1 for kind in kinds)
    assert {one.name for one in document.select({"type": BooleanFilter})} == {"shown", "tipped"}
    assert len(list(document.select({"type": TapTool}))) == 2
    edges = data_of(document, "edges")
    slider = document.select_one({"name": "threshold"})
    assert slider.value**2 == pytest.approx(0.25 * abs(edges["mean"]).max())
    assert document.select_one({"name": "layers"}).options == ["layer 0", "layer 1", "layer 2"]
    told = {row for hover in document.select({"type": HoverTool}) for row, _ in hover.tooltips}
    loops = {"self-loop, outputs", "self-loop, scores"}
    assert {"edge", "mean", "std", "share", "importance", "head", "load", "token"} | loops <= told
    assert document.select_one({"name": "sites"}).labels == ["outputs", "scores"]
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
    # And as many again that are the strongest at a token: of every token its first, then its second.
    weights = np.random.default_rng(0).normal(size=(3, network.num_edges))
    kept = strongest_edges(network, 11, weights)
    further = set(kept) - set(chosen)
    assert set(chosen) <= set(kept) and 0 < len(further) <= 11
    numbers = np.flatnonzero(between.numpy())
    firsts = [numbers[row[numbers].argsort()[::-1]] for row in np.abs(weights)]
    ranks = [min(list(order).index(edge) for order in firsts) for edge in further]
    left = [min(list(order).index(edge) for order in firsts) for edge in set(numbers) - set(kept)]
    assert max(ranks) <= min(left)
    document = page_document(recorded(), network, most_edges=11)
    assert len(data_of(document, "edges")["mean"]) == 11
    assert document.select_one({"name": "tokens"}) is None


def test_the_first_view_is_of_edges_that_can_be_read():
    heads = recorded()
    for few, share in ((7, 0.0), (300, page_controls.FAINT)):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(page_controls, "MANY", few)
            document = page_document(heads, goh.head_graph_of(heads))
        means = np.abs(data_of(document, "edges")["mean"])
        shown = (means >= document.select_one({"name": "threshold"}).value ** 2).sum()
        assert shown == min(few, (means >= share * means.max()).sum()) < len(means)


def test_a_limit_is_the_end_of_colours_and_hides_nothing():
    heads = recorded()
    network = goh.head_graph_of(heads)
    document = page_document(heads, network, limit=0.1)
    mappers = list(document.select({"type": LinearColorMapper}))
    assert [(mapper.low, mapper.high) for mapper in mappers] == [(-0.1, 0.1)]
    assert document.select_one({"name": "threshold"}).end ** 2 >= network.mean.abs().max()


def test_the_file_needs_no_network(tmp_path):
    path = tmp_path / "heads.html"
    goh.save_page(with_tokens(), path, title="heads & <script>")
    text = path.read_text()
    # Nothing is loaded from elsewhere: all scripts are in the file, and no style sheet or picture is linked.
    tags = re.sub(r"(<(script|style)[^>]*>).*?</\2>", r"\1", text, flags=re.DOTALL)
    assert tags.count("<script") >= 3 and not re.search(r"<(script|link|img|iframe)[^>]*\s(src|href)=", tags)
    assert "<title>heads &amp; &lt;script&gt;</title>" in text
    assert path.stat().st_size < 3_000_000


@pytest.mark.parametrize("graph", ["outputs", "moh-outputs"])
def test_the_page_keeps_the_patterns_of_heads(graph):
    heads = with_tokens(graph, attention=True)
    network = goh.head_graph_of(heads)
    columns = pattern_columns(heads, network)
    weights = columns["weight"].reshape(-1, columns["size"], columns["size"]) / 255.0
    for node, title in enumerate(network.block):
        (recording,) = [one for one in heads.attention.values() if one.title == title]
        found = weights[columns["pattern"][node]] ** 2
        assert np.abs(found - recording.maps[network.head[node]].numpy()).max() < 0.005
    document = page_document(heads, network)
    document.validate()
    assert pattern_columns(with_tokens(graph), network) is None
    assert document.select_one({"name": "sender pattern"}) is not None


def test_patterns_of_a_stock_model_stand_beside_its_network():
    model = stock("llama")
    ids = torch.randint(3, 97, (2, 7))
    network = goh.composition_graph(model)
    with torch.no_grad(), goh.record(model, attention=True) as heads:
        model(ids)
    columns = pattern_columns(heads, network)
    is_head = np.array([kind == "head" for kind in network.kind])
    assert (columns["pattern"][is_head] >= 0).all() and (columns["pattern"][~is_head] < 0).all()
    page_document(heads, network).validate()


def test_the_curve_of_a_circuit_stands_under_its_network():
    network = goh.composition_graph(stock("llama"))
    values = {"network": torch.tensor([[0.5, 0.6], [1.0, 1.0]]), "random": torch.tensor([[0.1, 0.0], [1.0, 1.0]])}
    whole, none = torch.ones(2).double(), torch.zeros(2).double()
    measured = Faithfulness((0.1, 1.0), {name: f.double() for name, f in values.items()}, whole, none)
    document = page_document(Recordings({}), network, measured=measured)
    document.validate()
    (curve,) = [root for root in document.roots if root.tags == ["under"]]
    assert [item.label.value for item in curve.legend[0].items] == ["this network", "random edges"]
    shown = [glyph.data_source.data["f"].tolist() for glyph in curve.renderers if "Line" in repr(glyph.glyph)]
    assert shown == [pytest.approx([0.55, 1.0]), pytest.approx([0.05, 1.0])]
    assert not [root for root in page_document(Recordings({}), network).roots if root.tags == ["under"]]


def test_long_patterns_are_cut_to_a_bounded_size(monkeypatch):
    monkeypatch.setattr(page_patterns, "MOST_BYTES", 15 * 25)
    heads = with_tokens(attention=True)
    columns = pattern_columns(heads, goh.head_graph_of(heads))
    assert columns["size"] == 5 and columns["tokens"] == 7 and columns["weight"].nbytes == 15 * 25


@pytest.mark.slow
def test_64_heads_by_32_layers_are_less_than_8_megabytes(tmp_path):
    heads = Recordings({}, [f" word{number}" for number in range(256)])
    for layer in range(32):
        conv = goh.HeadGraphConv(goh.head_graph(64), head_dim=2, context_dim=2)
        name = f"decoder.layers.{layer}.attention.object.output_graph"
        heads[name] = Recording(conv, every_token=True)
        heads[name].update((torch.randn(256, 1, 4096) * 0.4 + torch.randn(4096) * 0.4).tanh())
    goh.save_page(heads, tmp_path / "heads.html")
    assert (tmp_path / "heads.html").stat().st_size < 8_000_000


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
    with pytest.raises(ValueError, match="Expected limit to be"):
        goh.save_page(recorded(), tmp_path / "heads.html", limit=0)
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
    heads = with_tokens("moh-outputs", attention=True)
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


def model_of(name):
    return f"Bokeh.documents[0].get_model_by_name('{name}')"


# What a slider says is the square of where it stands.
LEAST = f"{model_of('threshold')}.value ** 2"
SETTLED = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))"


def changed(page, name, change):
    """Sets a property of a model, as its widget does, and waits until that is drawn."""
    page.evaluate(f"{model_of(name)}.{change}")
    page.evaluate(SETTLED)


def column(page, source, name):
    # Points of a curve are arrays of their own, which older browsers' drivers hand over as dictionaries.
    return page.evaluate(f"[...{model_of(source)}.data.{name}].map((one) => ArrayBuffer.isView(one) ? [...one] : one)")


def pointed_at(page, figure, x, y, click=False):
    """Moves the mouse to a point of a figure, or clicks it."""
    place = page.evaluate(POINT, [figure, float(x), float(y)])
    (page.mouse.click if click else page.mouse.move)(*place)


@pytest.mark.slow
def test_moving_the_slider_hides_edges(page):
    mean = np.array(column(page, "edges", "mean"))
    before, of, where = counted(page)
    assert of == len(mean) == 75 and where == "mean over tokens"
    assert before == (abs(mean) >= page.evaluate(LEAST)).sum()
    handle = page.locator(".noUi-handle").first.bounding_box()
    track = page.locator(".noUi-base").first.bounding_box()
    page.mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2)
    page.mouse.down()
    page.mouse.move(track["x"] + 0.5 * track["width"], handle["y"] + handle["height"] / 2, steps=5)
    page.mouse.up()
    page.evaluate(SETTLED)
    threshold = page.evaluate(LEAST)
    after, _, _ = counted(page)
    assert threshold > 0.1 and after == (abs(mean) >= threshold).sum() < before


COUNTING = """() => {
  window.painted = {}
  const counted = (owner, name) => {
    const own = owner[name].bind(owner)
    owner[name] = (...given) => { window.painted[name] = (window.painted[name] || 0) + 1; return own(...given) }
  }
  const view = Bokeh.index.find_one(Bokeh.documents[0].get_model_by_name("curves"))
  counted(view, "set_data")
  counted(view, "paint")
  counted(Bokeh.index.find_one(Bokeh.documents[0].get_model_by_name("network")), "after_layout")
  counted(Bokeh.documents[0].get_model_by_name("heads"), "setv")
}"""


@pytest.mark.slow
def test_what_is_changed_within_a_frame_is_drawn_once_and_nothing_else_with_it(page):
    page.evaluate(COUNTING)

    def painted(change):
        page.evaluate(f"window.painted = {{}}; {change}")
        page.wait_for_function(f"{model_of('edges')}._page.waits === false")
        page.evaluate(SETTLED)
        return page.evaluate("window.painted")

    # Twenty steps of a slider: the first is drawn at once, the last after it, none between, and no head anew.
    steps = painted(f"for (let n = 1; n <= 20; n++) {model_of('threshold')}.value = 0.02 * n")
    assert steps["set_data"] <= 4 and steps["paint"] <= 3 and "setv" not in steps
    assert page.evaluate(f"{model_of('threshold')}.value") == pytest.approx(0.4)
    assert counted(page)[0] == (abs(np.array(column(page, "edges", "mean"))) >= 0.16).sum()
    # A chosen head takes no edge away, and yet the others are painted faint.
    chosen = painted(f"{model_of('heads')}.selected.indices = [7]")
    assert 1 <= chosen["set_data"] <= 2 and chosen["paint"] <= 3 and "setv" not in chosen
    # Its pattern and what is told of it are laid out by themselves.
    assert page.evaluate(f"{model_of('sender pattern')}.visible") and "after_layout" not in chosen
    assert painted(f"{model_of('tokens')}.selected.indices = [2]")["setv"] == 1


@pytest.mark.slow
def test_tokens_are_chosen_by_clicks_and_arrow_keys(page):
    strip = {name: column(page, "tokens", name) for name in "xy"}
    means = weights_shown(page)
    pointed_at(page, "strip", strip["x"][2], strip["y"][2], click=True)
    page.wait_for_function(f"{model_of('status')}.text.includes('at token 2, ')")
    shown = weights_shown(page)
    network = goh.head_graph_of(page.heads)
    weights = token_weights(page.heads, 7)
    chosen = strongest_edges(network, 4000, weights)
    assert np.abs(shown - weights[2][chosen]).max() < 0.005
    drawn, _, where = counted(page)
    assert drawn == (abs(shown) >= page.evaluate(LEAST)).sum() and "\u2423to" in where
    page.keyboard.press("ArrowRight")
    page.wait_for_function(f"{model_of('status')}.text.includes('at token 3, ')")
    assert np.abs(weights_shown(page) - weights[3][chosen]).max() < 0.005
    page.keyboard.press("ArrowLeft")
    page.wait_for_function(f"{model_of('status')}.text.includes('at token 2, ')")
    # Two clicks at once would be a double click.
    page.wait_for_timeout(700)
    pointed_at(page, "strip", max(strip["x"]) + 7, strip["y"][0], click=True)
    page.wait_for_function(f"{model_of('status')}.text.endsWith('mean over tokens')")
    assert np.array_equal(weights_shown(page), means)


@pytest.mark.slow
def test_layers_and_sites_are_chosen_and_the_theme_changes(page):
    changed(page, "threshold", "value = 0")
    assert counted(page)[0] == 75
    rows = column(page, "rows", "y")
    changed(page, "layers", "value = ['layer 1', 'layer 2']")
    assert counted(page)[0] == 50
    # The row that is not chosen moves towards the others, and its heads shrink.
    moved = column(page, "rows", "y")
    assert moved[1] - moved[0] < 0.6 * (rows[1] - rows[0]) and moved[2] - moved[1] == pytest.approx(rows[2] - rows[1])
    radius = column(page, "heads", "side_0")
    assert radius[0] < 0.5 * radius[5]
    changed(page, "sites", "active = [1]")
    assert counted(page)[0] == 10
    changed(page, "layers", "value = []")
    assert counted(page)[0] == 15 and column(page, "rows", "y") == rows
    paper = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(paper) == "rgb(255, 255, 255)"
    page.get_by_role("button", name="dark").click()
    page.wait_for_function(f"{paper} == 'rgb(27, 29, 33)'")
    assert page.evaluate(f"{model_of('network')}.background_fill_color") == "#1b1d21"


@pytest.mark.slow
def test_pointing_tells_heads_and_the_edges_of_every_site_apart(page):
    pointed_at(page, "network", column(page, "heads", "x")[3], column(page, "heads", "y")[3])
    tooltip = page.locator(".bk-tooltip-row-value")
    tooltip.filter(has_text="0.3, ").first.wait_for(timeout=20000)
    changed(page, "threshold", "value = 0")
    changed(page, "layers", "value = ['layer 1']")
    columns = {name: column(page, "edges", name) for name in ("sender", "receiver", "site", "block", "xs", "ys")}
    edges = list(zip(*columns.values(), strict=True))
    pairs = {(j, i) for j, i, site, block, *_ in edges if site == "scores" and block == "layer 1"}
    assert len(pairs) == 5
    for sender, receiver, site, _, xs, ys in edges:
        if (sender, receiver) in pairs:
            middle = len(xs) // 2
            pointed_at(page, "network", xs[middle], ys[middle])
            own = f"{sender} \u2192 {receiver}, {site}"
            tooltip.filter(has_text=own).first.wait_for(timeout=20000)
            other = own.replace(site, "scores" if site == "outputs" else "outputs")
            assert tooltip.filter(has_text=other).count() == 0


@pytest.mark.slow
def test_a_click_shows_patterns_senders_and_receivers(page):
    assert "Click a head" in page.evaluate(f"{model_of('about')}.text")
    pointed_at(page, "network", column(page, "heads", "x")[7], column(page, "heads", "y")[7], click=True)
    page.wait_for_function(f"{model_of('about')}.text.includes('is heard by')")
    network = goh.head_graph_of(page.heads)
    (recording,) = [one for one in page.heads.attention.values() if one.title == "layer 1"]
    assert page.evaluate(f"{model_of('sender pattern')}.visible && !{model_of('receiver pattern')}.visible")
    found = np.zeros((7, 7))
    places = [np.array(column(page, "sender cells", name), dtype=int) for name in "yx"]
    found[tuple(places)] = column(page, "sender cells", "weight")
    assert np.abs(found - recording.maps[2].numpy()).max() < 0.006
    # What has nothing to do with the head is faint.
    edges = page.evaluate(f"{{const {{from, to, alpha}} = {model_of('edges')}.data; [[...from], [...to], [...alpha]]}}")
    assert all((7 in (j, i)) == (alpha == 1) for j, i, alpha in zip(*edges, strict=True))
    strongest = max(
        (e for e in range(network.num_edges) if network.edge_index[1, e] == 7 != network.edge_index[0, e]),
        key=lambda e: abs(network.mean[e]),
    )
    about = page.evaluate(f"{model_of('about')}.text")
    assert f"hears {network.label[network.edge_index[0, strongest]]} " in about
    page.wait_for_timeout(700)
    changed(page, "heads", "selected.indices = []")
    changed(page, "edges", "selected.indices = [3]")
    sites = column(page, "edges", "site")
    assert f"the {sites[3]}" in page.evaluate(f"{model_of('about')}.text")
    assert page.evaluate(f"{model_of('sender pattern')}.visible && {model_of('receiver pattern')}.visible")


@pytest.mark.slow
def test_a_narrow_window_fits_and_names_stay_on_zoom(page):
    page.set_viewport_size({"width": 420, "height": 900})
    page.wait_for_function(f"{model_of('network')}.inner_width < 420")
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 420
    boxes = [one.bounding_box() for one in page.locator(".bk-input-group, .bk-btn, canvas").all()]
    assert all(box["x"] + box["width"] <= 421 for box in boxes if box is not None)
    page.evaluate(f"{{const range = {model_of('network')}.x_range; range.start = 1; range.end = 3}}")
    page.wait_for_function(f"{model_of('numbers')}.visible && {model_of('numbers')}.glyph.text_font_size != '7px'")


@pytest.mark.slow
def test_a_dark_system_gets_a_dark_page(browser, tmp_path):
    goh.save_page(recorded(), tmp_path / "heads.html")
    context = browser.new_context(color_scheme="dark")
    page = context.new_page()
    page.goto(f"file://{tmp_path}/heads.html")
    page.wait_for_function("document.documentElement.dataset.theme == 'dark'")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(27, 29, 33)"
    context.close()
