"""Checkpoints of sharded training, which load at another number of ranks (`torch.distributed.checkpoint`)."""

import os
from pathlib import Path
from typing import Any, cast

import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer

# By names of parameters and not by their numbers: how they are grouped depends on how they lie on ranks.
OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


def save_state(folder: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer, values: dict[str, Any]) -> None:
    """Writes model, optimizer and values to a folder, each rank its own part; all ranks call it.

    Args:
        folder: which all ranks see; best an empty one that is moved to its place when it is whole.
        model, optimizer: sharded or not.
        values: small ones that are the same on all ranks.
    """
    weights, state = get_state_dict(model, optimizer, options=OPTIONS)
    dcp.save({"model": weights, "optimizer": state, "more": values}, checkpoint_id=os.fspath(folder))


def load_state(
    folder: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer, values: dict[str, Any]
) -> dict[str, Any]:
    """Reads what `save_state` wrote, at this or another number of ranks, into model and optimizer.

    Returns the values that were saved, under the keys of the values given.
    """
    weights, state = get_state_dict(model, optimizer, options=OPTIONS)
    saved: dict[str, Any] = {"model": weights, "optimizer": state, "more": dict(values)}
    dcp.load(saved, checkpoint_id=os.fspath(folder))
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=OPTIONS)
    return saved["more"]


def is_sharded_state(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds what `save_state` wrote."""
    return (Path(folder) / ".metadata").is_file()


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Returns the whole state dict on the CPU of the first rank, an empty one on the others; all ranks call it."""
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return cast("dict[str, Tensor]", weights)
