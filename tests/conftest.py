from __future__ import annotations

import pytest
import torch

# Tiny models run far faster on one thread.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(20240229)
