"""Continual learning: what keeps a model from forgetting, and the measures of it."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from example_runs import check_resumed, refused
from helpers import load_script

from gohgraph import HeadGraphConfig, LanguageModel, TransformerConfig
from gohgraph.learning.data.corpus import Corpus, evaluation_batches, sample_batch
from gohgraph.learning.loop import TrainConfig
from gohgraph.learning.recipes import RECIPES
from gohgraph.learning.regimes.adapters import TaskAdapters
from gohgraph.learning.regimes.continual import (
    ElasticWeights,
    Learner,
    PerTask,
    Replay,
    Windows,
    average_loss,
    backward_transfer,
    forgetting,
    learn_in_sequence,
)

WINDOWS = Windows(batch_size=5, length=11, limit=7, seed=3)
# Texts that contradict each other: which byte follows an "a".
TASKS = [
    Corpus(name, *(torch.tensor(list(unit * 150), dtype=torch.uint8) for _ in range(2)))
    for name, unit in (("ab", b"ab"), ("ac", b"ac"), ("ad", b"ad"))
]
OLD = RECIPES["old"]
EVERY = {"log_every": 5, "eval_every": 25}
CONFIG = TrainConfig(steps=25, learning_rate=0.02, weight_decay=0.0, device="cpu", **EVERY, **OLD.training)


def model(graph: HeadGraphConfig | None = None) -> LanguageModel:
    torch.manual_seed(7)
    shape = {"d_model": 14, "num_heads": 7, "num_layers": 1, "d_ff": 13, **OLD.model}
    return LanguageModel(TransformerConfig(256, **shape, head_graph=graph))


def test_measures_of_a_matrix():
    losses = torch.tensor([[1.0, 5.0, 6.0], [2.0, 1.5, 7.0], [4.0, 1.0, 3.0]], dtype=torch.float64)
    assert average_loss(losses) == pytest.approx(8 / 3)
    assert backward_transfer(losses) == pytest.approx(((1 - 4) + (1.5 - 1)) / 2)
    assert forgetting(losses) == pytest.approx(((4 - 1) + (1 - 1.5)) / 2)


def test_fine_tuning_forgets_and_adapters_of_tasks_do_not(tmp_path):
    tuned = learn_in_sequence(Learner(model(), TASKS, WINDOWS), CONFIG, tmp_path / "tuned")
    assert tuned.shape == (3, 3) and backward_transfer(tuned) < -0.5 and forgetting(tuned) > 0.5
    learner = PerTask(TaskAdapters(model(HeadGraphConfig()), 3), TASKS, WINDOWS)
    before = torch.stack([learner.measure(task).mean() for task in range(3)])
    seen = []
    adapted = learn_in_sequence(learner, CONFIG, tmp_path / "own", on_task=lambda task, row: seen.append(task))
    assert backward_transfer(adapted) == 0.0 and forgetting(adapted) == 0.0 and seen == [0, 1, 2]
    assert torch.equal(adapted[1, 2], before[2]) and (adapted[-1] < before - 0.01).all()
    losses, share = learner.measure_inferred(1, prefix=5)
    assert losses.shape == (7,) and 0 <= share <= 1
    if share == 1.0:
        assert torch.equal(losses, learner.measure(1))


def test_replay_mixes_kept_text_into_batches():
    learner = Replay(model(), TASKS, WINDOWS, memory=40, share=0.4)
    assert torch.equal(learner.batch(0, 3)[0], Learner(model(), TASKS, WINDOWS).batch(0, 3)[0])
    for index in range(4):
        inputs, targets = learner.batch(2, index)
        new = sample_batch(TASKS[2].train, index, batch_size=5, length=11, seed=3)
        assert inputs.shape == targets.shape == (5, 11)
        assert torch.equal(inputs[:3], new[0][:3]) and torch.equal(targets[:3], new[1][:3])
        # The two tasks before take turns.
        assert set(inputs[3:].flatten().tolist()) == set(b"ab" if index % 2 == 0 else b"ac")
    with pytest.raises(ValueError, match="Expected a share"):
        Replay(model(), TASKS, WINDOWS, share=1.0)


def test_ewc_is_its_formula():
    learner = ElasticWeights(model(), TASKS, WINDOWS, strength=30.0, samples=4)
    plain = Learner.loss(learner, learner.model, learner.batch(0, 0)).loss
    assert torch.equal(learner.loss(learner.model, learner.batch(0, 0)).loss, plain)
    learner.end(0)
    assert learner.penalty() == 0 and learner.model.training
    before = [parameter.detach().clone() for parameter in learner.model.parameters()]
    fisher = [torch.zeros_like(parameter) for parameter in before]
    for inputs, targets in evaluation_batches(TASKS[0].train, batch_size=1, length=11, limit=4):
        learner.model.zero_grad()
        learner.model(inputs, targets=targets).loss.backward()
        for information, parameter in zip(fisher, learner.model.parameters(), strict=True):
            information += parameter.grad**2 / 4
    with torch.no_grad():
        for parameter in learner.model.parameters():
            parameter.add_(torch.randn_like(parameter))
    moved = zip(fisher, learner.model.parameters(), before, strict=True)
    expected = 15 * sum((f * (now - then) ** 2).sum() for f, now, then in moved)
    torch.testing.assert_close(learner.penalty(), expected)
    total, own = learner.loss(learner.model, learner.batch(1, 0)).loss, learner.batch(1, 0)
    torch.testing.assert_close(total, Learner.loss(learner, learner.model, own).loss + expected)
    with pytest.raises(ValueError, match="strength >= 0"):
        ElasticWeights(model(), TASKS, WINDOWS, strength=-1.0)


def test_a_strong_ewc_forgets_less(tmp_path):
    config = dataclasses.replace(CONFIG, steps=40, learning_rate=0.01)
    free, held = (
        learn_in_sequence(
            ElasticWeights(model(), TASKS[:2], WINDOWS, strength=strength, samples=16), config, tmp_path / f"{strength}"
        )
        for strength in (0.0, 1e4)
    )
    assert torch.equal(free[0], held[0]) and forgetting(held) < 0.8 * forgetting(free)


@pytest.fixture
def main(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = load_script("examples", "continual_learning")
    return lambda *arguments: script.main(["--smoke", "--device", "cpu", *arguments])


def result_of(folder, name):
    return json.loads((folder / "results" / f"{name}.json").read_text())["result"]


def test_the_example_compares_methods_of_equal_size(main, tmp_path, capsys):
    names = ["ewc", "graph", "lora", "both"]
    sizes = "--d-model 32 --num-heads 8 --in-degree 6 --steps 2 --methods".split()
    assert main("--run", "out", *sizes, *names) == 0
    shown, folder = capsys.readouterr().out, tmp_path / "out"
    rates = {"ewc": "0.002", "graph": "0.01", "lora": "0.01", "both": "0.01"}
    results = {name: result_of(folder, f"{name}-{rates[name]}-0") for name in names}
    assert (folder / "table.md").read_text() in shown
    sizes = [results[name]["parameters"] for name in names[1:]]
    assert max(sizes) <= 1.2 * min(sizes)
    for name in names[1:]:
        losses = results[name]["losses"]
        # Not forgetting, which counts from the best loss, that before a task was learned among them.
        assert results[name]["backward_transfer"] == 0.0
        assert all(row[task] == losses[task][task] for task in range(len(losses)) for row in losses[task:])
        # A neutral adapter is the base: what has not been learned yet is as it was before.
        assert losses[0][1:] == results[name]["before"][1:] == results["ewc"]["before"][1:]


def test_each_method_takes_its_best_rate_of_the_first_seed(main, tmp_path, capsys):
    rates = {"0.001", "0.01"}
    assert main("--run", "out", "--methods", "graph", "--seeds", "0", "3", "--learning-rates", *sorted(rates)) == 0
    tried = {path.name: result_of(tmp_path / "out", f"graph-{path.name.removeprefix('rate-')}-0")
             for path in tmp_path.glob("out/seed-0/graph/*")}  # fmt: skip
    assert tried.keys() == {f"rate-{rate}" for rate in rates}
    best = min(tried, key=lambda name: tried[name]["average_loss"])
    assert [path.name for path in tmp_path.glob("out/seed-3/graph/*")] == [best]
    _, row = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| graph")]
    assert row.split("|")[2].strip() == best.removeprefix("rate-")


def test_a_rate_at_which_the_loss_runs_away_is_not_taken(main, tmp_path, capsys):
    assert main("--run", "out", "--methods", "lora", "--learning-rates", "1e30", "0.001") == 0
    tried, row = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| lora")]
    assert "diverged" in tried
    assert row.split("|")[2].strip() == "0.001"
    assert main("--run", "lost", "--methods", "lora", "--learning-rates", "1e30", "1e29") == 2
    assert "finite loss at one of the learning rates" in capsys.readouterr().err


def test_ctrl_c_and_resume_equal_an_uninterrupted_run(main, tmp_path, monkeypatch, capsys):
    flags = ["--methods", "ewc", "both"]
    check_resumed(lambda *more: main(*flags, *more), tmp_path, monkeypatch, capsys, stop_at=6 + 4 + 2)
    for name in ("ewc-0.002-0", "both-0.01-0"):
        assert result_of(tmp_path / "whole", name) == result_of(tmp_path / "part", name)
    assert main(*flags, "--run", "part", "--resume", "--steps", "5") == 2
    assert "come from the same arguments (got other ['settings'])" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--in-degree", "3"], "even --in-degree"),
        (["--methods", "ewc", "--ewc-strength", "-1"], "strength >= 0"),
        (["--methods", "replay", "--replay-share", "2"], "share in"),
        (["--threads", "0"], "--threads"),
        (["--learning-rates", "0.1", "0"], "--learning-rates above 0"),
    ],
)
def test_impossible_flags_are_one_sentence(main, capsys, flags, message):
    assert message in refused(main("--run", "out", *flags), capsys)
