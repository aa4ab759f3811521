"""Forward passes of other people's modules that leave no trace in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

SEED = 20240411


@contextmanager
def quietly(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, the same random numbers every time; modes and random state then as they were."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=sorted(devices)), _real_numbers(model):
            torch.manual_seed(SEED)
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _real_numbers(model: nn.Module) -> AbstractContextManager[Any]:
    """What lets a model on meta read numbers, and one in memory make them where the default device is meta."""
    if is_on_meta(model):
        return _Ones()
    return torch.device("cpu") if torch.get_default_device().type == "meta" else nullcontext()


class _Ones(TorchDispatchMode):
    """Lets models read numbers off the meta device, where there are none: a 1, as of a mask without padding."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.ones((), dtype=args[0].dtype, device="cpu").item()
        return function(*args, **(kwargs or {}))


def device_of(model: nn.Module) -> torch.device:
    """Returns the device a model computes on: of offloaded weights, the one they are brought to."""
    device = next(model.parameters(), torch.empty(0)).device
    if device.type == "meta":
        hooks = [hook for module in model.modules() for hook in _accelerate_hooks(module)]
        devices = [hook.execution_device for hook in hooks if getattr(hook, "execution_device", None) is not None]
        return torch.device(devices[0]) if devices else device
    return device


def is_on_meta(model: nn.Module) -> bool:
    """Whether a model has no weights to compute with: on the meta device, and not offloaded."""
    return device_of(model).type == "meta"


def dtype_for(weight: torch.Tensor) -> torch.dtype:
    """Returns the dtype of what stands beside a weight, which may be quantised."""
    is_plain = weight.is_floating_point() and weight.dtype.itemsize > 1
    return weight.dtype if is_plain else torch.get_default_dtype()


def _accelerate_hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", (hook,)))
