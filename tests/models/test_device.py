"""Models on a device that is not the CPU."""

import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="torch is too old to stand in"
)
def test_every_preset_runs_without_tensors_of_the_cpu_and_without_reading_values():
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, tests / "fake_device.py"], cwd=tests.parent, capture_output=True, text=True, check=True
    )
    *stopped, end = done.stdout.splitlines()
    assert end == "done"
    assert [line.split(",")[0] for line in stopped] == ["adds_a_tensor_of_the_cpu", "reads_a_value"], done.stdout
