"""The Hugging Face `Accelerator` of a run: device, precision and processes."""

from typing import Any

import torch

from gohgraph.common.packages import needs
from gohgraph.learning.train_config import TrainConfig


def make_accelerator(config: TrainConfig) -> Any:
    """Returns an `accelerate.Accelerator` for the device and precision of `config`."""
    with needs("the package accelerate for training", "train"):
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    kind = device_kind(config.device)
    if config.precision == "fp16" and kind == "cpu":
        raise ValueError("Expected precision 'no' or 'bf16' on the CPU (got 'fp16'). Do choose one of them.")
    # Accelerate keeps one state per process and refuses a second run with other settings.
    if AcceleratorState._shared_state:
        state = AcceleratorState()
        if (state.device.type, state.mixed_precision) != (kind, config.precision):
            AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=kind == "cpu", mixed_precision=config.precision, step_scheduler_with_optimizer=False)
    if config.compile:
        _check_compile(accelerator.device)
    return accelerator


def device_kind(wanted: str | None) -> str:
    """Returns the kind of device that is wanted, or of the accelerator when there is one; `ValueError` without it."""
    present = torch.accelerator.current_accelerator(check_available=True)
    kind = "cpu" if present is None else present.type
    if wanted in (None, kind):
        return kind
    if wanted != "cpu":
        raise ValueError(f"Expected a machine with device {wanted!r} (got only {kind!r}). Do leave the device out.")
    return "cpu"


def _check_compile(device: torch.device) -> None:
    """Compiles one small function, since what is missing (a compiler, mostly) shows only then."""
    try:
        torch.compile(lambda x: torch.tanh(x) + 1)(torch.ones(3, device=device))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"Expected a machine where torch.compile works (got: {reason}). Do install a C++ compiler, or leave it out."
        ) from error
