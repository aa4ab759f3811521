"""The example of federated learning: in this process, in Flower's simulation, and as separate processes."""

from __future__ import annotations

import csv
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from example_runs import logs, refused
from helpers import load_script

FOLDER = Path(__file__).parents[2] / "examples" / "federated_learning"


@pytest.fixture
def script(monkeypatch):
    # As python does for a script: its neighbours can be imported.
    monkeypatch.syspath_prepend(str(FOLDER))
    script = load_script("examples/federated_learning", "run")
    yield script
    sys.modules["federation"].make_client.cache_clear()


@pytest.fixture
def main(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: script.main(["--smoke", "--clients", "3", *arguments])


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_all_methods_are_compared_and_failing_clients_left_out(main, script, tmp_path, capsys):
    assert main("--run", "out", "--faults") == 0
    shown = capsys.readouterr().out
    assert (tmp_path / "out" / "table.md").read_text() in shown and (tmp_path / "out" / "curves.png").exists()
    down = {}
    for method in script.METHODS:
        rows = rows_of(tmp_path / "out" / method)
        # With nothing to send there is nothing to poison.
        lost = "1" if method.startswith("local") else "2"
        assert [row["refused"] for row in rows] == [lost] * 3 and float(rows[-1]["validation_loss"]) > 0
        down[method] = int(rows[-1]["bytes_down"])
    assert down["full"] > down["personal-graph"] > down["lora"] > 0 and down["graph"] > 0 == down["local"]


@pytest.mark.parametrize("recipe, optimizer", [("old", "adamw"), ("modern", "muon")])
def test_clients_are_trained_by_the_recipe_and_adapters_as_pefts(script, recipe, optimizer):
    federation = sys.modules["federation"]
    for method in script.METHODS:
        training = federation.client_training(federation.Settings("run", method=method, recipe=recipe))
        assert training.optimizer == optimizer
        trains_all = method in ("full", "personal-graph", "local")
        assert training.weight_decay == (0.1 if trains_all else 0.0)
        assert training.graph_lr_factor == (0.25 if trains_all and recipe == "modern" else 1.0)


def test_ctrl_c_and_resume_equal_an_uninterrupted_run(main, tmp_path, monkeypatch, capsys):
    from gohgraph.learning.federated.client import Client
    from gohgraph.learning.federated.server import last_weights

    flags = ["--methods", "lora", "lora-personal-graph"]
    assert main("--run", "whole", *flags) == 0
    fit, calls = Client.fit, []

    def stopping(self, *arguments, **more):
        calls.append(0)
        if len(calls) == 3 * 3 + 4:
            signal.raise_signal(signal.SIGINT)
        return fit(self, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Client, "fit", stopping)
        assert main("--run", "part", *flags) == 130
    assert "federated_learning/run.py" in (shown := capsys.readouterr().err.splitlines()[-1]) and "--resume" in shown
    assert "after round 2" in shown and len(rows_of(tmp_path / "part" / "lora-personal-graph")) == 2
    assert main("--run", "part", *flags, "--resume") == 0
    whole = logs(tmp_path / "whole")
    assert len(whole) == 3 and logs(tmp_path / "part") == whole
    one, other = (last_weights(tmp_path / name / "lora-personal-graph") for name in ("whole", "part"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--in-degree", "3"], "even --in-degree"),
        (["--dp-noise", "1"], "--dp-noise and --dp-clip"),
        (["--alpha", "0"], "alpha to be a finite number > 0"),
        (["--methods", "lora", "--dp-noise", "-1", "--dp-clip", "1"], "noise"),
    ],
)
def test_impossible_flags_are_one_sentence(main, capsys, flags, message):
    assert message in refused(main("--run", "out", *flags), capsys)


def test_help_says_whose_training_the_flags_change(main, capsys):
    with pytest.raises(SystemExit):
        main("--help")
    shown = capsys.readouterr().out
    assert "training of the base (of clients: --recipe and --client-learning-rate):\n  --recipe" in shown


def environment(tmp_path: Path) -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "FLWR_HOME": str(tmp_path / "flower"), "FLWR_TELEMETRY_ENABLED": "0"}


@pytest.mark.slow
def test_flowers_simulation_gives_the_same_numbers(main, tmp_path):
    flags = ["--methods", "personal-graph", "--faults", "--rounds", "2"]
    assert main("--run", "inline", *flags) == 0
    command = [sys.executable, str(FOLDER / "run.py"), "--smoke", "--clients", "3", "--run", "ray", *flags]
    command += ["--backend", "ray"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "this client has died" in done.stderr and "is not finite" in done.stderr
    inline, ray = (rows_of(tmp_path / name / "personal-graph") for name in ("inline", "ray"))
    for one, other in zip(inline, ray, strict=True):
        assert one["clients"] == other["clients"] == "1" and one["bytes_up"] == other["bytes_up"]
        assert float(one["loss"]) == pytest.approx(float(other["loss"]), abs=1e-4)
    assert float(inline[-1]["validation_loss"]) == pytest.approx(float(ray[-1]["validation_loss"]), abs=1e-4)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_until(condition, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not in {seconds} s: {what}"
        time.sleep(0.2)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_the_documented_processes_train_and_survive_a_killed_client(script, tmp_path):
    """The commands of the docstring, on free ports and with a small model; the second client is killed in its round."""
    link_port, *node_ports = free_ports(3)
    lines = [line.strip() for line in script.__doc__.splitlines() if re.match(r"\s+(flower-|flwr )", line)]
    text = "\n".join(lines).replace("9500", str(link_port)).replace("$PWD", str(tmp_path))
    for number, port in enumerate(node_ports):
        text = text.replace(f"960{number}", str(port))
    link, first, second, launch = (shlex.split(line) for line in text.splitlines())
    launch[2] = str(FOLDER)
    launch += ["--run-config", "method='lora-personal-graph' rounds=1 local-steps=2 limit=20000"]
    launch += ["--run-config", "d-model=16 num-heads=4 num-layers=1 d-ff=8 length=16 batch-size=4 windows=4"]
    (tmp_path / "flower").mkdir()
    (config,) = re.findall(r"(\[superlink\.local\]\n.*?)\n\n", script.__doc__, flags=re.DOTALL)
    (tmp_path / "flower" / "config.toml").write_text(config.replace("9500", str(link_port)))
    started = []

    def start(command: list[str], name: str) -> Path:
        log = tmp_path / f"{name}.log"
        with open(log, "w") as file:
            # A session each: what it starts in turn is ended with it.
            options = {"cwd": tmp_path, "env": environment(tmp_path), "start_new_session": True}
            started.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, **options))
        return log

    try:
        began = time.monotonic()
        start(link, "link")
        wait_until(lambda: answers(link_port), 1000, "the server answers")
        # A round lasts as long as it waits for the killed client: long enough for the other one on a busy machine.
        launch += ["--run-config", f"timeout={10 * (time.monotonic() - began):.1f}"]
        start(first, "first")
        log = start(second, "second")
        start(launch, "launch")
        wait_until(lambda: "Receiving: train message" in log.read_text(), 1000, "the second client is asked to train")
        os.killpg(started[2].pid, signal.SIGKILL)
        assert started[-1].wait(timeout=1000) == 0
        log = (tmp_path / "launch.log").read_text()
        (row,) = rows_of(tmp_path / "runs" / "processes" / "lora-personal-graph")
    finally:
        for process in started:
            if process.poll() is None or process is started[2]:
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            process.wait(timeout=30)
    assert "no answer in time" in log
    assert (row["clients"], row["refused"]) == ("1", "1") and float(row["validation_loss"]) > 0
    # Each keeps its own graph: the one who lived has one, the one killed while training has none.
    own = tmp_path / "runs" / "processes" / "clients"
    assert [path.name for path in own.glob("*/round-*")] == ["round-000001.safetensors"]
