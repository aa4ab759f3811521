"""Continual learning: tasks one after another, with what keeps a model from forgetting, and the measures of it.

A `Learner` says what is trained on a task, on which batches and with which loss; `learn_in_sequence` takes it through
all tasks with the one training loop and returns the loss on every task after every task.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gohgraph.common.checks import there
from gohgraph.learning.data.corpus import Corpus, evaluation_batches, sample_batch
from gohgraph.learning.loop import TrainConfig, train
from gohgraph.learning.regimes.adapters import TaskAdapters
from gohgraph.learning.regimes.language import next_token_output, window_losses
from gohgraph.models.model_output import ModelOutput


@dataclasses.dataclass(frozen=True)
class Windows:
    """How texts are read.

    Args:
        batch_size: windows in a batch, B.
        length: bytes of a window, T.
        limit: the most windows that are measured of a text.
        seed: names the order of the data.
    """

    batch_size: int
    length: int
    limit: int = 64
    seed: int = 0


class Learner:
    """Fine-tuning: all trainable parameters learn every task in turn. The other learners change a part of it.

    Args:
        model: a `LanguageModel` of bytes, trained in place.
        tasks: the texts, in the order in which they are learned.
        windows: how they are read.
    """

    def __init__(self, model: nn.Module, tasks: Sequence[Corpus], windows: Windows) -> None:
        self.model, self.tasks, self.windows = model, tasks, windows

    def batch(self, task: int, index: int) -> Any:
        """Returns the tensors of a micro-batch of a task, a pure function of both numbers and the seed."""
        text, windows = self.tasks[task].train, self.windows
        return sample_batch(text, index, batch_size=windows.batch_size, length=windows.length, seed=windows.seed)

    def loss(self, model: nn.Module, batch: Any) -> ModelOutput:
        """Returns the model's output with what is minimised."""
        return next_token_output(model, batch)

    def end(self, task: int) -> None:
        """Called when a task has been learned; must give the same result each time, for resumed runs repeat it."""

    def measure(self, task: int) -> Tensor:
        """Returns the validation loss of every window of a task `[windows]`, in nats per byte."""
        return self._measure(self.model, self.tasks[task].validation)

    def _measure(self, model: nn.Module, text: Tensor) -> Tensor:
        windows = self.windows
        was_training = model.training
        model.eval()
        losses = window_losses(model, text, batch_size=16, length=windows.length, limit=windows.limit)
        model.train(was_training)
        return losses


class Replay(Learner):
    """Rehearsal (Robins 1995; Rolnick et al. 2019, arXiv 1811.11682): a part of each batch is from earlier tasks.

    Args:
        model, tasks, windows: as in `Learner`.
        memory: bytes kept of each earlier text, its first ones.
        share: of a batch that is replayed, in (0, 1); at least one window, and at least one is new.
    """

    def __init__(
        self, model: nn.Module, tasks: Sequence[Corpus], windows: Windows, *, memory: int = 50_000, share: float = 0.5
    ) -> None:
        super().__init__(model, tasks, windows)
        if not 0 < share < 1 or windows.batch_size < 2:
            raise ValueError(f"Expected a share in (0, 1) of 2 windows or more (got {share}). Do change either.")
        self.memory, self.share = memory, share

    def batch(self, task: int, index: int) -> Any:
        """Returns windows of the task and, from the second on, of the kept texts of the tasks before, in turns."""
        new = super().batch(task, index)
        if task == 0:
            return new
        size = self.windows.batch_size
        count = min(size - 1, max(1, round(size * self.share)))
        memory = self.tasks[index % task].train[: self.memory]
        # Of another seed: a text that is kept whole would else repeat the windows of its own training.
        seed = self.windows.seed + 1_000_003
        old = sample_batch(memory, index, batch_size=count, length=self.windows.length, seed=seed)
        return tuple(torch.cat((a[: size - count], b)) for a, b in zip(new, old, strict=True))


class ElasticWeights(Learner):
    r"""Elastic weight consolidation, EWC (Kirkpatrick et al. 2017, arXiv 1612.00796, equation 3).

    .. math:: L(\theta) = L_k(\theta) + \frac{\lambda}{2} \sum_{j<k} \sum_i F_{j,i} (\theta_i - \theta^*_{j,i})^2

    theta*_j are the weights after task j, and F_j the diagonal of the empirical Fisher information there: the mean over
    windows of the squared gradient of a window's loss, which here is a mean over its tokens.

    Args:
        model, tasks, windows: as in `Learner`.
        strength: lambda >= 0.
        samples: windows that F is estimated on.
    """

    def __init__(
        self, model: nn.Module, tasks: Sequence[Corpus], windows: Windows, *, strength: float, samples: int = 64
    ) -> None:
        super().__init__(model, tasks, windows)
        if not strength >= 0 or samples < 1:
            raise ValueError(f"Expected strength >= 0 and samples >= 1 (got {strength}, {samples}). Do raise them.")
        self.strength, self.samples = strength, samples
        self.anchors: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    def loss(self, model: nn.Module, batch: Any) -> ModelOutput:
        """Returns the output with the penalty added to its loss."""
        output = super().loss(model, batch)
        return output._replace(loss=there(output.loss) + self.penalty()) if self.anchors else output

    def penalty(self) -> Tensor:
        """Returns the penalty of the weights as they are, a scalar."""
        terms = [
            (fisher[name] * (parameter - before[name]).square()).sum()
            for before, fisher in self.anchors
            for name, parameter in self._trained()
        ]
        return self.strength / 2 * torch.stack(terms).sum()

    def end(self, task: int) -> None:
        """Keeps the weights and their Fisher information."""
        fisher = {name: torch.zeros_like(parameter) for name, parameter in self._trained()}
        text, length = self.tasks[task].train, self.windows.length
        device = next(self.model.parameters()).device
        self.model.eval()
        batches = list(evaluation_batches(text, batch_size=1, length=length, limit=self.samples))
        for inputs, targets in batches:
            loss = self.model(inputs.to(device), targets=targets.to(device)).loss
            gradients = torch.autograd.grad(loss, [parameter for _, parameter in self._trained()])
            for information, gradient in zip(fisher.values(), gradients, strict=True):
                information += gradient.square() / len(batches)
        self.model.train()
        self.anchors.append(({name: parameter.detach().clone() for name, parameter in self._trained()}, fisher))

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]


class PerTask(Learner):
    """Each task learns its own adapter over shared, frozen heads: none can forget.

    Args:
        model: a `TaskAdapters` with as many tasks.
        tasks, windows: as in `Learner`.
    """

    model: TaskAdapters

    def batch(self, task: int, index: int) -> Any:
        """Returns windows of the task and its number."""
        return (*super().batch(task, index), task)

    def loss(self, model: nn.Module, batch: Any) -> ModelOutput:
        """Returns the output under the adapter of the batch's task."""
        inputs, targets, task = batch
        return model(inputs, targets=targets, task=task)

    def measure(self, task: int) -> Tensor:
        """Returns the validation loss of every window of a task under its own adapter `[windows]`."""
        return self._measure(self.model.for_task(task), self.tasks[task].validation)

    def measure_inferred(self, task: int, *, prefix: int) -> tuple[Tensor, float]:
        """Measures a task whose number is not told, but inferred from the first bytes of every window.

        The adapter is chosen by the first `prefix` bytes of a window, at least 2. Returns the loss of every window
        `[windows]` under it, and the share of windows for which it was the task's own.
        """
        windows = self.windows
        self.model.eval()
        data = self.tasks[task].validation
        batches = evaluation_batches(data, batch_size=16, length=windows.length, limit=windows.limit)
        device = next(self.model.parameters()).device
        chosen = torch.cat([self.model.infer_task(inputs[:, :prefix].to(device)).cpu() for inputs, _ in batches])
        each = [self._measure(self.model.for_task(number), data) for number in range(len(self.tasks))]
        losses = torch.stack(each).gather(0, chosen.unsqueeze(0)).squeeze(0)  # [windows]
        self.model.train()
        return losses, (chosen == task).double().mean().item()


def _measured(learner: Learner, task: int, model: nn.Module) -> dict[str, float]:
    return {"validation_loss": learner.measure(task).mean().item()}


def learn_in_sequence(
    learner: Learner, config: TrainConfig, folder: str | os.PathLike[str], *, resume: bool = False,
    settings: dict[str, Any] | None = None, on_task: Callable[[int, Tensor], None] | None = None,
) -> Tensor:  # fmt: skip
    """Learns all tasks one after another and measures all of them after each.

    Args:
        learner: what is trained, and how.
        config: the training of one task.
        folder: holds one run folder for each task, `task-0`, ...
        resume: goes on where an interrupted call stopped; tasks already learned are read from their checkpoints.
        settings: as in `train`.
        on_task: called with the number of each task learned and the losses after it `[K]`.

    Returns:
        Validation losses `[K, K]` in nats per byte: after task i (row), on task j (column).
    """
    rows = []
    for task, text in enumerate(learner.tasks):
        path = Path(folder) / f"task-{task}"
        train(
            learner.model, partial(learner.batch, task), learner.loss, config, path,
            evaluate=partial(_measured, learner, task),
            resume=resume and (path / "config.json").exists(), settings={**(settings or {}), "task": text.name},
            description=f"{Path(folder).name}: {text.name}",
        )  # fmt: skip
        learner.end(task)
        rows.append(torch.stack([learner.measure(other).mean() for other in range(len(learner.tasks))]))
        if on_task is not None:
            on_task(task, rows[-1])
    return torch.stack(rows)


def average_loss(losses: Tensor) -> float:
    """Returns the mean loss over all tasks after the last one, of losses `[K, K]` as `learn_in_sequence` returns.

    Example:
        >>> average_loss(torch.tensor([[1.0, 9.0], [2.0, 3.0]]))
        2.5
    """
    return losses[-1].mean().item()


def backward_transfer(losses: Tensor) -> float:
    r"""Returns how much later tasks helped earlier ones (Lopez-Paz and Ranzato 2017, arXiv 1706.08840, equation 3).

    .. math:: BWT = \frac{1}{K - 1} \sum_{j<K} (L_{j,j} - L_{K,j})

    For losses, so that positive is better, as theirs is for accuracies; 0 where nothing was forgotten or gained.

    Example:
        >>> backward_transfer(torch.tensor([[1.0, 9.0], [2.0, 3.0]]))
        -1.0
    """
    return (losses.diagonal() - losses[-1])[:-1].mean().item()


def forgetting(losses: Tensor) -> float:
    r"""Returns how far earlier tasks are from their best (Chaudhry et al. 2018, arXiv 1801.10112, equation 3).

    .. math:: F = \frac{1}{K - 1} \sum_{j<K} \big(L_{K,j} - \min_{i<K} L_{i,j}\big)

    For losses, so that 0 is the best where nothing improves later, and negative where it does. The best may be that
    before task j was learned: a task that learning made worse counts as well.

    Example:
        >>> forgetting(torch.tensor([[1.0, 9.0], [2.0, 3.0]]))
        1.0
    """
    return (losses[-1] - losses[:-1].amin(dim=0))[:-1].mean().item()
