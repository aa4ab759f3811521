from __future__ import annotations

from functools import cache

import pytest
import torch
from torch.torch_version import TorchVersion

from gohgraph.learning.data import python_text

# Tiny models run far faster on one thread.
torch.set_num_threads(1)
# To gather Python's documentation takes seconds, and many tests train on it.
python_text.documentation = cache(python_text.documentation)


def pytest_runtest_setup(item):
    if item.get_closest_marker("compiles") and TorchVersion(torch.__version__) < "2.13":
        pytest.skip("older compilers of torch cannot follow attention (docs/limits.md)")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(20240229)


@pytest.fixture(autouse=True)
def same_threads():
    """Command lines set the number of torch's threads, for their whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
