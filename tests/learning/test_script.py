"""What every training script does alike: flags, run folders, Ctrl-C and going on, and what a contest leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from example_runs import check_resumed, logs, refused
from torch import nn

from gohgraph.learning.cli.contest_script import ContestScript
from gohgraph.learning.cli.script import Script, resumable
from gohgraph.learning.loop import TrainingInterrupted

MODELS = ["small", "large"]
DATA = torch.randn(50, 3, 2, generator=torch.Generator().manual_seed(3))


def error(model, x):
    return (model(x) - x.sum(-1, keepdim=True)).square().mean()


class Fit(ContestScript):
    """Layers that are to sum their inputs, with a dropout that must be the same again after Ctrl-C."""

    name, runs = "fit", "fit"
    full = dict(width=5, steps=17)
    smoke = dict(width=2, steps=7)
    learning_rate, weight_decay = 0.1, 0.0

    @classmethod
    def add_flags(cls, parser):
        parser.add_argument("--models", nargs="+", default=MODELS)

    def check(self):
        if self.flags.width < 1:
            raise ValueError(f"Expected --width of at least 1 (got {self.flags.width}). Do raise it.")

    def models(self):
        return {name: self.flags.width * (1 + MODELS.index(name)) for name in self.flags.models}

    def start(self, width, seed, rate, leaf):
        return self.training(
            nn.Sequential(nn.Linear(2, width), nn.Dropout(0.5), nn.Linear(width, 1)),
            lambda step: DATA[step],
            error,
            self.config(seed, rate),
            leaf,
            evaluate=lambda model: {"validation_loss": error(model, DATA).item()},
            settings={"width": width},
        )

    def finish(self, training, leaf):
        return {"width": training.folder.settings["width"], "losses": DATA}

    def report(self, results):
        print("best rates", sorted({one["learning_rate"] for one in results.values()}))


@pytest.fixture
def main(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: Fit.main(["--smoke", "--device", "cpu", *arguments])


@pytest.mark.parametrize(
    "flags, stop_at",
    [
        (["--models", "small"], 3),
        # The first model is done then.
        (["--checkpoint-every", "3"], 7 + 2),
        # Two models at two rates, on the first seed, and then the first one at its best.
        (["--seeds", "2", "5", "--learning-rates", "0.01", "0.1"], 4 * 7 + 9),
    ],
)
def test_ctrl_c_and_resume_equal_an_uninterrupted_run(main, tmp_path, monkeypatch, capsys, flags, stop_at):
    check_resumed(lambda *more: main(*flags, *more), tmp_path, monkeypatch, capsys, stop_at=stop_at)


@pytest.mark.parametrize("command", ["python examples/fit.py", "gohgraph demo"])
def test_ctrl_c_names_the_command_that_goes_on(command):
    with pytest.raises(KeyboardInterrupt, match=f"stopped; to go on: {command} --run 'the runs/fit' --resume$"):
        with resumable(command, Path("the runs/fit")):
            raise TrainingInterrupted("stopped")


def test_a_resumed_run_has_the_flags_it_was_started_with(main, tmp_path, capsys):
    flags = ["--width", "3", "--models", "large", "--learning-rates", "0.05", "--seeds", "4"]
    assert main("--run", "out", *flags) == 0
    before = logs(tmp_path / "out")
    (tmp_path / "out" / "result.json").unlink()
    assert Fit.main(["--resume", "--run", "out"]) == 0
    assert logs(tmp_path / "out") == before and (tmp_path / "out" / "result.json").is_file()
    # What is given goes over it, and is refused where it cannot change, a flag's default too.
    assert "width = 10 for 6" in refused(Fit.main(["--resume", "--run", "out", "--width", "5"]), capsys)
    assert "others" in refused(Fit.main(["--resume", "--run", "out", "--models", *MODELS]), capsys)


def test_a_contest_leaves_results_and_curves_and_reports(main, tmp_path, capsys, figures):
    assert main("--seeds", "2", "5", "--run", "out") == 0
    leaves = {f"seed-{seed}/{name}" for seed in (2, 5) for name in MODELS}
    assert {str(path.parent.relative_to(tmp_path / "out")) for path in tmp_path.rglob("result.json")} == leaves
    # Tensors are for the report alone.
    assert json.loads((tmp_path / "out" / "seed-5" / "large" / "result.json").read_text()) == {"width": 4}
    assert len(pictures := list((tmp_path / "out").rglob("curves.png"))) == 5
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert "best rates [0.1]" in capsys.readouterr().out
    settings = json.loads((tmp_path / "out" / "seed-2" / "small" / "config.json").read_text())
    assert settings["width"] == 2 and settings["flags"]["steps"] == settings["training"]["steps"] == 7
    assert (settings["training"]["seed"], settings["training"]["weight_decay"]) == (2, 0.0)
    one, other = (logs(tmp_path / "out" / f"seed-{seed}" / "small") for seed in (2, 5))
    assert one != other


def test_default_folders_are_numbered_and_the_last_one_is_resumed(main, tmp_path):
    for _ in range(2):
        assert main("--models", "small") == 0
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"fit", "fit-2"}
    stamp = (tmp_path / "runs" / "fit" / "result.json").stat().st_mtime_ns
    (tmp_path / "runs" / "fit-2" / "result.json").unlink()
    assert main("--models", "small", "--resume") == 0
    assert (tmp_path / "runs" / "fit-2" / "result.json").exists()
    assert stamp == (tmp_path / "runs" / "fit" / "result.json").stat().st_mtime_ns


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--width", "0"], "--width of at least 1"),
        (["--threads", "0"], "--threads"),
        (["--seeds", "1", "1"], "different seeds"),
        (["--learning-rates", "nan"], "--learning-rates above 0"),
        (["--steps", "many"], "Expected other flags"),
        (["--wid", "3"], "Expected other flags"),
        (["--resume"], "run to resume"),
    ],
)
def test_impossible_flags_are_one_sentence(main, tmp_path, capsys, flags, message):
    assert message in refused(main("--run", "out", *flags), capsys)
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_and_other_flags_on_resume(main, tmp_path, capsys):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "config.json").write_text("kept")
    (tmp_path / "file").write_text("kept")
    assert "new or empty" in refused(main("--run", "thesis"), capsys)
    assert "can be written" in refused(main("--run", "file/out"), capsys)
    assert (tmp_path / "file").read_text() == (tmp_path / "thesis" / "config.json").read_text() == "kept"
    assert main("--run", "out") == 0
    before = logs(tmp_path / "out")
    assert "width = 3 for 2" in refused(main("--run", "out", "--resume", "--width", "3"), capsys)
    assert "--compare, --seeds and" in refused(main("--run", "out", "--resume", "--seeds", "0", "1"), capsys)
    weights = sorted(tmp_path.glob("out/small/checkpoints/*/model.safetensors"))[-1]
    weights.write_bytes(weights.read_bytes()[:100])
    assert "whole checkpoint" in refused(main("--run", "out", "--resume"), capsys)
    assert logs(tmp_path / "out") == before


def test_a_loss_that_runs_away_is_one_sentence(main, capsys):
    assert "finite loss" in refused(main("--run", "out", "--learning-rates", "1e30", "--warmup", "0"), capsys)


def test_what_a_user_can_mend_is_one_sentence_and_a_fault_is_raised(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def script(fault):
        class Failing(Script):
            name, runs, full, smoke = "failing", "failing", {}, {}

            def train(self):
                raise fault

        return Failing.main([])

    for fault in (FloatingPointError("Expected a finite loss"), ImportError("Expected sacrebleu")):
        assert str(fault) in refused(script(fault), capsys)
    for fault in (ImportError("cannot import"), RuntimeError("Expected no such thing")):
        with pytest.raises((ImportError, ValueError, RuntimeError), match=str(fault)):
            script(fault)
