"""The views of head graphs beside circles, read back from the figures."""

from __future__ import annotations

import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import small_config, trained_like
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.patches import Circle, Rectangle
from PIL import Image

import gohgraph as goh
from gohgraph.analysis.recording import Recording, Recordings
from gohgraph.drawing import draw, draw_difference, draw_matrices, draw_network, draw_pruning, draw_tokens, save_film
from gohgraph.drawing.difference import difference
from gohgraph.drawing.layered import head_sizes, layout_of
from gohgraph.drawing.page import page_document
from gohgraph.drawing.panels import of_one_layer
from gohgraph.drawing.tokens import AtToken, token_changes

NAME = "decoder.layers.{}.attention.object.output_graph"


def recorded(graph="outputs", seed=0, **options):
    torch.manual_seed(seed)
    model = trained_like(goh.LanguageModel(small_config(graph)))
    with torch.no_grad(), goh.record(model, **options) as heads:
        model(torch.randint(0, 13, (1, 7)))
    return heads


def synthetic(num_heads, num_layers, topology="complete"):
    """Recordings of graphs with weights of all sizes."""
    heads = {}
    for layer in range(num_layers):
        conv = goh.HeadGraphConv(goh.head_graph(num_heads, topology), head_dim=2, context_dim=2)
        heads[NAME.format(layer)] = Recording(conv)
        heads[NAME.format(layer)].update(torch.randn(1, 1, conv.edges.num_edges).pow(3).tanh())
    return heads


def network_of(heads, *arguments, **options):
    return draw_network(goh.head_graph_of(heads), *arguments, **options)


def images(figure):
    return [axis.images[0].get_array() for axis in figure.axes if axis.images]


@pytest.mark.parametrize("graph", ["outputs", "rounds", "cross-layer", "scores-ring"])
def test_matrices_are_the_adjacency(graph):
    heads = recorded(graph)
    shown = images(draw_matrices(heads))
    sites = {"output_graph": 0, "score_graph": 1}
    ordered = sorted(heads.items(), key=lambda item: sites[item[0].rpartition(".")[2]])
    panels = [(recording, weights) for _, recording in ordered for weights in recording.mean]
    assert len(shown) == len(panels)
    for image, (recording, weights) in zip(shown, panels, strict=True):
        senders, receivers = recording.edge_index
        assert image.shape[0] == 5 and image.count() == len(weights)
        assert np.allclose(image[receivers, senders].astype(float), weights.numpy(), atol=1e-6)


def test_rounds_stand_side_by_side():
    figure = draw_matrices(recorded("rounds"))
    titles = [axis.get_title() for axis in figure.axes if axis.images]
    tops = [round(axis.get_position().y1, 3) for axis in figure.axes if axis.images]
    assert titles[:2] == ["layer 0 outputs, round 1", "layer 0 outputs, round 2"] and tops[0] == tops[1]


def edges_drawn(axis):
    lines = [item for item in axis.collections if isinstance(item, LineCollection)]
    return sum(len(item.get_segments()) for item in lines)


@pytest.mark.parametrize("graph", ["outputs", "scores-ring", "cross-layer", "moh-outputs"])
def test_the_network_has_a_row_for_each_layer(graph):
    network = goh.head_graph_of(recorded(graph))
    figure = draw_network(network)
    axis = figure.axes[0]
    labels = {text.get_text(): text.get_position()[1] for text in axis.texts}
    assert labels["layer 0"] < labels["layer 1"] < labels["layer 2"]
    between = int((network.edge_index[0] != network.edge_index[1]).sum())
    assert edges_drawn(axis) == between
    layout = layout_of(network)
    assert layout.places.shape == (15, 2) and len(np.unique(layout.places, axis=0)) == 15
    # A ring for the self-loops of every site, the disc of the first on top.
    *rings, heads = [item for item in axis.collections if isinstance(item, PatchCollection)]
    assert len(rings) == len(set(network.site)) - 1
    assert len(heads.get_paths()) == 15


def test_arcs_lead_to_the_right_above_and_to_the_left_below():
    edges = torch.tensor([[0, 3], [3, 0]])
    one = SimpleNamespace(edge_index=edges, num_heads=4, tokens=7, mean=torch.tensor([[0.9, -0.5]]).double())
    one.std, one.share, one.load, one.num_shared = torch.zeros(1, 2), torch.ones(1, 2), torch.ones(4), None
    figure = draw_network(goh.head_graph_of({NAME.format(0): one}))
    (lines,) = [item for item in figure.axes[0].collections if isinstance(item, LineCollection)]
    weak, strong = lines.get_segments()
    assert strong[0, 0] < strong[-1, 0] and strong[12, 1] > 0.1
    assert weak[0, 0] > weak[-1, 0] and weak[12, 1] < -0.1
    colours = lines.get_colors()
    assert colours[1, 0] > colours[1, 2] and colours[0, 2] > colours[0, 0]


def test_the_network_shows_the_strongest_edges_above_the_threshold():
    network = goh.head_graph_of(synthetic(7, 3))
    assert edges_drawn(draw_network(network, most_edges=11).axes[0]) == 11
    between = network.edge_index[0] != network.edge_index[1]
    expected = int((network.mean[between].abs() >= 0.5 * network.mean.abs().max()).sum())
    assert edges_drawn(draw_network(network, threshold=0.5).axes[0]) == expected
    with pytest.raises(ValueError, match="Expected a threshold from 0 to 1"):
        draw_network(network, threshold=2)
    network.mean[3] = torch.nan
    with pytest.raises(ValueError, match="Expected finite edge weights"):
        draw_network(network)


def lopsided(sites, rows, pairs):
    """A network of four heads a row whose edges, of every site, are `pairs` of (row, head)."""
    from gohgraph.analysis.network import HeadNetwork

    ends = torch.tensor([[4 * row + head for row, head in side] for side in zip(*pairs, strict=True)])
    edges = ends.repeat(1, len(sites))
    return HeadNetwork(
        edge_index=edges, num_nodes=4 * rows, mean=torch.ones(edges.shape[1]), std=torch.zeros(edges.shape[1]),
        share=torch.ones(edges.shape[1]), round=torch.ones(edges.shape[1], dtype=torch.long),
        site=[site for site in sites for _ in pairs], block=[f"layer {n // 4}" for n in range(4 * rows)],
        blocks=[f"layer {n}" for n in range(rows)], head=torch.arange(4 * rows) % 4, kind=["head"] * 4 * rows,
        label=[f"{n // 4}.{n % 4}" for n in range(4 * rows)], load=torch.ones(4 * rows),
    )  # fmt: skip


@pytest.mark.parametrize(
    "sites, rows, pairs",
    [
        (("queries", "keys", "values", "mlp"), 8, [((0, 3), (7, 3))]),
        (("outputs",), 8, [((0, 3), (7, 3)), ((1, 3), (4, 3))]),
        (("outputs", "scores", "weights", "queries"), 2, [((1, 0), (1, 3))]),
        (("outputs", "scores", "weights", "queries"), 2, [((0, 3), (0, 0))]),
        (("outputs", "scores"), 1, []),
    ],
    ids=["past rows of several sites", "past rows", "above the last row", "below the first", "no edges"],
)
def test_no_curve_leaves_the_picture_or_the_page(sites, rows, pairs):
    network = lopsided(sites, rows, pairs) if pairs else goh.head_graph_of(synthetic(1, 1))
    axis = draw_network(network).axes[0]
    curves = np.concatenate([
        np.zeros((0, 2)), *(line for item in axis.collections if isinstance(item, LineCollection)
                            for line in item.get_segments())
    ])  # fmt: skip
    x, y = axis.get_xlim(), axis.get_ylim()
    assert len(curves) == 25 * len(pairs) * len(sites)
    assert (x[0] < curves[:, 0]).all() and (curves[:, 0] < x[1]).all()
    assert (y[0] < curves[:, 1]).all() and (curves[:, 1] < y[1]).all()
    width, height = axis.figure.get_size_inches()
    assert width == pytest.approx(x[1]) and height > y[1] - y[0]
    pytest.importorskip("bokeh")
    plot = page_document(Recordings({}), network).get_model_by_name("network")
    assert plot.x_range.end == pytest.approx(x[1], abs=0.02)
    assert (plot.y_range.start, plot.y_range.end) == pytest.approx(y, abs=0.02)


def rims_of(axis):
    """Whether the rims of heads are dashed, by the sign of their self-loops."""
    patches = [patch for patch in axis.patches if isinstance(patch, (Circle, Rectangle)) and patch.get_fill()]
    if patches:
        return [patch.get_linestyle() not in ("-", "solid") for patch in patches]
    *_, heads = [item for item in axis.collections if isinstance(item, PatchCollection)]
    return [dashes is not None for _, dashes in heads.get_linestyles()]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("view", [draw, network_of])
def test_a_negative_self_loop_has_a_dashed_rim(view, seed):
    """Its sign is seen without colours."""
    heads = of_one_layer(recorded("outputs", seed), 1)
    ((_, one),) = heads.items()
    senders, receivers = one.edge_index
    loops = one.mean[0][senders == receivers][receivers[senders == receivers].argsort()]
    figure = view(heads)
    assert rims_of(figure.axes[0]) == (loops < 0).tolist() and len(set(loops.sign().tolist())) == 2
    assert "dashed rim: negative" in figure.axes[-1].get_xlabel().replace("\n", " ")


def test_a_legend_is_no_wider_than_a_narrow_picture():
    wide = lopsided(("queries", "keys", "values", "mlp"), 3, [((0, 1), (2, 3))])
    narrow = goh.head_graph_of(synthetic(2, 1))
    narrow.site = ["outputs", "scores", "queries", "values"]
    for network in (wide, narrow):
        figure = draw_network(network)
        figure.canvas.draw()
        label = figure.axes[-1].xaxis.label.get_window_extent()
        assert label.width <= figure.bbox.width and label.y0 >= 0


def test_important_heads_are_larger():
    heads = recorded("outputs")
    importance = {name.rpartition(".")[0]: torch.arange(5.0) for name in heads}
    sizes = head_sizes(goh.head_graph_of(heads, importance=importance))
    assert (np.diff(sizes[:5]) > 0).all() and sizes.max() == 1
    loads = head_sizes(goh.head_graph_of(recorded("moh-outputs")))
    assert loads[0] == 1 and loads[2:5].min() < 1


def test_loads_and_kinds_are_seen_in_circles():
    heads = recorded("moh-outputs")
    axis = draw(of_one_layer(heads, 1)).axes[0]
    squares = [patch for patch in axis.patches if isinstance(patch, Rectangle)]
    circles = [patch for patch in axis.patches if isinstance(patch, Circle)]
    load = heads[NAME.format(1)].load
    assert len(squares) == 2 and len(circles) == 3
    radii = [circle.radius for circle in circles]
    assert np.allclose(np.array(radii) / radii[0], ((0.6 + 0.4 * load[2:]) / (0.6 + 0.4 * load[2])).numpy())
    with pytest.raises(ValueError, match=r"Expected a layer of \['layer 0', 'layer 1', 'layer 2'\] \(got 7\)"):
        of_one_layer(heads, 7)


def test_a_limit_fixes_the_scale_of_all_figures():
    heads = synthetic(5, 1)
    for view in (draw, draw_matrices, network_of):
        figure = view(heads, limit=2)
        assert figure.axes[-1].get_xlim() == (-2, 2)
    with pytest.raises(ValueError, match="Expected a limit above 0"):
        draw(heads, limit=0)


@pytest.mark.parametrize("graph", ["outputs", "rounds", "moh-outputs", "outputs-static"])
def test_the_strip_shows_the_text_and_the_graphs_those_of_the_token(graph, tmp_path):
    strings = ["a", " b", "\n", "$x$", "e", "f", "g"]
    heads = recorded(graph, every_token=True, token_strings=strings)
    figure = draw_tokens(heads, -2, tmp_path / "tokens.png")
    strip = figure.axes[0]
    assert [text.get_text() for text in strip.texts] == ["a", "\u2423b", "\u21b5", "$x$", "e", "f", "g"]
    outlined = [patch.get_linewidth() == 2 for patch in strip.patches]
    assert outlined == [False] * 5 + [True, False]
    for recording in heads.values():
        at = AtToken(recording, 5)
        weights = recording.every["weights"]
        expected = weights[5] if len(weights) > 1 else weights[0]
        if recording.num_shared is not None:
            active = recording.every["active"][5]
            senders, receivers = recording.edge_index
            expected = expected * (active[senders] & active[receivers])
            assert torch.equal(at.load, active.double())
        assert torch.equal(at.mean, expected.double())


def test_the_greys_are_distances_from_the_mean():
    heads = recorded("outputs", every_token=True, token_strings="abcdefg")
    weights = torch.cat([recording.every["weights"].flatten(1) for recording in heads.values()], dim=1)  # [N, edges]
    expected = (weights - weights.mean(0)).square().mean(1).sqrt()
    assert np.allclose(token_changes(heads), expected.numpy())


def test_a_long_text_is_cut_around_the_token():
    heads = recorded("outputs")
    name = next(iter(heads))
    conv = goh.HeadGraphConv(goh.head_graph(5), head_dim=2, context_dim=2)
    long = Recordings({name: Recording(conv, every_token=True)}, [str(n % 10) for n in range(2000)])
    long[name].update(torch.randn(2000, 1, 25))
    shown = draw_tokens(long, 1000).axes[0]
    assert 200 < len(shown.texts) < 400 and sum(patch.get_linewidth() == 2 for patch in shown.patches) == 1


BAD_TOKENS = {
    "no tokens": ({}, 0, "Expected a recording of every token"),
    "no strings": ({"every_token": True}, 0, "Expected token strings to show"),
    "out of range": ({"every_token": True, "token_strings": "abcdefg"}, 7, r"Expected a token from 0 to 6 \(got 7\)"),
}


@pytest.mark.parametrize("name", BAD_TOKENS)
def test_bad_tokens(name):
    options, token, sentence = BAD_TOKENS[name]
    with pytest.raises(ValueError, match=sentence):
        draw_tokens(recorded(**options), token)


def test_a_difference_is_second_minus_first():
    first, second = recorded(seed=0), recorded(seed=1)
    for name, change in difference(first, second).items():
        assert torch.equal(change.mean, second[name].mean - first[name].mean)
    matrix = images(draw_difference(first, second, view="matrix"))[0]
    assert matrix[2, 1] == pytest.approx((second[NAME.format(0)].mean - first[NAME.format(0)].mean)[0, 11].item(), 1e-5)
    assert draw_difference(first, second).axes[0].get_title() == "layer 0 outputs"
    assert not any(change.mean.any() for change in difference(first, first).values())


def test_a_pruned_model_differs_by_the_edges_it_lost():
    torch.manual_seed(0)
    model = trained_like(goh.LanguageModel(small_config("outputs")))
    pruned = goh.prune(model, 0.0)
    tokens = torch.randint(0, 13, (1, 7))
    with torch.no_grad(), goh.record(model) as whole, goh.record(pruned) as rest:
        model(tokens)
        pruned(tokens)
    name = NAME.format(0)
    change = difference(whole, rest)[name]
    matrix = torch.zeros(5, 5).double()
    matrix[change.edge_index[1], change.edge_index[0]] = change.mean[0]
    expected = torch.zeros(5, 5).double()
    expected[whole[name].edge_index[1], whole[name].edge_index[0]] = -whole[name].mean[0]
    assert torch.equal(matrix, expected)


def test_other_graphs_cannot_be_compared():
    with pytest.raises(ValueError, match="Expected two recordings of the same head graphs"):
        draw_difference(recorded("outputs"), recorded("scores-ring"))
    with pytest.raises(ValueError, match="Expected a view 'circle' or 'matrix'"):
        draw_difference(recorded(), recorded(), view="film")


def test_pruning_curves_have_means_and_bands(tmp_path):
    seeds = [[(1.0, 1.0), (0.5, 2.0), (0.0, 5.0)], [(1.0, 2.0), (0.5, 4.0), (0.0, 7.0)]]
    figure = draw_pruning({"by strength": seeds, "random": seeds[:1]}, tmp_path / "pruning.pdf", title="a title")
    strength, random = figure.axes[0].lines
    assert list(strength.get_xdata()) == [0, 50, 100] and list(strength.get_ydata()) == [6, 3, 1.5]
    assert random.get_linestyle() == "--" and len(figure.axes[0].collections) == 1
    for curves in ({}, {"strength": seeds, "random": []}, {"random": [[]]}):
        named = r"\['random'\]" if curves else "an empty mapping"
        with pytest.raises(ValueError, match=rf"Expected curves to draw \(got none in {named}\)"):
            draw_pruning(curves)
    for other in ([(1.0, 1.0), (0.4, 2.0), (0.0, 5.0)], [(1.0, 1.0), (0.0, 5.0)]):
        with pytest.raises(ValueError, match=r"Expected curves over the same shares \(got .*0\.5, 1\.0.* in 'random'"):
            draw_pruning({"random": [seeds[0], other]})


def test_a_film_has_a_frame_for_each_checkpoint_on_one_scale(tmp_path):
    frames = [(f"step {seed}", recorded(seed=seed)) for seed in range(3)]
    save_film(frames, tmp_path / "film.gif", fps=10)
    film = Image.open(tmp_path / "film.gif")
    assert film.n_frames == 3 and os.listdir(tmp_path) == ["film.gif"]
    durations = []
    for frame in range(3):
        film.seek(frame)
        durations.append(film.info["duration"])
    assert durations == [100, 100, 2000]
    with pytest.raises(ValueError, match="Expected frames for the film"):
        save_film([], tmp_path / "film.gif")
    with pytest.raises(ValueError, match=r"Expected a file name that ends in \.gif or \.mp4"):
        save_film(frames, tmp_path / "film.avi")


def test_films_need_ffmpeg_for_mp4(tmp_path, monkeypatch):
    frames = [(f"step {seed}", recorded(seed=seed)) for seed in range(2)]
    if shutil.which("ffmpeg") is not None:
        save_film(frames, tmp_path / "film.mp4")
        assert (tmp_path / "film.mp4").stat().st_size > 1000
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="Expected the program ffmpeg"):
        save_film(frames, tmp_path / "none.mp4")
    assert "none.mp4" not in os.listdir(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("view", [draw, draw_matrices, network_of])
def test_64_heads_by_32_layers_fit_on_a_page(view, tmp_path):
    view(synthetic(64, 32, "ring"), tmp_path / "heads.png")
    width, height = Image.open(tmp_path / "heads.png").size
    assert width == pytest.approx(1820, abs=60) and height < 4500


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_single_head_is_drawn(suffix, tmp_path):
    heads = synthetic(1, 1)
    draw(heads, tmp_path / f"circle.{suffix}")
    draw_matrices(heads, tmp_path / f"matrix.{suffix}")
    draw_network(goh.head_graph_of(heads), tmp_path / f"network.{suffix}")
    assert all((tmp_path / name).stat().st_size > 1000 for name in os.listdir(tmp_path))
