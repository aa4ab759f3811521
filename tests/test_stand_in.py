"""The package on a device that is not the CPU."""

import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="torch is too old to stand in"
)
def test_a_device_that_stands_in_for_a_gpu_gives_the_numbers_of_the_cpu():
    script = Path(__file__).with_name("on_stand_in.py")
    done = subprocess.run([sys.executable, script], cwd=script.parents[1], capture_output=True, text=True, check=True)
    *wrong, end = done.stdout.splitlines()
    assert end == "done"
    names = ("tensor_of_the_cpu", "generator_of_the_cpu", "float64", "size_that_is_read", "copy_to_the_cpu")
    assert [line.split(":")[0] for line in wrong] == [f"must_stop_at_a_{name}" for name in names], done.stdout
