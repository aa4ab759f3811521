"""One training run of the quality benchmark, in a process of its own, and how long its steps take."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.tasks import TASKS, Task
from benchmarks.timing import Call
from gohgraph.graphs.learned_topology import LearnedTopologyConv
from gohgraph.learning.loop import TrainConfig, train
from gohgraph.learning.optim import make_optimizer
from gohgraph.models.config import TransformerConfig

EVALUATIONS = 8


@dataclass(frozen=True)
class Trial:
    """A training run.

    Args:
        task: name of the task.
        variant: name of the preset.
        rate: learning rate.
        seed: of weights and data.
        budget: steps, as a multiple of the task's.
    """

    task: str
    variant: str
    rate: float
    seed: int
    budget: float = 1.0

    @property
    def name(self) -> str:
        """The name of its result, a file name.

        Example:
            >>> Trial("text", "plain", 0.002, 0).name, Trial("text", "plain", 0.002, 0, 1.5).name
            ('text_plain_0.002_0', 'text_plain_0.002_0_x1.5')
        """
        longer = "" if self.budget == 1 else f"_x{self.budget:g}"
        return f"{self.task}_{self.variant}_{self.rate:g}_{self.seed}{longer}"


def run_trial(
    folder: str,
    name: str,
    task: str,
    options: dict[str, Any],
    config: dict[str, Any],
    plain: dict[str, Any],
    rate: float,
    seed: int,
    steps: int,
    graph_lr_factor: float,
) -> list[dict[str, Any]]:
    """Trains one model on one thread and returns its log; an interrupted run goes on from its checkpoint.

    Args:
        folder: of all run folders.
        name: of this run.
        task, options: name and fields of the task.
        config: of the model, as a dictionary.
        plain: of plain attention, whose first weights all variants share.
        rate, seed, steps: of the training.
        graph_lr_factor: learning rate of the head graphs, as a multiple of `rate`.
    """
    torch.set_num_threads(1)
    own, path = TASKS[task](**options), Path(folder) / name
    model = first_model(own, TransformerConfig.from_dict(config), TransformerConfig.from_dict(plain), seed)
    every = max(1, steps // EVALUATIONS)
    learns_topology = any(isinstance(module, LearnedTopologyConv) for module in model.modules())
    log = train(
        model,
        partial(own.batch, seed=seed),
        own.output,
        TrainConfig(
            steps=steps,
            learning_rate=rate,
            graph_lr_factor=graph_lr_factor,
            warmup=steps // 20,
            anneal_in_degree=steps // 2 if learns_topology else 0,
            eval_every=every,
            checkpoint_every=every,
            keep_checkpoints=1,
            log_every=every,
            seed=seed,
            device="cpu",
        ),
        path,
        evaluate=own.evaluate,
        resume=(path / "config.json").exists(),
        settings={"model": config},
        description=name,
    )
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
    """One training step of a variant, to be timed: forward, backward, clipping and optimizer."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__(torch.device("cpu"))
        self.task, self.model, self.index = task, model.train(), 0
        self.optimizer = make_optimizer(model, TrainConfig(steps=1, learning_rate=1e-4), self.device)

    def prepare(self) -> None:
        """Draws the next batch."""
        self.tensors, self.index = self.task.batch(self.index, 0), self.index + 1

    def work(self) -> None:
        """Trains on it."""
        output = self.task.output(self.model, self.tensors)
        loss = output if isinstance(output, torch.Tensor) else output.loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
