from __future__ import annotations

import math

import pytest
import torch
from helpers import small_config, trained_like
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import gohgraph as goh


def logged(folder, *sources):
    with SummaryWriter(folder) as writer:
        for step, source in enumerate(sources):
            goh.log_head_graphs(writer, source, step * 100)
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def recorded(graph="outputs"):
    model = trained_like(goh.LanguageModel(small_config(graph)))
    with torch.no_grad(), goh.record(model) as heads:
        model(torch.randint(0, 13, (1, 7)))
    return model, heads


@pytest.mark.parametrize("graph", ["outputs", "scores-ring", "rounds", "moh-outputs"])
def test_a_recording_is_logged_with_its_measures(tmp_path, graph):
    model, heads = recorded(graph)
    events = logged(tmp_path, heads, heads)
    tags = events.Tags()
    assert tags["images"] == ["head_graphs"]
    assert [image.step for image in events.Images("head_graphs")] == [0, 100]
    titles = goh.drawing.graph_titles(list(heads))
    assert set(tags["histograms"]) == {f"{title}/{kind}" for title in titles for kind in ("mean", "strength")}
    found = goh.analysis.measures(heads)
    for title, name in zip(titles, heads, strict=True):
        assert events.Scalars(f"{title}/static share")[1].value == pytest.approx(found[name].static_share, rel=1e-6)
        histogram = events.Histograms(f"{title}/mean")[0].histogram_value
        assert histogram.num == heads[name].mean.numel()
        assert histogram.max == pytest.approx(heads[name].mean.max().item())


def test_a_model_is_logged_without_data(tmp_path):
    model, _ = recorded()
    events = logged(tmp_path, model)
    assert events.Tags()["scalars"] == [] and len(events.Tags()["histograms"]) == 6


def test_new_models_and_graphs_without_edges_are_logged(tmp_path):
    model = goh.LanguageModel(small_config("outputs"))
    events = logged(tmp_path, model, goh.prune(model, 0.4), goh.prune(model, 0.0))
    assert len(events.Images("head_graphs")) == 3
    assert not any(math.isnan(scalar) for scalar in events.Tags()["scalars"])


def test_a_model_without_graphs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Expected a model with head graphs"):
        logged(tmp_path, torch.nn.Linear(2, 2))
