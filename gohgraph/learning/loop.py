"""The training loop of the library, on Hugging Face accelerate (`pip install 'gohgraph[train]'`).

`train` runs one model, `train_together` several in turns; `Training` is the run itself, step by step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from gohgraph.learning.interrupts import TrainingInterrupted, interrupts
from gohgraph.learning.train_config import TrainConfig
from gohgraph.learning.training import Loss, Row, Training

__all__ = ["TrainConfig", "Training", "TrainingInterrupted", "train", "train_together"]


def train(
    model: nn.Module, batch: Callable[[int], Any], loss: Loss, config: TrainConfig, folder: str | os.PathLike[str],
    **options: Any,
) -> list[Row]:  # fmt: skip
    """Trains a model and leaves a run folder: config.json, log.csv, curves.png and checkpoints.

    Ctrl-C finishes the step and writes a checkpoint; the same call with `resume=True` then continues with the losses
    an uninterrupted run would have had.

    Args:
        model, batch, loss, config, folder: of `Training`.
        **options: also of `Training`: evaluate, resume, on_evaluate, tracker, settings, description, parallel.

    Returns:
        The log, one row per `log_every` steps and per evaluation: step, loss (mean since the row before, in nats where
        it is a cross entropy), validation_loss or None, lr, tokens_per_second, seconds (of training alone), and
        whatever else `evaluate` returns. Where `loss` returns a routing, also means over the same steps and over
        layers: balance_loss, z_loss, load_cv and load_entropy (see `gohgraph.attention.head_load`; of the load of each
        step), and router_entropy (of a token's scores, in nats).

    Raises:
        ImportError: accelerate is not installed.
        ValueError: an impossible device or precision, a folder in use, another configuration, a damaged checkpoint.
        OSError: the folder cannot be written.
        FloatingPointError: the loss is no longer finite.
        TrainingInterrupted: after Ctrl-C.

    Example:
        >>> import tempfile, torch
        >>> model, data = nn.Linear(3, 1), torch.randn(50, 8, 3)
        >>> rows = train(
        ...     model, lambda step: data[step], lambda model, x: (model(x) - x.sum(-1, keepdim=True)).square().mean(),
        ...     TrainConfig(steps=50, learning_rate=0.1), tempfile.mkdtemp() + "/run")
        >>> rows[-1]["step"], rows[-1]["loss"] < rows[0]["loss"]
        (50, True)
    """
    return train_together([Training(model, batch, loss, config, folder, **options)], block=config.steps)[0]


def train_together(trainings: Sequence[Training], block: int = 25, *, may_diverge: bool = False) -> list[list[Row]]:
    """Trains several models in turns of `block` steps, so that their step times are measured side by side.

    Args:
        trainings: with distinct run folders.
        block: steps of a turn.
        may_diverge: a run whose loss is no longer finite ends there, with `has_diverged` set, and the others go on.

    Returns the log of each. After Ctrl-C all write a checkpoint before `TrainingInterrupted` is raised.
    """
    try:
        with interrupts() as interrupted:
            while unfinished := [training for training in trainings if not training.is_done]:
                target = (min(training.step for training in unfinished) // block + 1) * block
                for training in unfinished:
                    try:
                        is_interrupted = training.advance(target, interrupted.is_set)
                    except FloatingPointError:
                        if not may_diverge:
                            raise
                        continue
                    if is_interrupted:
                        _stop(trainings)
        for training in trainings:
            training.gather()
    finally:
        for training in trainings:
            training.close()
    return [training.folder.rows for training in trainings]


def _stop(trainings: Sequence[Training]) -> None:
    for training in trainings:
        if not training.has_diverged:
            training.save()
    raise TrainingInterrupted(f"stopped at step {max(training.step for training in trainings)}")
