"""The training loop of the library, on Hugging Face accelerate (`pip install 'gohgraph[train]'`).

`train` runs one model, `train_together` several in turns; `Training` is the run itself, step by step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from gohgraph.learning.interrupts import TrainingInterrupted, interrupts
from gohgraph.learning.tracking import Tracker
from gohgraph.learning.train_config import TrainConfig
from gohgraph.learning.training import Loss, Row, Training
from gohgraph.parallel.layout import ParallelConfig

__all__ = ["TrainConfig", "Training", "TrainingInterrupted", "train", "train_together"]


def train(
    model: nn.Module,
    batch: Callable[[int], Any],
    loss: Loss,
    config: TrainConfig,
    folder: str | os.PathLike[str],
    *,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    resume: bool = False,
    on_evaluate: Callable[[Row], None] | None = None,
    tracker: Tracker | None = None,
    settings: dict[str, Any] | None = None,
    description: str = "",
    parallel: ParallelConfig | None = None,
) -> list[Row]:
    """Trains a model and leaves a run folder: config.json, log.csv, curves.png and checkpoints.

    Ctrl-C finishes the step and writes a checkpoint; the same call with `resume=True` then continues with the losses
    an uninterrupted run would have had.

    Args:
        model: trained in place; ends on the device it was trained on.
        batch: tensors of a micro-batch, a pure function of its number: the step, unless gradients are accumulated or
            several processes train; then they count on, each process taking its own.
        loss: of `(model, tensors)`; it calls the model it is given, which may be compiled or distributed. Returns a
            scalar tensor, or an output with that as `.loss` and, as `.routing`, the `Routing` of every router in the
            order of `routers(model)`, such as `ModelOutput`. Routers with a balance bias need the latter.
        config: everything else about the training.
        folder: the run folder, made if missing; one that already holds a run is refused unless it is resumed.
        evaluate: measures the model in eval mode without gradients, e.g. `{"validation_loss": 1.23}`.
        resume: continues from the last checkpoint of the folder.
        on_evaluate: called with the row of every evaluation, in the main process.
        tracker: called with the numbers of every row of the log and its step, in the main process: `wandb.log`,
            `mlflow.log_metrics`, a `gohgraph.learning.tracking.TensorBoard`, or any function.
        settings: more of what defines the run, as JSON values by section, e.g. `{"model": config.to_dict()}`: stored in
            config.json and compared on resume.
        description: name of the run in the progress bar and in curves.png.
        parallel: how the processes that `torchrun` has started share the work; `None` for DDP where there are several.

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
    training = Training(
        model, batch, loss, config, folder, evaluate=evaluate, resume=resume, on_evaluate=on_evaluate,
        tracker=tracker, settings=settings, description=description, parallel=parallel,
    )  # fmt: skip
    return train_together([training], block=config.steps)[0]


def train_together(trainings: Sequence[Training], block: int = 25, *, may_diverge: bool = False) -> list[list[Row]]:
    """Trains several models in turns of `block` steps, so that their step times are measured side by side.

    Args:
        trainings: with distinct run folders.
        block: steps of a turn.
        may_diverge: a run whose loss is no longer finite ends there, with `has_diverged` set, and the others go on.

    Returns:
        The log of each.

    Raises:
        FloatingPointError: a loss is no longer finite, unless it may be.
        TrainingInterrupted: after Ctrl-C; all have written a checkpoint then.
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
