"""What defines a training run, beside its model and its data."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from gohgraph.common.checks import check_choice, check_int, check_number, check_probability, check_weight

PRECISIONS = ("no", "bf16", "fp16")
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "inverse-sqrt", "warmdown")
DEVICES = (None, "cpu", "cuda", "mps", "xpu")
# What the defaults were before the recipe of today, and a run trained with that was started before these settings were.
BEFORE = {"optimizer": "adamw", "schedule": "cosine", "min_lr_ratio": 0.1, "graph_lr_factor": 1.0}
# They change when something is written or where it is computed, not what is learned: a resumed run may change them.
FREE_ON_RESUME = ("device", "compile", "eval_every", "log_every", "checkpoint_every", "keep_checkpoints")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of the training loop: an optimizer under a warm-up and a decay.

    Args:
        steps: optimizer steps.
        learning_rate: of AdamW, its highest value, after the warm-up.
        optimizer: `"adamw"`, or `"muon"`: Muon for the matrices inside layers and AdamW for everything else, see
            `gohgraph.learning.optim`.
        matrix_learning_rate: of Muon, its highest value.
        warmup: steps of linear rise, fewer than `steps`.
        schedule: what follows the warm-up: `"cosine"`, `"warmdown"` (constant, then linear), or `"inverse-sqrt"` of
            Vaswani et al. 2017, which needs a warm-up.
        warmdown: share of the steps after the warm-up in which `"warmdown"` falls, in (0, 1].
        min_lr_ratio: share of the learning rate at which cosine and warmdown end, in [0, 1].
        weight_decay: of matrices; vectors and head graphs have none.
        betas: of AdamW, each in [0, 1).
        grad_clip: largest gradient norm, `None` for no limit.
        graph_lr_factor: learning rate of head graphs, as a multiple of AdamW's. A quarter is what text and translation
            chose beside Muon, see docs/experiments.md; models trained by AdamW alone took 1.
        graph_matrix_lr_factor: learning rate of the matrices of head graphs, which make edges of tokens, as a multiple
            of Muon's, which trains them then, too: with one seed better for an element gate and worse
            for edges, see docs/experiments.md. `None` leaves them to AdamW.
        anneal_top_k: steps over which every router's k falls linearly, rounded, from all its routed heads to its own
            budget, fewer than `steps`; 0 for that budget at once. Under `compile`, every k is compiled anew.
        anneal_in_degree: steps over which learned topologies lose their weakest edges, until every head has its budget
            of them, fewer than `steps`; 0 keeps all edges.
        patience: evaluations in a row without a new lowest validation_loss after which training stops early; `None`
            never stops it. The model is left as it was then; the schedule is that of all `steps`.
        accumulate: batches whose gradients make one step.
        eval_every, log_every, checkpoint_every: steps between evaluations, log rows and checkpoints.
        keep_checkpoints: how many of the last checkpoints are kept.
        seed: of dropout; dropout of a step depends on (seed, step, process) only.
        precision: `"no"` (float32), `"bf16"` or `"fp16"` (mixed).
        compile: runs the model under `torch.compile`.
        device: `None` for the accelerator when there is one, or `"cpu"`, `"cuda"`, `"mps"`, `"xpu"`.

    Example:
        >>> TrainConfig(steps=100, warmup=10).learning_rate
        0.001
    """

    steps: int
    learning_rate: float = 1e-3
    optimizer: str = "muon"
    matrix_learning_rate: float = 0.02
    warmup: int = 0
    schedule: str = "cosine"
    warmdown: float = 0.65
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float | None = 1.0
    graph_lr_factor: float = 0.25
    graph_matrix_lr_factor: float | None = None
    anneal_top_k: int = 0
    anneal_in_degree: int = 0
    patience: int | None = None
    accumulate: int = 1
    eval_every: int = 100
    log_every: int = 10
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    seed: int = 0
    precision: str = "no"
    compile: bool = False
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "eval_every", "log_every", "checkpoint_every", "keep_checkpoints"):
            check_int(name, getattr(self, name), low=1)
        for name in ("warmup", "anneal_top_k", "anneal_in_degree", "seed"):
            check_int(name, getattr(self, name), low=0)
        if self.patience is not None:
            check_int("patience", self.patience, low=1)
        for name in ("learning_rate", "matrix_learning_rate", "warmdown"):
            check_number(name, getattr(self, name), above=0)
        for name in ("min_lr_ratio", "warmdown"):
            check_probability(name, getattr(self, name))
        check_weight("weight_decay", self.weight_decay)
        check_weight("graph_lr_factor", self.graph_lr_factor)
        if self.graph_matrix_lr_factor is not None:
            check_number("graph_matrix_lr_factor", self.graph_matrix_lr_factor, above=0)
            if self.optimizer != "muon":
                raise ValueError(
                    f"Expected optimizer 'muon' with graph_matrix_lr_factor, which is of its rate (got "
                    f"{self.optimizer!r}). Do leave one of them out."
                )
        if self.grad_clip is not None:
            check_number("grad_clip", self.grad_clip, above=0)
        for name in ("warmup", "anneal_top_k", "anneal_in_degree"):
            if getattr(self, name) >= self.steps:
                raise ValueError(
                    f"Expected {name} below steps = {self.steps} (got {getattr(self, name)}). Do shorten it."
                )
        betas = tuple(self.betas) if isinstance(self.betas, (tuple, list)) else ()
        if len(betas) != 2 or not all(isinstance(beta, (int, float)) and 0 <= beta < 1 for beta in betas):
            raise ValueError(f"Expected two betas in [0, 1) (got {self.betas!r}). Do pass e.g. (0.9, 0.95).")
        object.__setattr__(self, "betas", betas)
        if self.schedule == "inverse-sqrt" and not self.warmup:
            raise ValueError("Expected a warmup for schedule 'inverse-sqrt' (got 0). Do pass its steps.")
        choices_of = {"precision": PRECISIONS, "device": DEVICES, "compile": (True, False), "schedule": SCHEDULES}
        choices_of["optimizer"] = OPTIMIZERS
        for name, choices in choices_of.items():
            check_choice(name, getattr(self, name), choices)

    def to_dict(self) -> dict[str, Any]:
        """Returns a dictionary of plain JSON values."""
        return {**dataclasses.asdict(self), "betas": list(self.betas)}

    def learning_rate_factor(self, step: int) -> float:
        r"""The schedule: linear warm-up, then a cosine or a line down to `min_lr_ratio`, or the inverse square root.

        .. math:: f(s) = (s + 1) / W \quad (s < W), \qquad f(s) = m + (1 - m) (1 + \cos(\pi p)) / 2, \quad
            p = (s - W) / (S - W)

        or, with a warmdown over the share d, f(s) = m + (1 - m) min(1, (1 - p) / d), or f(s) = sqrt(W / (s + 1)),
        equation 3 of Vaswani et al. 2017 (arXiv 1706.03762), whose highest value there is (d_model W)^-0.5; here
        `learning_rate` says it.

        Args:
            step: number of steps done, 0 at the first one.

        Example:
            >>> config = TrainConfig(steps=110, warmup=10, min_lr_ratio=0.0)
            >>> [round(config.learning_rate_factor(step), 2) for step in (0, 9, 10, 60, 110)]
            [0.1, 1.0, 1.0, 0.5, 0.0]
            >>> config = TrainConfig(steps=110, warmup=10, schedule="inverse-sqrt")
            >>> [round(config.learning_rate_factor(step), 2) for step in (0, 9, 39, 109)]
            [0.1, 1.0, 0.5, 0.3]
            >>> config = TrainConfig(steps=110, warmup=10, schedule="warmdown", warmdown=0.5, min_lr_ratio=0.0)
            >>> [round(config.learning_rate_factor(step), 2) for step in (0, 9, 60, 85, 110)]
            [0.1, 1.0, 1.0, 0.5, 0.0]
        """
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "inverse-sqrt":
            return math.sqrt(self.warmup / (step + 1))
        progress = min(1.0, (step - self.warmup) / (self.steps - self.warmup))
        left = (1 + math.cos(math.pi * progress)) / 2
        if self.schedule == "warmdown":
            left = min(1.0, (1 - progress) / self.warmdown)
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * left
