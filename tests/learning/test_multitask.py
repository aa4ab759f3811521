"""Multi-task learning: sampling of tasks, models that share heads, and the example."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from example_runs import refused
from helpers import load_script, small_config

from gohgraph import LanguageModel
from gohgraph.learning.regimes.adapters import TaskAdapters
from gohgraph.learning.regimes.multitask import TaskSampler, task_output

SOURCES = [lambda index, task=task: (f"{task}: {index}",) for task in range(3)]


def test_tasks_are_drawn_by_size_and_temperature():
    sizes = [1.0, 8.0, 27.0]
    for temperature, expected in ((None, [1 / 3] * 3), (1, [1 / 36, 8 / 36, 27 / 36]), (3, [1 / 6, 2 / 6, 3 / 6])):
        sampler = TaskSampler(SOURCES, sizes=sizes, temperature=temperature, seed=5)
        assert sampler.probabilities == pytest.approx(expected)
        counts = Counter(sampler.task(index) for index in range(2000))
        assert [counts[task] / 2000 for task in range(3)] == pytest.approx(expected, abs=0.04)


def test_batches_are_pure_and_name_their_task():
    sampler, other = TaskSampler(SOURCES, seed=5), TaskSampler(SOURCES, seed=6)
    batches = [sampler(index) for index in range(50)]
    assert batches == [TaskSampler(SOURCES, seed=5)(index) for index in range(50)]
    assert all(batch == (f"{batch[1]}: {index}", batch[1]) for index, batch in enumerate(batches))
    assert [batch[1] for batch in batches] != [other(index)[1] for index in range(50)]


@pytest.mark.parametrize(
    "more, message",
    [
        ({"sizes": [1.0, 2.0]}, "Expected 3 sizes"),
        ({"sizes": [1.0, 0.0, 2.0]}, "above 0"),
        ({"temperature": 2.0}, "temperature > 0 and sizes"),
        ({"temperature": 0.0, "sizes": [1.0] * 3}, "temperature > 0"),
    ],
)
def test_impossible_sampling(more, message):
    with pytest.raises(ValueError, match=message):
        TaskSampler(SOURCES, **more)
    with pytest.raises(ValueError, match="at least one source"):
        TaskSampler([])


def test_models_with_and_without_adapters():
    tokens = torch.randint(13, (2, 5))
    model = LanguageModel(small_config("outputs"))
    expected = model(tokens, targets=tokens).loss
    assert torch.equal(task_output(model, (tokens, tokens, 1)).loss, expected)
    adapters = TaskAdapters(model, 2, frozen=False)
    assert torch.equal(task_output(adapters, (tokens, tokens, 1)).loss, expected)
    task_output(adapters, (tokens, tokens, 1)).loss.backward()
    assert all(parameter.grad is None for parameter in adapters.tasks[0].parameters())
    assert any(parameter.grad.abs().sum() > 0 for parameter in adapters.tasks[1].parameters())


@pytest.fixture
def main(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = load_script("examples", "multitask_learning")
    return lambda *arguments: script.main(["--smoke", "--device", "cpu", *arguments])


def test_the_example_compares_models_of_equal_size(main, tmp_path, capsys):
    assert main("--run", "out", "--temperature", "5", "--steps", "5") == 0
    shown, folder = capsys.readouterr().out, tmp_path / "out"
    results = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/losses.json")}
    assert len(results) == 10 and (folder / "table.md").read_text() in shown and (folder / "curves.png").exists()
    sizes = {name: one["parameters"] for name, one in results.items()}
    matched = [sizes[name] for name in ("plain", "graph", "graph-per-task")]
    assert max(matched) - min(matched) <= 2 * 16 + 1
    assert all(list(one["losses"]) == [name.removeprefix("separate-")] for name, one in results.items()
               if name.startswith("separate"))  # fmt: skip
    row = next(line for line in (folder / "table.md").read_text().splitlines() if line.startswith("| separate"))
    mean = sum(one["losses"][name.removeprefix("separate-")] for name, one in results.items()
               if name.startswith("separate")) / 5  # fmt: skip
    assert f"{mean:.3f}" in row and f"{5 * sizes['separate-cpp']:,}" in row


@pytest.mark.parametrize(
    "flags, message", [(["--steps", "3"], "--steps of at least 5"), (["--temperature", "0"], "temperature > 0")]
)
def test_impossible_flags_are_one_sentence(main, tmp_path, capsys, flags, message):
    assert message in refused(main("--run", "out", *flags), capsys)
    assert not (tmp_path / "out").exists()
