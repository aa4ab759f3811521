"""One training run of the quality benchmark, in a process of its own, and how long its steps take."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.tasks import TASKS, Task
from benchmarks.timing import Call
from gohgraph.common.checks import there
from gohgraph.graphs.learned_topology import LearnedTopologyConv
from gohgraph.learning.contests.grid import Point
from gohgraph.learning.loop import TrainConfig, train
from gohgraph.learning.optim import make_optimizer
from gohgraph.models.config import TransformerConfig

# A tenth apart: the last fifth of a training shows whether it has come to rest.
EVALUATIONS = 10


@dataclass(frozen=True)
class Trial:
    """A training run.

    Args:
        task: name of the task.
        variant: name of the preset.
        point: learning rate and what else is searched.
        seed: of weights and data.
        budget: steps, as a multiple of the task's.
    """

    task: str
    variant: str
    point: Point
    seed: int
    budget: float = 1.0

    @property
    def name(self) -> str:
        """The name of its result, a file name.

        Example:
            >>> point = Point.of(learning_rate=0.002)
            >>> Trial("text", "plain", point, 0).name, Trial("text", "plain", point, 0, 1.5).name
            ('text_plain_0.002_0', 'text_plain_0.002_0_x1.5')
        """
        longer = "" if self.budget == 1 else f"_x{self.budget:g}"
        return f"{self.task}_{self.variant}_{self.point}_{self.seed}{longer}"


def run_trial(
    folder: str,
    name: str,
    task: str,
    options: dict[str, Any],
    config: dict[str, Any],
    plain: dict[str, Any],
    training: dict[str, Any],
    seed: int,
    threads: int = 1,
) -> list[dict[str, Any]]:
    """Trains one model and returns its log; an interrupted run goes on from its checkpoint.

    Args:
        folder: of all run folders.
        name: of this run.
        task, options: name and fields of the task.
        config: of the model, as a dictionary.
        plain: of plain attention, whose first weights all variants share.
        training: of `TrainConfig`, steps and rates among it.
        seed: of weights and data.
        threads: of the CPU.
    """
    torch.set_num_threads(threads)
    learned, path = TASKS[task](**options), Path(folder) / name
    model = first_model(learned, TransformerConfig.from_dict(config), TransformerConfig.from_dict(plain), seed)
    steps = training["steps"]
    every = max(1, math.ceil(steps / EVALUATIONS))
    learns_topology = any(isinstance(module, LearnedTopologyConv) for module in model.modules())
    log = train(
        model,
        partial(learned.batch, seed=seed),
        learned.output,
        TrainConfig(
            **training,
            anneal_in_degree=steps // 2 if learns_topology else 0,
            eval_every=every,
            checkpoint_every=every,
            keep_checkpoints=1,
            log_every=every,
            seed=seed,
            device="cpu",
        ),
        path,
        evaluate=learned.evaluate,
        resume=(path / "config.json").exists(),
        settings={"model": config},
        description=name,
    )
    with torch.no_grad():
        log[-1] |= learned.final(model.eval())
    # The log is what is wanted of hundreds of runs; each checkpoint is three times its model.
    shutil.rmtree(path / "checkpoints", ignore_errors=True)
    return log


def first_model(task: Task, config: TransformerConfig, plain: TransformerConfig, seed: int) -> nn.Module:
    """Builds a model whose weights are plain attention's of that seed wherever names and shapes are equal.

    Example:
        >>> from gohgraph.graphs.baselines.presets import preset
        >>> from dataclasses import replace
        >>> task = TASKS["two-cues"]()
        >>> models = [first_model(task, replace(task.config(), head_graph=preset(name, 8)), task.config(), seed=3)
        ...           for name in ("plain", "dcmha")]
        >>> torch.equal(*(model.encoder.layers[0].attention.object.query.weight for model in models))
        True
    """
    torch.manual_seed(seed)
    base = task.model(plain).state_dict()
    torch.manual_seed(seed)
    model = task.model(config)
    sizes = {key: value.shape for key, value in model.state_dict().items()}
    model.load_state_dict({k: v for k, v in base.items() if sizes.get(k) == v.shape}, strict=False)
    return model


class TrainingStep(Call):
    """One training step of a variant, to be timed: forward, backward, clipping and optimizer, at tiny rates."""

    def __init__(self, task: Task, model: nn.Module, training: dict[str, Any]) -> None:
        super().__init__(torch.device("cpu"))
        self.task, self.model, self.index = task, model.train(), 0
        # A rate without its schedule might run away.
        tiny = {name: 1e-6 for name in training if name.endswith("learning_rate")}
        self.optimizer = make_optimizer(model, TrainConfig(**training | tiny), self.device)

    def prepare(self) -> None:
        """Draws the next batch."""
        self.tensors, self.index = self.task.batch(self.index, 0), self.index + 1

    def work(self) -> None:
        """Trains on it."""
        output = self.task.output(self.model, self.tensors)
        loss = output if isinstance(output, torch.Tensor) else output.loss
        there(loss).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
