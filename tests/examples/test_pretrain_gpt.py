"""Training of Megatron-Core's GPT: whole, interrupted and gone on with on two ranks, on indexed data, bad flags."""

from __future__ import annotations

import json
import signal
import socket

import numpy as np
import pytest
import torch
from example_runs import logs, refused
from helpers import load_script
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron_ranks import run_script
from ranks import run_ranks


@pytest.fixture(scope="module")
def script():
    return load_script("examples/megatron", "pretrain_gpt")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{number} and {number + 1} make {2 * number + 1}.\n" for number in range(600)))
    return str(path)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_two_ranks(script, text, tmp_path, monkeypatch, capsys):
    flags = ["--smoke", "--data", text, "--sites", "both", "--router", "--micro-batches", "2", "--run"]
    assert script.main([*flags, str(tmp_path / "whole")]) == 0
    (rows,) = logs(tmp_path / "whole").values()
    assert float(rows[-1]["validation_loss"]) < float(rows[0]["loss"])
    assert {"curves.png", "result.json", "config.json"} <= {path.name for path in (tmp_path / "whole").iterdir()}
    train_step = script.Pretraining._train_step

    def stopping(self):
        if self.step == 1:
            signal.raise_signal(signal.SIGINT)
        return train_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(script.Pretraining, "_train_step", stopping)
        assert script.main([*flags, str(tmp_path / "part")]) == 130
    assert "--resume" in capsys.readouterr().err.splitlines()[-1]
    arguments = [*flags, str(tmp_path / "part"), "--resume", "--tensor-parallel", "2"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert run_ranks(2, run_script, port, arguments) == [0, 0]
    (resumed,) = logs(tmp_path / "part").values()
    assert len(resumed) == len(rows) == 4
    for row, expected in zip(resumed, rows, strict=True):
        for name in ("step", "loss", "validation_loss", "lr"):
            assert float(row[name]) == pytest.approx(float(expected[name]), abs=1e-5)


def test_indexed_data_is_read_in_megatrons_order(script, tmp_path):
    prefix = tmp_path / "numbers"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for start in range(60):
        builder.add_document(torch.arange(start, start + 40), [40])
    builder.finalize(f"{prefix}.idx")
    flags = ["--smoke", "--data", str(prefix), "--vocab-size", "100", "--steps", "2", "--run"]
    assert script.main([*flags, str(tmp_path / "run")]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert 3 < result["validation_loss"] < 5 and result["steps"] == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--experts"], "Expected a HeadGraphConv at outputs"),
        (["--tensor-parallel", "2"], "Expected --tensor-parallel that divides 1"),
        (["--batch-size", "5", "--micro-batches", "2"], "Expected --batch-size that 2 data-parallel"),
        (["--router", "--anneal-top-k", "2"], "Expected no --anneal-top-k"),
        (["--resume"], "Expected a run to resume"),
        (["--data", "nowhere.txt"], "or a text file that can be read"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_flags_are_one_line(script, tmp_path, capsys, flags, message):
    code = script.main(["--smoke", "--run", str(tmp_path / "run"), *flags])
    assert message in refused(code, capsys)
