"""What the tests of training scripts share: refused flags, and interrupted runs held against whole ones."""

from __future__ import annotations

import csv
import signal
from collections.abc import Callable
from pathlib import Path

CLOCK = ("tokens_per_second", "seconds")


def logs(folder: Path) -> dict[str, list[dict[str, str]]]:
    """Every log.csv below a folder, without what a clock decides."""
    found = {}
    for path in sorted(folder.rglob("log.csv")):
        with open(path, newline="") as file:
            rows = [{name: text for name, text in row.items() if name not in CLOCK} for row in csv.DictReader(file)]
        found[str(path.relative_to(folder))] = rows
    return found


def refused(code: int, capsys) -> str:
    """The one line of an error about bad input."""
    shown = capsys.readouterr().err
    lines = [line for line in shown.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and shown.endswith(lines[0] + "\n"), shown
    assert "Traceback" not in shown and "usage" not in shown
    return lines[0]


def check_resumed(main: Callable[..., int], folder: Path, monkeypatch, capsys, *, stop_at: int) -> None:
    """Runs whole, and again with Ctrl-C in the `stop_at`-th training step and resumed; all logs must be equal."""
    from gohgraph.learning.training import Training

    assert main("--run", str(folder / "whole")) == 0
    step, steps = Training._train_step, []

    def stopping(self) -> None:
        steps.append(self.step)
        if len(steps) == stop_at:
            signal.raise_signal(signal.SIGINT)
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_train_step", stopping)
        assert main("--run", str(folder / "part")) == 130
    assert len(steps) == stop_at and "--resume" in capsys.readouterr().err.splitlines()[-1]
    assert main("--run", str(folder / "part"), "--resume") == 0
    whole = logs(folder / "whole")
    assert whole and logs(folder / "part") == whole
