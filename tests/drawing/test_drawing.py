from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.image import imread
from matplotlib.patches import Circle

import gohgraph as goh
from gohgraph.drawing import draw, draw_curves, graph_titles

NAME = "decoder.layers.{}.attention.object.{}_graph"


def recording(num_heads, edges, *rounds):
    edge_index = torch.tensor(edges, dtype=torch.long).reshape(-1, 2).t()
    return SimpleNamespace(edge_index=edge_index, num_heads=num_heads, mean=torch.tensor(rounds).double())


def complete(num_heads, num_senders=None, seed=0):
    edges = [(j, i) for i in range(num_heads) for j in range(num_senders or num_heads)]
    weights = torch.randn(1, len(edges), generator=torch.Generator().manual_seed(seed)).tanh()
    return recording(num_heads, edges, *weights.tolist())


def parts(axis):
    """The curves, the arrow tips and the head circles of a panel; the dotted rings are left out."""
    (lines,) = [item for item in axis.collections if isinstance(item, LineCollection)]
    (tips,) = [item for item in axis.collections if isinstance(item, PolyCollection)]
    circles = [patch for patch in axis.patches if isinstance(patch, Circle) and patch.get_facecolor()[3] > 0]
    return lines, tips, circles


def test_the_sign_is_seen_without_colours():
    edges = [(0, 1), (1, 2), (2, 0)]
    figure = draw({"layer": recording(3, edges, [0.5, -0.5, 0.1])})
    _, tips, _ = parts(figure.axes[0])
    # Weakest first; the negative tip alone is white inside.
    assert [fill[:3].tolist() == [1, 1, 1] for fill in tips.get_facecolors()].count(True) == 1
    assert sorted(tips.get_linewidths()) == [0, 0, 0.7]
    figure = goh.draw_matrices({"layer": recording(3, edges, [0.5, -0.5, 0.1])})
    (minuses,) = [item for item in figure.axes[0].collections if isinstance(item, LineCollection)]
    assert [line[0][1] for line in minuses.get_segments()] == [2]


def texts(axis):
    return [text.get_text() for text in axis.texts]


def test_a_real_model_from_recording_to_file(tmp_path):
    torch.manual_seed(0)
    sites = goh.HeadGraphConfig(outputs=goh.SiteConfig(), scores=goh.SiteConfig.ring(2))
    config = goh.TransformerConfig(256, d_model=20, num_heads=5, num_layers=3, d_ff=7, head_graph=sites)
    model = goh.LanguageModel(config)
    with goh.record(model) as heads:
        model(torch.randint(256, (2, 11)))
    figure = draw(heads, tmp_path / "heads.png", title="a title")
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == [f"layer {layer} {site}" for site in ("outputs", "scores") for layer in range(3)]
    assert imread(tmp_path / "heads.png").shape[1] == pytest.approx(1800, abs=30)
    assert os.listdir(tmp_path) == ["heads.png"]


def test_every_site_has_rows_of_its_own():
    sites = {"outputs": (goh.BaselineConfig("norm"), goh.SiteConfig()), "scores": goh.SiteConfig.ring(2)}
    sites |= {site: goh.SiteConfig.ring(3) for site in ("queries", "keys", "values", "weights")}
    config = goh.TransformerConfig(
        256, d_model=20, num_heads=5, num_layers=2, d_ff=7, positions="none", head_graph=goh.HeadGraphConfig(**sites)
    )
    with goh.record(model := goh.LanguageModel(config)) as heads:
        model(torch.randint(256, (2, 11)))
    titles = [axis.get_title() for axis in draw(heads).axes if axis.get_title()]
    order = ("outputs", "scores", "weights", "queries", "keys", "values")
    assert titles == [f"layer {layer} {site}" for site in order for layer in range(2)]


def test_arrows_run_from_sender_to_receiver():
    figure = draw({"layers.0.output_graph": recording(4, [(1, 3)], [0.5])})
    lines, tips, circles = parts(figure.axes[0])
    # Clockwise from the top: head 1 on the right, head 3 on the left.
    assert np.allclose([circle.center for circle in circles], [(0, 1), (1, 0), (0, -1), (-1, 0)], atol=1e-12)
    (curve,) = lines.get_segments()
    assert np.linalg.norm(curve[0] - (1, 0)) == pytest.approx(circles[1].radius)
    assert np.linalg.norm(curve[-1] - (-1, 0)) > circles[3].radius
    tip = tips.get_paths()[0].vertices[0]
    assert np.linalg.norm(tip - (-1, 0)) == pytest.approx(1.06 * circles[3].radius)


def test_both_directions_of_a_pair_are_apart():
    lines, _, _ = parts(draw({"g": recording(3, [(0, 1), (1, 0)], [0.5, 0.4])}).axes[0])
    first, second = (curve[12] for curve in lines.get_segments())
    assert np.linalg.norm(first - second) > 0.1


def test_negative_edges_are_as_visible_as_positive_ones():
    axis = draw({"g": recording(5, [(0, 1), (2, 3), (3, 4), (1, 2)], [-0.8, 0.8, 0.1, 0.0])}).axes[0]
    lines, _, _ = parts(axis)
    colours, widths = lines.get_colors(), lines.get_linewidths()
    # Drawn weakest first: 0.0, 0.1, then the two strong ones in either order.
    assert widths[2] == widths[3] == max(widths) and widths[0] < widths[1] < widths[2]
    luminance = colours[:, :3] @ (0.2126, 0.7152, 0.0722)
    assert abs(luminance[2] - luminance[3]) < 0.1 and max(luminance[2:]) < 0.4
    red_over_blue = (colours[:, 0] - colours[:, 2])[2:]
    assert sorted(np.sign(red_over_blue)) == [-1, 1]
    assert np.allclose(colours[0], to_rgba("#d4d4d4"))


def test_the_colour_range_is_symmetric_and_shared():
    heads = {
        NAME.format(0, "output"): recording(3, [(0, 1)], [0.7]),
        NAME.format(1, "output"): recording(3, [(0, 1)], [0.1]),
    }
    figure = draw(heads)
    strong, weak = (parts(axis)[0].get_linewidths()[0] for axis in figure.axes[:2])
    assert strong > 2 * weak
    assert np.allclose(figure.axes[-1].get_xticks(), [-0.8, -0.4, 0.0, 0.4, 0.8])


def test_a_self_loop_fills_its_head():
    lines, _, circles = parts(draw({"g": recording(3, [(0, 0), (1, 1), (0, 1)], [0.9, -0.9, 0.2])}).axes[0])
    orange, blue, none = (circle.get_facecolor() for circle in circles)
    assert orange[0] > orange[2] and blue[2] > blue[0] and none == (1, 1, 1, 1)
    assert len(lines.get_segments()) == 1


def test_threshold_makes_weak_edges_hairlines():
    heads = {"g": recording(3, [(0, 1), (1, 2)], [1.0, 0.3])}
    for threshold, hairlines in ((0.2, 0), (0.5, 1)):
        lines, _, _ = parts(draw(heads, threshold=threshold).axes[0])
        assert sum(np.allclose(colour, to_rgba("#d4d4d4")) for colour in lines.get_colors()) == hairlines


@pytest.mark.parametrize("num_heads", [1, 2, 3, 7, 16, 31, 64])
def test_every_head_is_numbered_and_no_heads_touch(num_heads, tmp_path):
    figure = draw({"layers.0.output_graph": complete(num_heads)}, tmp_path / "heads.png")
    lines, _, circles = parts(figure.axes[0])
    assert texts(figure.axes[0]) == [str(head) for head in range(num_heads)]
    most = 400 if num_heads < 32 else 160
    assert len(circles) == num_heads and len(lines.get_segments()) == min(most, num_heads * (num_heads - 1))
    assert num_heads == 1 or np.linalg.norm(np.subtract(circles[0].center, circles[1].center)) > 2 * circles[0].radius
    assert all(np.isfinite(curve).all() for curve in lines.get_segments())


def test_senders_of_earlier_layers_stand_on_outer_rings():
    figure = draw({"layers.2.output_graph": complete(5, 15)})
    _, _, circles = parts(figure.axes[0])
    radii = np.linalg.norm([circle.center for circle in circles], axis=1)
    assert np.allclose(radii, np.repeat([1.0, 1.46, 1.92], 5))
    assert texts(figure.axes[0]) == [*"012340123401234", "\u22121", "\u22122"]
    assert max(radii) < figure.axes[0].get_xlim()[1]


def test_rounds_have_panels_of_their_own():
    figure = draw({NAME.format(0, "output"): recording(3, [(0, 1)], [0.1], [0.2])})
    assert [axis.get_title() for axis in figure.axes[:2]] == ["layer 0 outputs, round 1", "layer 0 outputs, round 2"]


def test_a_new_model_and_a_graph_without_edges():
    draw({"g": recording(3, [(0, 1), (1, 1)], [0.0, 0.0])})
    figure = draw({"g": recording(3, [], [])})
    assert texts(figure.axes[0]) == ["0", "1", "2"]


def test_titles_tell_graphs_apart():
    names = [f"{stack}.layers.{n}.attention.object.output_graph" for stack in ("encoder", "decoder") for n in (0, 1)]
    names.append("decoder.layers.1.cross_attention.object.output_graph")
    assert graph_titles(names) == [
        "encoder layer 0 outputs",
        "encoder layer 1 outputs",
        "decoder layer 0 outputs",
        "decoder layer 1 outputs",
        "decoder layer 1 cross outputs",
    ]
    assert graph_titles(["graph"]) == ["graph"]
    assert graph_titles(["a.0.b", "a.0.c"]) == ["a.0.b", "a.0.c"]


@pytest.mark.parametrize(
    "suffix, start", [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF"), (".PNG", b"\x89PNG")]
)
def test_the_suffix_chooses_the_format_and_files_are_reproducible(tmp_path, suffix, start):
    for name in ("a", "b"):
        draw({"g": complete(5)}, tmp_path / f"{name}{suffix}")
    first, second = (tmp_path / f"{name}{suffix}" for name in ("a", "b"))
    assert first.read_bytes().startswith(start)
    assert first.read_bytes() == second.read_bytes()


LOG = [{"step": step, "loss": 5 / step} for step in range(1, 200)]


@pytest.mark.parametrize(
    "make", [lambda path: draw({"g": complete(3)}, path), lambda path: draw_curves({"run": LOG}, path)]
)
def test_bad_paths(tmp_path, make):
    with pytest.raises(ValueError, match=r"Expected a file name that ends in .*got .*heads\.gif"):
        make(tmp_path / "heads.gif")
    with pytest.raises(ValueError, match="Expected a file name"):
        make(tmp_path / "heads")
    with pytest.raises(FileNotFoundError, match=r"Expected a folder for heads\.png \(got .*missing, which"):
        make(tmp_path / "missing" / "heads.png")
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(OSError, match=r"Expected a place where taken\.png can be written \(got .*: Is a directory\)"):
        make(tmp_path / "taken.png")
    assert os.listdir(tmp_path) == ["taken.png"]


def test_a_failed_save_keeps_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "heads.svg"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(OSError, match="Permission denied"):
        draw({"g": complete(3)}, path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["heads.svg"]


def test_bad_recordings():
    with pytest.raises(ValueError, match="Expected a recording with at least one head graph"):
        draw({})
    with pytest.raises(ValueError, match="Expected finite edge weights .* in layers.0"):
        draw({"layers.0": recording(3, [(0, 1)], [float("nan")])})
    with pytest.raises(ValueError, match=r"Expected a threshold from 0 to 1 \(got 1\.5\)"):
        draw({"g": complete(3)}, threshold=1.5)


def test_curves_show_training_and_validation():
    log = [{"step": s, "loss": 5 / s, **({"validation_loss": 6 / s} if s % 20 == 0 else {})} for s in range(1, 201)]
    figure = draw_curves({"goh": log, "plain": log}, title="a title")
    left, right = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["goh", "plain"]
    assert sorted(text.get_text() for text in right.texts) == ["goh", "plain"]
    lengths = [len(line.get_xdata()) for line in left.lines]
    assert lengths == [200, 200, 10] * 2
    assert [list(line.get_xdata()) for line in right.lines] == [[100, 120, 140, 160, 180, 200]] * 2
    assert left.lines[0].get_color() == left.lines[2].get_color() != left.lines[3].get_color()


def test_many_runs_have_styles_and_places_of_their_own(tmp_path):
    logs = {f"client {n}": [{"step": s, "loss": 2.0 + 0.001 * n} for s in range(1, 4)] for n in range(25)}
    figure = draw_curves(logs, tmp_path / "curves.png")
    axis, legend = figure.axes[0], figure.legends[0]
    styles = {(line.get_color(), str(line._unscaled_dash_pattern), line.get_marker()) for line in legend.get_lines()}
    assert len(styles) == 25 and legend.get_texts()[24].get_text() == "25  client 24"
    heights = sorted(text.xyann[1] for text in axis.texts)
    assert len(heights) == 25 and min(b - a for a, b in zip(heights, heights[1:], strict=False)) > 0.039
    assert all(tick == int(tick) for tick in axis.get_xticks())


def test_edges_of_many_heads_are_drawn_by_rank():
    graph = goh.head_graph(40)
    weights = torch.linspace(0.4, 0.5, graph.num_edges)[torch.randperm(graph.num_edges)].unsqueeze(0)
    heads = {"layers.0.output_graph": SimpleNamespace(edge_index=graph.edge_index, num_heads=40, mean=weights)}
    figure = draw(heads, most_edges=50)
    lines, _, _ = parts(figure.axes[0])
    widths, opacity = lines.get_linewidths(), lines.get_colors()[:, 3]
    assert len(widths) == 50 and widths[-1] > 4 * widths[0] and opacity[-1] == 1 and opacity[0] < 0.3
    assert "rank" in figure.axes[-1].get_xlabel()


def test_curves_of_training_only_and_of_validation_only(tmp_path):
    figure = draw_curves({"a": LOG, "b": [{"step": 5, "validation_loss": 2.0}]}, tmp_path / "curves.png")
    assert len(figure.axes) == 1 and (tmp_path / "curves.png").is_file()


def test_smoothing_keeps_constants_and_ends():
    log = [{"step": step, "loss": 3.0 + (-1) ** step} for step in range(1000)]
    noisy, smooth = draw_curves({"a": log}).axes[0].lines[:2]
    assert np.ptp(noisy.get_ydata()) == 2
    assert np.abs(smooth.get_ydata()[50:] - 3).max() < 0.15


def test_runs_without_losses_are_refused():
    with pytest.raises(ValueError, match=r"Expected losses in every run \(got none in \['b'\]\)"):
        draw_curves({"a": LOG, "b": [{"step": 1}]})
    with pytest.raises(ValueError, match="Expected losses in every run"):
        draw_curves({})
