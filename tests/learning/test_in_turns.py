"""A contest in turns: whole trainings in their run folders, resumed, and chosen by any column of their logs."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from gohgraph.learning.contests.contest import Contest
from gohgraph.learning.contests.grid import Grid
from gohgraph.learning.loop import TrainConfig, Training

# A model's loss, by its offset and the rate, at the end of a training that changes nothing.
LOSSES = {("goh", 0.1): 3.0, ("goh", 0.2): 2.0, ("plain", 0.1): 2.5, ("plain", 0.2): 4.0}


class Still(nn.Module):
    """A model whose loss does not depend on its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


def _start(started: list, name: str, seed: int, rate: float, leaf: Path, resume: bool = False) -> Training:
    started.append((name, seed, rate))
    loss = LOSSES[name, rate] + seed
    return Training(
        Still(),
        lambda step: (torch.zeros(2),),
        lambda model, batch: model.weight.sum() * 0 + loss,
        TrainConfig(steps=2, learning_rate=rate, warmup=0, seed=seed, eval_every=2, device="cpu"),
        leaf,
        evaluate=lambda model: {"validation_loss": loss},
        settings={"model": name},
        resume=resume,
    )


def _finish(training: Training, leaf: Path) -> dict[str, object]:
    loss = training.folder.rows[-1]["validation_loss"]
    return {"parameters": 1, "validation_loss": loss, "losses": torch.tensor([loss, loss + 1]), "at": str(leaf)}


def test_each_model_takes_the_best_rate_of_the_first_seed(tmp_path, capsys):
    started: list = []
    contest = Contest({"goh": "goh", "plain": "plain"}, [3, 5, 7], Grid.of_rates([0.1, 0.2]), tmp_path)
    trained = contest.run(lambda *run: _start(started, *run), _finish)
    tried = [("goh", 3, 0.1), ("goh", 3, 0.2), ("plain", 3, 0.1), ("plain", 3, 0.2)]
    assert started == tried + [(name, seed, rate) for seed in (5, 7) for name, rate in (("goh", 0.2), ("plain", 0.1))]
    assert list(trained) == [(seed, name) for seed in (3, 5, 7) for name in ("goh", "plain")]
    assert all(one["learning_rate"] == {"goh": 0.2, "plain": 0.1}[name] for (_, name), one in trained.items())
    assert trained[5, "goh"]["leaf"] == "seed-5/rate-0.2/goh"
    assert trained[5, "goh"]["at"] == str(tmp_path / "seed-5" / "rate-0.2" / "goh")
    written = (tmp_path / "rates.md").read_text()
    assert all(f"{loss + 3:.4f}" in written for loss in LOSSES.values())
    assert written in capsys.readouterr().out


def test_a_rate_at_which_the_loss_runs_away_is_the_worst(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(LOSSES, ("goh", 0.2), float("nan"))
    models = {"goh": "goh", "plain": "plain"}
    trained = Contest(models, [0, 1], Grid.of_rates([0.2, 0.1]), tmp_path).run(lambda *run: _start([], *run), _finish)
    assert [trained[seed, name]["learning_rate"] for seed, name in trained] == [0.1] * 4
    row = next(line for line in (tmp_path / "rates.md").read_text().splitlines() if "goh" in line)
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["goh", "diverged", "3.0000"]
    started: list = []
    resumed = Contest(models, [0, 1], Grid.of_rates([0.2, 0.1]), tmp_path).run(
        lambda *run: _start(started, *run, resume=True), _finish, resume=True
    )
    assert {run: one["validation_loss"] for run, one in resumed.items()} == {
        run: one["validation_loss"] for run, one in trained.items()
    }


@pytest.mark.parametrize("lost", [[("goh", 0.1), ("goh", 0.2)], [("goh", 0.1)]])
def test_a_model_that_no_rate_trains_is_an_error(tmp_path, monkeypatch, lost):
    for run in lost:
        monkeypatch.setitem(LOSSES, run, float("inf"))
    rates = [rate for _, rate in lost]
    with pytest.raises((ValueError, FloatingPointError), match="finite loss"):
        contest = Contest({"goh": "goh", "plain": "plain"}, [0], Grid.of_rates(rates), tmp_path)
        contest.run(lambda *run: _start([], *run), _finish)


def test_one_rate_one_seed_and_one_model_lie_in_the_folder_itself(tmp_path):
    trained = Contest({"goh": "goh"}, [0], Grid.of_rates([0.1]), tmp_path).run(lambda *run: _start([], *run), _finish)
    assert trained[0, "goh"]["leaf"] == "." and (tmp_path / "log.csv").exists()
    assert not (tmp_path / "rates.md").exists()


def test_runs_of_another_contest_are_not_resumed(tmp_path):
    Contest({"goh": "goh"}, [0], Grid.of_rates([0.1, 0.2]), tmp_path).run(lambda *run: _start([], *run), _finish)
    with pytest.raises(ValueError, match="--learning-rates of the run"):
        other = Contest({"goh": "goh"}, [0], Grid.of_rates([0.1]), tmp_path)
        other.run(lambda *run: _start([], *run), _finish, resume=True)


def test_rates_may_be_chosen_by_another_column_than_what_is_reported(tmp_path):
    """The rate that is best on one part of the data is taken, though it is the worse one on the other."""

    def start(name, seed, rate, leaf):
        training = _start([], name, seed, rate, leaf)
        training.evaluate = lambda model: {"validation_loss": LOSSES[name, rate], "choosing_loss": -LOSSES[name, rate]}
        return training

    models = {"goh": "goh", "plain": "plain"}
    trained = Contest(models, [0], Grid.of_rates([0.1, 0.2]), tmp_path).run(start, _finish, chosen_by="choosing_loss")
    assert {name: one["learning_rate"] for (_, name), one in trained.items()} == {"goh": 0.1, "plain": 0.2}
    assert {name: one["validation_loss"] for (_, name), one in trained.items()} == {"goh": 3.0, "plain": 4.0}
    with pytest.raises(ValueError, match="Expected other_loss in the log"):
        Contest(models, [0], Grid.of_rates([0.1, 0.2]), tmp_path / "other").run(
            lambda *run: _start([], *run), _finish, chosen_by="other_loss"
        )


def test_what_was_not_chosen_is_let_go_before_the_next_seed(tmp_path):
    alive = weakref.WeakValueDictionary()

    def start(name, seed, rate, leaf):
        gc.collect()
        before.append({run for run in alive if run[1] == 0})
        alive[name, seed, rate] = training = _start([], name, seed, rate, leaf)
        return training

    before: list = []
    Contest({"goh": "goh"}, [0, 1], Grid.of_rates([0.1, 0.2]), tmp_path).run(start, _finish)
    assert before[-1] <= {("goh", 0, 0.2)}
