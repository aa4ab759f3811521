"""A sweep remembers finished runs, goes on after an interruption and refuses results of other arguments."""

from __future__ import annotations

import json
import operator
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from gohgraph.learning.contests.sweep import sweep

RUNS = {"one": {"base": 2, "exp": 3}, "two": {"base": 5, "exp": 2}}


def test_results_in_order_and_on_disk(tmp_path):
    assert list(sweep(pow, RUNS, tmp_path).items()) == [("one", 8), ("two", 25)]
    assert json.loads((tmp_path / "one.json").read_text()) == {"arguments": RUNS["one"], "result": 8}


def test_finished_runs_are_not_run_again(tmp_path):
    calls = []

    def function(base, exp):
        calls.append(base)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return base**exp

    with pytest.raises(KeyboardInterrupt):
        sweep(function, RUNS, tmp_path)
    assert sweep(function, RUNS, tmp_path) == {"one": 8, "two": 25}
    assert calls == [2, 5, 5]


def test_a_finished_run_is_told_once_it_is_on_disk(tmp_path):
    told = []

    def tell(name, result):
        told.append((name, result, (tmp_path / f"{name}.json").exists()))

    for _ in range(2):
        sweep(pow, RUNS, tmp_path, on_result=tell)
    assert told == [("one", 8, True), ("two", 25, True)]


def test_processes_give_the_same_results(tmp_path):
    assert sweep(pow, RUNS, tmp_path, jobs=2) == {"one": 8, "two": 25}


def test_a_failing_process_raises(tmp_path):
    with pytest.raises(ZeroDivisionError):
        sweep(pow, {"bad": {"base": 0, "exp": -1}}, tmp_path, jobs=2)


def test_other_arguments_and_damage_are_refused(tmp_path):
    sweep(pow, RUNS, tmp_path)
    with pytest.raises(ValueError, match=r"same arguments \(got other \['exp'\]\)"):
        sweep(pow, {"one": {"base": 2, "exp": 4}}, tmp_path)
    with pytest.raises(ValueError, match="same arguments"):
        sweep(pow, {"one": RUNS["one"] | {"mod": None}}, tmp_path)
    later = {name: arguments | {"mod": None} for name, arguments in RUNS.items()}
    assert sweep(pow, later, tmp_path, upgrade=lambda old: {"mod": None, **old}) == {"one": 8, "two": 25}
    (tmp_path / "one.json").write_text('{"arguments": ')
    with pytest.raises(ValueError, match=r"Expected JSON in .*one\.json"):
        sweep(pow, RUNS, tmp_path)
    for other in ('{"result": 8}', '{"arguments": {"base": 2, "exp": 3}}', "[8]", '{"arguments": [2, 3], "result": 8}'):
        (tmp_path / "one.json").write_text(other)
        with pytest.raises(ValueError, match=r"Expected a finished run in .*one\.json"):
            sweep(pow, RUNS, tmp_path)
    with pytest.raises(ValueError, match="Expected jobs to be an int >= 1"):
        sweep(operator.add, {}, tmp_path, jobs=0)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Expected a folder that can be written \(got .*run: Not a directory\)"):
        sweep(pow, RUNS, tmp_path / "file" / "run")


def lost(step):
    raise FloatingPointError(f"Expected a finite loss (got nan at step {step}). Do lower the learning rate.")


def test_a_sweep_stops_at_a_loss_that_runs_away(tmp_path):
    with pytest.raises(FloatingPointError):
        sweep(lost, {"lost": {"step": 4}}, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_sweep_goes_on_where_losses_may_run_away(tmp_path, jobs):
    assert sweep(lost, {"lost": {"step": 4}}, tmp_path, jobs=jobs, may_diverge=True) == {"lost": None}


SCRIPT = """
import sys, time
from pathlib import Path
from gohgraph.learning.contests.sweep import sweep
from gohgraph.learning.interrupts import TrainingInterrupted, interrupts

def train(file):
    with interrupts() as interrupted:
        Path(file).write_text("begun")
        while not interrupted.is_set():
            time.sleep(0.01)
    Path(file).write_text("checkpoint")
    raise TrainingInterrupted

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    sweep(train, {name: {"file": str(folder / name)} for name in "ab"}, folder / "results", jobs=2)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals are those of POSIX")
@pytest.mark.parametrize("ending", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_runs_side_by_side_write_checkpoints_when_their_sweep_ends(tmp_path, ending):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    # The signal goes to the sweep alone, not to its processes; a test that runs in the background may ignore Ctrl-C.
    ask = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen([sys.executable, script, tmp_path], stderr=subprocess.PIPE, preexec_fn=ask)
    files = [tmp_path / name for name in "ab"]
    wait_until(lambda: all(file.exists() and file.read_text() == "begun" for file in files))
    process.send_signal(getattr(signal, ending))
    # The pipe is closed when the last process that writes to it has ended.
    process.communicate(timeout=600)
    assert process.returncode != 0
    assert [file.read_text() for file in files] == ["checkpoint", "checkpoint"]


def wait_until(holds):
    deadline = time.monotonic() + 600
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)
