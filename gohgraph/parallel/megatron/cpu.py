"""Megatron-Core without CUDA, for trials and tests."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from unittest import mock

import torch
from megatron.core.tensor_parallel import random


@contextmanager
def cpu_trial() -> Iterator[None]:
    """Lets Megatron-Core run on a CPU where it asks for the current CUDA device; does nothing where there is CUDA.

    Rotary positions, its own attention, recomputation, sequence parallelism and distributed checkpoints ask. Within,
    `torch.cuda` says that the current device is the CPU and has nothing to wait for, and all tensor-parallel ranks draw
    the same random numbers, for dropout too.

    Example:
        >>> with cpu_trial():
        ...     torch.cuda.synchronize()
    """
    with ExitStack() as stack:
        if not torch.cuda.is_available():
            for owner, name, answer in (
                (torch.cuda, "current_device", torch.device("cpu")),
                (torch.cuda, "synchronize", None),
                (random, "_get_cuda_rng_state", None),
                (random, "_set_cuda_rng_state", None),
                (random.CudaRNGStatesTracker, "fork", nullcontext()),
            ):
                stack.enter_context(mock.patch.object(owner, name, mock.Mock(return_value=answer)))
        yield
