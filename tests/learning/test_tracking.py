"""Trackers: every row of the log arrives, once."""

from __future__ import annotations

import builtins
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from gohgraph.learning.loop import TrainConfig, train
from gohgraph.learning.tracking import TensorBoard

CONFIG = TrainConfig(steps=12, log_every=2, eval_every=6, checkpoint_every=4, device="cpu")


def run(folder, tracker, stop_at: int | None = None, **more):
    torch.manual_seed(7)
    model = nn.Linear(3, 1)

    def batch(step):
        if step == stop_at:
            raise RuntimeError("power cut")
        return torch.randn(5, 3, generator=torch.Generator().manual_seed(step))

    def loss(model, x):
        return (model(x) - 1).square().mean()

    measured = {"validation_loss": 2.5}
    return train(model, batch, loss, CONFIG, folder, evaluate=lambda model: measured, tracker=tracker, **more)


def test_a_tracker_gets_every_row(tmp_path):
    calls = []
    rows = run(tmp_path / "run", lambda values, step: calls.append((values, step)))
    assert [step for _, step in calls] == [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]
    for (values, _), row in zip(calls, rows, strict=True):
        assert values == {name: value for name, value in row.items() if value is not None and name != "step"}
        assert ("validation_loss" in values) == (row["step"] % 6 == 0)


def test_tensorboard_holds_the_log_after_a_crash_and_resume(tmp_path):
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "run", TensorBoard(tmp_path / "board"), stop_at=7)
    # TensorBoard orders event files by the second they were begun in, and within a second by names such as 9 and 10.
    time.sleep(1.1)
    # The last checkpoint is of step 4: step 6 is logged again.
    rows = run(tmp_path / "run", TensorBoard(tmp_path / "board"), resume=True)
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == [row["step"] for row in rows]
    assert [event.value for event in losses] == pytest.approx([row["loss"] for row in rows])
    assert [event.step for event in events.Scalars("validation_loss")] == [6, 12]


def test_without_tensorboard_the_error_names_the_extra(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name == "torch.utils.tensorboard":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="gohgraph\\[tensorboard\\]"):
        TensorBoard(tmp_path)({"loss": 1.0}, 1)
