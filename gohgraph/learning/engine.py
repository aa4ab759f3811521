"""What carries out a run: Hugging Face accelerate for whole models, DTensor meshes for sharded ones."""

import copy
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from gohgraph.common.checks import check_torch
from gohgraph.learning.accelerator import make_accelerator
from gohgraph.learning.optim import make_optimizer, regroup_as_saved
from gohgraph.learning.train_config import TrainConfig
from gohgraph.parallel.gradients import clip_gradients
from gohgraph.parallel.layout import Layout, ParallelConfig
from gohgraph.parallel.ranks import machines
from gohgraph.parallel.sharding import parallelize, recompute
from gohgraph.parallel.states import is_sharded_state, load_state, save_state, whole_weights

# What accelerate calls the file of the optimizer.
OPTIMIZER = "optimizer.bin"
# Before, sharded tensors lack operators, and gradients or losses are wrong (docs/limits.md).
OLDEST_SHARDED = "2.13"


class Engine:
    """One process, or one of several that all hold the model and see different data (DDP).

    Args:
        config: of the training.

    Attributes:
        accelerator: device, precision and processes.
        data_ranks, data_rank: how many processes see different data, and which of them this is.
    """

    is_sharded = False

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.accelerator = config, make_accelerator(config)
        self.data_ranks, self.data_rank = self.accelerator.num_processes, self.accelerator.process_index

    def data_group(self) -> Any:
        """The process group of the ranks that see different data; `None` where there is one."""
        return torch.distributed.group.WORLD if self.data_ranks > 1 else None

    def prepare(self, model: nn.Module) -> tuple[nn.Module, Any, Any]:
        """Returns the model as it is trained, its optimizer and its schedule."""
        optimizer, schedule = self._optimizer(model.to(self.accelerator.device))
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(model, optimizer, schedule)
        return self.model, self.optimizer, self.schedule

    def no_sync(self) -> AbstractContextManager:
        """Inside, gradients stay on their rank."""
        return self.accelerator.no_sync(self.model)

    def clip(self, largest: float) -> None:
        """Scales the gradients down to a norm of `largest`."""
        self.accelerator.clip_grad_norm_(self.model.parameters(), largest)

    def save(self, folder: Path) -> None:
        """Writes model, optimizer and schedule; all ranks call it."""
        self.accelerator.save_state(str(folder))

    def check(self, folder: Path) -> None:
        """Raises `ValueError` where a checkpoint is of the other kind of engine."""
        if is_sharded_state(folder) is not self.is_sharded:
            kinds = ("whole models", "sharded ones (tp, fsdp)")
            raise ValueError(
                f"Expected a checkpoint of {kinds[self.is_sharded]} (got {folder}, of {kinds[not self.is_sharded]}). "
                "Do resume with the kinds of parallelism it was started with; the number of ranks may be another."
            )

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote; all ranks call it."""
        regroup_as_saved(self.optimizer.optimizer, self.unwrapped(), self.config, folder / OPTIMIZER)
        self.accelerator.load_state(str(folder))

    def unwrapped(self) -> nn.Module:
        """The model without what accelerate wraps around it."""
        return self.accelerator.unwrap_model(self.model)

    def whole(self) -> nn.Module:
        """The trained model as one process has it, on the first rank; all ranks call it."""
        return self.unwrapped()

    def release(self) -> None:
        """Takes off what accelerate has wrapped around the model; a rank can do it alone."""
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)

    def _optimizer(self, model: nn.Module) -> tuple[torch.optim.Optimizer, LambdaLR]:
        optimizer = make_optimizer(model, self.config, self.accelerator.device)
        return optimizer, LambdaLR(optimizer, self.config.learning_rate_factor)


class ShardedEngine(Engine):
    """One of several processes each of which holds a part of the model, in the kinds of parallelism given."""

    is_sharded = True

    def __init__(self, config: TrainConfig, parallel: ParallelConfig) -> None:
        check_torch(OLDEST_SHARDED, "for fsdp and tp", "train with ddp")
        super().__init__(config)
        for name, refused in (("precision", "fp16"), ("compile", True)):
            if getattr(config, name) == refused:
                raise ValueError(f"Expected another {name} with fsdp and tp (got {refused!r}). Do leave it out.")
        # Heads' outputs are views; nobody writes into them.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        self.layout = Layout(parallel, self.accelerator.device.type, machines())
        self.data_ranks, self.data_rank = self.layout.data_ranks, self.layout.data_rank

    def data_group(self) -> Any:
        return self.layout.data_group()

    def prepare(self, model: nn.Module) -> tuple[nn.Module, Any, Any]:
        # Takes the whole weights in the end.
        self._plain = copy.deepcopy(model).cpu() if self.accelerator.is_main_process else None
        self.model = parallelize(model.to(self.accelerator.device), self.layout)
        self.optimizer, self.schedule = self.accelerator.prepare(*self._optimizer(self.model))
        return self.model, self.optimizer, self.schedule

    def clip(self, largest: float) -> None:
        clip_gradients(self.model.parameters(), largest)

    def save(self, folder: Path) -> None:
        save_state(folder, self.model, self.optimizer.optimizer, {"schedule": self.schedule.state_dict()})

    def load(self, folder: Path) -> None:
        schedule = {"schedule": self.schedule.state_dict()}
        saved = load_state(folder, self.model, self.optimizer.optimizer, schedule)
        self.schedule.load_state_dict(saved["schedule"])

    def unwrapped(self) -> nn.Module:
        return self.model

    def release(self) -> None:
        """Does nothing: no wrapping is to be taken off."""

    def whole(self) -> nn.Module:
        weights: dict[str, Tensor] = whole_weights(self.model)
        if self._plain is None:
            return self.model
        self._plain.load_state_dict(weights)
        return self._plain.to(self.accelerator.device)


def make_engine(config: TrainConfig, model: nn.Module, parallel: ParallelConfig | None) -> Engine:
    """Returns what carries out a run of `model`; kinds of parallelism that these ranks cannot do are an error."""
    if parallel is not None and parallel.is_sharded:
        return ShardedEngine(config, parallel)
    if parallel is not None and parallel.recompute:
        recompute(model)
    return Engine(config)
