"""Figures of what heads attend to: every weight in its place, thumbnails of all heads, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import language_model, translator

import gohgraph as goh
from gohgraph.drawing.attention_patterns import blocks_of

STRINGS = ["heads", " talk", " to", " <b>", "\n", "$$x$$", "listen"]


@torch.no_grad()
def recorded(model=None, inputs=None, **options):
    model = language_model("scores-ring") if model is None else model
    inputs = (torch.randint(0, 13, (1, 7)),) if inputs is None else inputs
    with goh.record(model, **{"attention": True, "token_strings": STRINGS, **options}) as heads:
        model(*inputs)
    return heads


def of(heads, title):
    return next(one for one in heads.attention.values() if one.title == title)


def test_a_pattern_has_every_weight_and_token(tmp_path):
    heads = recorded()
    figure = goh.draw_attention(heads, 1, 3, tmp_path / "head.png")
    axis = figure.axes[0]
    assert np.array_equal(axis.images[0].get_array(), of(heads, "layer 1").maps[3])
    shown = ["heads", "\u2423talk", "\u2423to", "\u2423<b>", "\u21b5", "$$x$$", "listen"]
    assert [label.get_text() for label in axis.get_yticklabels()] == shown
    assert [label.get_text() for label in axis.get_xticklabels()] == shown
    title = " ".join(figure._suptitle.get_text().split())
    assert title == "layer 1, head 3 over \u201cheads talk to <b> $$x$$listen\u201d"
    assert (tmp_path / "head.png").stat().st_size > 5000


def test_thumbnails_have_a_dot_for_every_head_layers_upwards(tmp_path):
    heads = recorded()
    figure = goh.draw_attention(heads, path=tmp_path / "all.svg")
    axis = figure.axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["layer 2", "layer 1", "layer 0"]
    assert len(axis.get_xticks()) == 5
    whole = axis.images[0].get_array()
    dots = (whole.shape[1] - 1) // 5 - 1
    last = whole[-1 - dots : -1, 1 : 1 + dots].filled(np.nan)
    small = torch.nn.functional.adaptive_max_pool2d(of(heads, "layer 0").maps, dots)[0].numpy()
    assert np.array_equal(last, small)
    assert len(goh.draw_attention(heads, 2).axes[0].get_yticks()) == 1


def test_cross_attention_has_tokens_of_its_own_and_examples_are_chosen():
    model = translator()
    source, target = torch.randint(3, 13, (2, 5)), torch.randint(3, 13, (2, 7))
    heads = recorded(model, (source, target), attention={"every_example": True}, token_strings=None)
    figure = goh.draw_attention(heads, "decoder layer 1 cross", 2, example=1, key_strings=list("abcde"))
    axis = figure.axes[0]
    assert np.array_equal(axis.images[0].get_array(), of(heads, "decoder layer 1 cross").maps[1, 2])
    assert [label.get_text() for label in axis.get_xticklabels()] == list("abcde")
    assert figure._suptitle.get_text() == "decoder layer 1 cross, head 2"
    mean = goh.draw_attention(heads, "encoder layer 0", 0).axes[0].images[0].get_array()
    assert np.allclose(mean, of(heads, "encoder layer 0").maps.mean(dim=0)[0])
    with pytest.raises(ValueError, match="Expected one layer of the head"):
        goh.draw_attention(heads, 1, 2)
    with pytest.raises(ValueError, match="Expected an example from 0 to 1"):
        goh.draw_attention(heads, "encoder layer 0", 2, example=2)
    with pytest.raises(ValueError, match="Expected a string for each of 5 keys"):
        goh.draw_attention(heads, "decoder layer 1 cross", 2, key_strings=["a"])


def test_what_was_not_recorded_is_refused():
    heads = recorded(attention={"layers": [0, 1], "heads": [2]})
    for arguments, error in (
        ((2, 2), r"Expected a layer of \['layer 0', 'layer 1'\]"),
        ((0, 1), r"Expected a head that was recorded, of \[2\] of layer 0"),
    ):
        with pytest.raises(ValueError, match=error):
            goh.draw_attention(heads, *arguments)
    with pytest.raises(ValueError, match="Expected maps of every example"):
        goh.draw_attention(heads, 0, 2, example=0)
    with pytest.raises(ValueError, match="Expected a recording of attention"):
        goh.draw_attention(recorded(attention=False), 0, 2)


def test_circles_of_a_recording_that_saw_nothing_are_refused():
    with pytest.warns(UserWarning, match="saw no token"), goh.record(language_model("outputs")) as heads:
        pass
    with pytest.raises(ValueError, match="Expected a recording of at least one token"):
        goh.draw(heads)


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_the_layers_of_encoder_decoders_have_their_numbers(name):
    """T5 numbers the parts of a block, too."""
    transformers_models = pytest.importorskip("transformers_models")
    model = transformers_models.build(name).eval()
    for wanted in (0, 1):
        with goh.record(model, attention={"layers": [wanted]}) as heads, torch.no_grad():
            model(**transformers_models.inputs_of(model))
        titles = [one.title for one in heads.attention.values()]
        number = {"t5": 3, "bart": 3 - wanted, "whisper": 3 - wanted}[name]
        assert len(titles) == number and all(f"layer {wanted}" in title for title in titles)
        assert [one.title for one in blocks_of(heads, wanted)] == titles
        assert [one.title for one in blocks_of(heads, f"decoder layer {wanted} cross")] == titles[-1:]


def test_the_graphs_of_a_converted_t5_have_the_titles_of_its_blocks():
    transformers_models = pytest.importorskip("transformers_models")
    model = transformers_models.build("t5").eval()
    goh.convert(model, goh.HeadGraphConfig())
    network = goh.head_graph_of(model)
    assert network.blocks == [
        *(f"encoder layer {n}" for n in range(2)),
        *(f"decoder layer {n}{cross}" for n in range(2) for cross in ("", " cross")),
    ]
    assert sorted(set(network.layer.tolist())) == [0, 1]
