"""Checkpoints of a model and a torch optimizer in Megatron-Core's torch_dist format, for any number of ranks."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, cast

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map, optim_state_to_sharding_state
from torch import nn

from gohgraph.common.packages import needs
from gohgraph.parallel.megatron.cpu import cpu_trial


def save_checkpoint(
    folder: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer | None = None, **common: Any
) -> None:
    """Writes a checkpoint; called by all ranks.

    Args:
        folder: empty, on a disk that all ranks share.
        model: of Megatron-Core, with `sharded_state_dict`.
        optimizer: of torch, over all parameters of `model`, or `None`.
        **common: small values, equal on all ranks.
    """
    # Without it Megatron-Core would wait for ever.
    with needs("the package psutil", "megatron"):
        import psutil  # noqa: F401
    if not Path(folder).is_dir() or any(Path(folder).iterdir()):
        raise ValueError(f"Expected an empty folder to save to (got {os.fspath(folder)}). Do make one.")
    # No rank may write before all have looked.
    torch.distributed.barrier()
    with cpu_trial(), _uninterrupted():
        dist_checkpointing.save({**_state(model, optimizer), "common": common}, os.fspath(folder))


def load_checkpoint(
    folder: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Reads a checkpoint of any number of tensor-parallel ranks; returns its common values.

    Raises:
        ValueError: the folder holds no whole checkpoint.
        RuntimeError: the checkpoint is of another model, or of another head graph.
    """
    if not dist_checkpointing.check_is_distributed_checkpoint(os.fspath(folder)):
        raise ValueError(f"Expected a whole checkpoint (got {os.fspath(folder)}, not whole). Do name another.")
    with cpu_trial():
        loaded = dist_checkpointing.load({**_state(model, optimizer)}, os.fspath(folder))
    model.load_state_dict(loaded["model"])
    if optimizer is not None:
        state = loaded["optimizer"]
        for values in state["state"].values():
            values["step"] = torch.tensor(float(state["step"]))
        optimizer.load_state_dict({name: state[name] for name in ("state", "param_groups")})
    return loaded["common"]


def _state(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    # Of Megatron-Core's modules.
    tensors = cast(Any, model).sharded_state_dict()
    if optimizer is None:
        return {"model": tensors}
    _fill_state(optimizer)
    state = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    steps = {float(values["step"]) for values in state["state"].values()}
    # One number for all parameters: it has no shape that could be sharded.
    optim_state_to_sharding_state(state, get_param_id_to_sharded_param_map(tensors, parameters), exclude_keys=("step",))
    return {"model": tensors, "optimizer": {**state, "step": max(steps)}}


def _fill_state(optimizer: torch.optim.Optimizer) -> None:
    """Gives a new optimizer the tensors that loading fills, as a step without gradients and without effect does."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if all(parameter in optimizer.state for parameter in parameters):
        return
    values = [parameter.detach().clone() for parameter in parameters]
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    with torch.no_grad():
        for parameter, old, gradient in zip(parameters, values, gradients, strict=True):
            parameter.copy_(old)
            parameter.grad = gradient
            optimizer.state[parameter]["step"].zero_()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Lets Ctrl-C wait: it goes to the processes that Megatron-Core starts to write, too, and would end them."""
    # When it is started it lets signals through again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
