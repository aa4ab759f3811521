"""The chart of head load, read back from the figure."""

from __future__ import annotations

import pytest
import torch
from matplotlib.colors import to_hex

from gohgraph import draw_load
from gohgraph.drawing.figures import WIDTH
from gohgraph.drawing.load_chart import ROUTED, SHARED


def some_load(layers: int, heads: int, num_shared: int) -> torch.Tensor:
    load = torch.rand(layers, heads)
    load[:, :num_shared] = 1
    return load


@pytest.mark.parametrize("layers, heads, num_shared", [(1, 1, 0), (1, 64, 16), (3, 7, 2), (9, 64, 8), (13, 5, 5)])
def test_every_layer_has_its_bars(tmp_path, layers, heads, num_shared):
    load = some_load(layers, heads, num_shared)
    figure = draw_load(load, tmp_path / "load.png", num_shared=num_shared, title="heads")
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")
    assert len(figure.axes) == layers and figure.get_suptitle() == "heads"
    for number, (own, axis) in enumerate(zip(load, figure.axes, strict=True)):
        assert [bar.get_height() for bar in axis.patches] == pytest.approx(own.tolist())
        colours = [to_hex(bar.get_facecolor()).upper() for bar in axis.patches]
        assert colours == [SHARED] * num_shared + [ROUTED] * (heads - num_shared)
        routed = own[num_shared:].double()
        if len(routed):
            assert axis.get_title() == f"layer {number}: CV {(routed.std(correction=0) / routed.mean()).item():.2f}"
            assert list(axis.lines[0].get_ydata()) == pytest.approx([routed.mean().item()] * 2)
        else:
            assert axis.get_title() == f"layer {number}" and not axis.lines
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == ["shared head"] * (num_shared > 0) + ["routed head", "balanced"] * (num_shared < heads)


def test_no_text_overlaps_another_and_pages_are_no_wider_than_others():
    figure = draw_load(some_load(6, 12, 3), num_shared=3, title="load of heads")
    figure.canvas.draw()
    assert figure.get_figwidth() <= WIDTH
    texts = [figure._suptitle, *figure.texts, *(axis.title for axis in figure.axes), *figure.legends[0].get_texts()]
    texts += [axis.xaxis.label for axis in figure.axes] + [t for axis in figure.axes for t in axis.get_xticklabels()]
    boxes = [text.get_window_extent() for text in dict.fromkeys(texts) if text.get_text() and text.get_visible()]
    assert len(boxes) > 30
    assert not [1 for i, box in enumerate(boxes) for other in boxes[:i] if box.overlaps(other)]


def test_the_same_load_gives_the_same_bytes(tmp_path):
    load = some_load(2, 7, 2)
    for name in ("a.svg", "b.svg"):
        draw_load(load, tmp_path / name, num_shared=2)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@pytest.mark.parametrize(
    "load, num_shared, message",
    [
        (torch.ones(5), 2, r"loads \[L, H\]"),
        (torch.ones(0, 5), 2, r"loads \[L, H\]"),
        (torch.full((2, 5), 1.5), 2, r"in \[0, 1\]"),
        (torch.full((2, 5), float("nan")), 2, r"in \[0, 1\]"),
        (torch.ones(2, 5), 6, r"num_shared to be an int in 0..5"),
        (torch.ones(2, 5), True, r"num_shared to be an int in 0..5"),
    ],
)
def test_wrong_loads_are_refused(tmp_path, load, num_shared, message):
    with pytest.raises(TypeError if num_shared is True else ValueError, match=f"^Expected.*{message}.*got.*Do "):
        draw_load(load, tmp_path / "load.png", num_shared=num_shared)
    assert not list(tmp_path.iterdir())


def test_a_place_that_is_not_there(tmp_path):
    with pytest.raises(OSError, match="Expected a folder for "):
        draw_load(some_load(1, 5, 2), tmp_path / "none" / "load.png", num_shared=2)
    with pytest.raises(ValueError, match="ends in .png"):
        draw_load(some_load(1, 5, 2), tmp_path / "load.gif", num_shared=2)
