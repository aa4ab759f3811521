"""One run of the training loop, step by step.

Everything random in a step, data and dropout, is a function of (seed, step): a resumed run repeats the uninterrupted
one, and runs that take turns do not disturb each other.
"""

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gohgraph.common.checks import there
from gohgraph.drawing import draw_curves
from gohgraph.learning.engine import make_engine
from gohgraph.learning.router_training import RouterTraining
from gohgraph.learning.run_folder import CHECKPOINTS, CURVES, STATE, RunFolder
from gohgraph.learning.topology_training import TopologyTraining
from gohgraph.learning.tracking import Tracker, track
from gohgraph.learning.train_config import TrainConfig
from gohgraph.parallel.layout import ParallelConfig

Row = dict[str, Any]
# What a model is trained on: a scalar tensor, or an output with `.loss` and `.routing`.
Loss = Callable[[nn.Module, Any], Any]


class Training:
    """A run in progress; give several to `train_together`.

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
        settings: further values that define the run, as JSON by section, e.g. `{"model": config.to_dict()}`: stored in
            config.json and compared on resume.
        description: name of the run in the progress bar and in curves.png.
        parallel: how the processes that `torchrun` has started share the work; `None` for DDP where there are several.

    Attributes:
        step: steps done.
        seconds: time spent in steps, evaluations and checkpoints not counted.
        has_diverged: whether the loss is no longer finite, which ends the run.
        folder: the `RunFolder`, whose `rows` are the log.
    """

    def __init__(
        self, model: nn.Module, batch: Callable[[int], Any], loss: Loss, config: TrainConfig,
        folder: str | os.PathLike[str], *, evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
        resume: bool = False, on_evaluate: Callable[[Row], None] | None = None, tracker: Tracker | None = None,
        settings: dict[str, Any] | None = None, description: str = "", parallel: ParallelConfig | None = None,
    ) -> None:  # fmt: skip
        self.batch, self.loss, self.config, self.description = batch, loss, config, description
        self.evaluate, self.on_evaluate, self.tracker = evaluate, on_evaluate, tracker
        self.engine = make_engine(config, model, parallel)
        self.accelerator = self.engine.accelerator
        self.routing = RouterTraining(model, config.anneal_top_k, self.engine.data_group())
        self.topology = TopologyTraining(model, config.anneal_in_degree)
        self.folder = RunFolder(folder, {"training": config.to_dict(), **(settings or {})})
        if self.accelerator.is_main_process:
            self.folder.open(resume=resume)
        self.accelerator.wait_for_everyone()
        self.model, self.optimizer, self.schedule = self.engine.prepare(model)
        self.callable: nn.Module = cast(nn.Module, torch.compile(self.model)) if config.compile else self.model
        self.step, self.seconds, self.has_diverged = 0, 0.0, False
        # Losses since the last row of the log: on the device, and read from it.
        self._new: list[Tensor] = []
        self._losses: list[float] = []
        # Of all evaluations so far, for early stopping.
        self._validation_losses: list[float] = []
        if resume:
            self._load()
        self._tokens, self._row_seconds = 0, self.seconds
        self.model.train()
        # Passed only to switch it off: a value given here would hide TQDM_DISABLE.
        silent = {} if self.accelerator.is_main_process else {"disable": True}
        # A terminal is redrawn often; a log file should not fill with bars.
        self.bar = tqdm(
            total=config.steps, initial=self.step, desc=description or None, unit="step", dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 15, **silent,
        )  # fmt: skip

    @property
    def is_done(self) -> bool:
        """Whether all steps are done, or training has stopped early or diverged."""
        losses, patience = self._validation_losses, self.config.patience
        stopped = patience is not None and len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])
        return self.step >= self.config.steps or stopped or self.has_diverged

    def advance(self, target: int, interrupted: Callable[[], bool] = lambda: False) -> bool:
        """Trains up to step `target` or to the last one; returns True when it was interrupted."""
        target = min(target, self.config.steps)
        while self.step < target and not self.is_done:
            began = time.perf_counter()
            self._train_step()
            due = self._is_due(self.config.log_every) or self._is_due(self.config.eval_every)
            if due or self.step == target:
                self._read_losses()
            self.seconds += time.perf_counter() - began
            self.bar.update()
            if due:
                self._log()
            if self._is_due(self.config.checkpoint_every) or self.is_done:
                self.save()
            if self._agree(interrupted()):
                return True
        return False

    def save(self) -> None:
        """Writes a checkpoint; a crash meanwhile leaves the ones before it."""
        self._read_losses()
        if self.accelerator.is_main_process:
            self.folder.pending_checkpoint()
        self.accelerator.wait_for_everyone()
        self.engine.save(self.folder.path / CHECKPOINTS / ".new")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            state = {"seconds": self.seconds, "losses": self._losses, "routing": self.routing.pending}
            state["validation_losses"] = self._validation_losses
            self.folder.commit_checkpoint(self.step, state, keep=self.config.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Ends the progress bar, draws curves.png, gives routers their budgets and takes off accelerate's wrapping."""
        self.bar.close()
        self.routing.close()
        if self.accelerator.is_main_process and self.folder.rows:
            draw_curves({self.description or self.folder.path.name: self.folder.rows}, self.folder.path / CURVES)
        self.engine.release()

    def gather(self) -> None:
        """Makes `model` the whole trained model, on the first rank; all ranks call it when training is done."""
        self.model = self.engine.whole()

    def _train_step(self) -> None:
        accelerator, config = self.accelerator, self.config
        seed = f"{config.seed}:{self.step}:{self.engine.data_rank}"
        torch.manual_seed(int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=8).digest(), "little") >> 1)
        if self.routing.begin(self.step) and config.compile:
            # Each k is another graph, and torch gives up compiling after a few of the same code.
            torch.compiler.reset()
        self.topology.begin(self.step)
        total: Tensor | None = None
        for number in range(config.accumulate):
            tensors = self._batch(number)
            last = number + 1 == config.accumulate
            with nullcontext() if last else self.engine.no_sync():
                with accelerator.autocast():
                    output = self.loss(self.callable, tensors)
                loss = (output if isinstance(output, Tensor) else output.loss) / config.accumulate
                accelerator.backward(loss)
            self.routing.observe(() if isinstance(output, Tensor) else output.routing)
            total = loss.detach() if total is None else total + loss.detach()
        if config.grad_clip is not None:
            self.engine.clip(config.grad_clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.routing.end()
        self._new.append(there(total))
        self.step += 1

    def _batch(self, number: int) -> Any:
        from accelerate.utils import send_to_device

        processes = self.engine.data_ranks
        index = (self.step * self.config.accumulate + number) * processes + self.engine.data_rank
        tensors = self.batch(index)
        first = tensors if isinstance(tensors, Tensor) else next(iter(tensors))
        # Token ids count one by one; of anything else, its examples do.
        self._tokens += processes * (len(first) if first.is_floating_point() else first.numel())
        return send_to_device(tensors, self.accelerator.device)

    def _read_losses(self) -> None:
        if not self._new:
            return
        losses = self.accelerator.reduce(torch.stack(self._new).float(), "mean").tolist()
        if self.accelerator.device.type != "cpu":
            torch.accelerator.synchronize()
        for step, value in enumerate(losses, start=self.step - len(losses) + 1):
            if not math.isfinite(value):
                self.has_diverged = True
                raise FloatingPointError(
                    f"Expected a finite loss (got {value} at step {step}). Do lower the learning rate."
                )
        self._losses += losses
        self._new = []
        self.routing.read()

    def _log(self) -> None:
        rate = self._tokens / max(self.seconds - self._row_seconds, 1e-9)
        row = {"step": self.step, "loss": sum(self._losses) / len(self._losses), "validation_loss": None}
        row["lr"] = self.config.learning_rate * self.config.learning_rate_factor(self.step - 1)
        row |= {"tokens_per_second": round(rate, 1), "seconds": round(self.seconds, 6)}
        routing = self.routing.row()
        row |= routing
        balance = f", load CV {routing['load_cv']:.2f}" if routing else ""
        self.bar.set_postfix_str(f"loss {row['loss']:.4f}{balance}, {rate:,.0f} tokens/s", refresh=False)
        self._losses, self._tokens, self._row_seconds = [], 0, self.seconds
        evaluated = self.evaluate is not None and self._is_due(self.config.eval_every)
        if evaluated:
            row |= self._measure()
        if not self.accelerator.is_main_process:
            return
        self.folder.log(row)
        track(self.tracker, row)
        if evaluated and self.on_evaluate is not None:
            self.on_evaluate(row)

    def _measure(self) -> dict[str, float]:
        model = self.engine.unwrapped()
        model.eval()
        with torch.no_grad():
            measured = there(self.evaluate)(model)
        model.train()
        if "validation_loss" in measured:
            self._validation_losses.append(measured["validation_loss"])
        return measured

    def _load(self) -> None:
        checkpoints = self.folder.checkpoints()
        if checkpoints:
            self.engine.check(checkpoints[-1])
            try:
                state = json.loads((checkpoints[-1] / STATE).read_text(encoding="utf-8"))
                self.engine.load(checkpoints[-1])
                self.step, self.seconds, self._losses = state["step"], state["seconds"], state["losses"]
                self.routing.pending = state["routing"]
                self._validation_losses = state.get("validation_losses", [])
            # Pickle, zip, safetensors, JSON and torch each have errors of their own for a damaged file.
            except Exception as error:
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                raise ValueError(
                    f"Expected a whole checkpoint (got {checkpoints[-1]}, which is damaged: {reason}). "
                    "Do delete that folder, to resume from the checkpoint before it."
                ) from error
        if self.accelerator.is_main_process:
            self.folder.read_log(until=self.step)

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.steps

    def _agree(self, interrupted: bool) -> bool:
        """All processes stop at the same step, or they would wait for each other for ever."""
        if self.accelerator.num_processes == 1:
            return interrupted
        if interrupted:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()
