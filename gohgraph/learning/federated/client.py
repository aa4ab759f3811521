"""One client: trains on its own text, shares a part of its model and keeps the rest."""

import hashlib
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from gohgraph.common.checks import there
from gohgraph.common.files import write_whole
from gohgraph.learning.accelerator import device_kind
from gohgraph.learning.federated.sharing import Sharing, load_state
from gohgraph.learning.optim import make_optimizer
from gohgraph.learning.train_config import TrainConfig
from gohgraph.learning.training import Loss

# What a TrainConfig of a client must leave alone: it has no meaning in rounds, or is not done here.
_UNUSED = ("patience", "anneal_top_k", "anneal_in_degree", "accumulate", "precision", "compile")


class Client:
    r"""Trains a model in rounds, as FedAvg's clients do (McMahan et al. 2017, arXiv 1602.05629, algorithm 1).

    .. math:: w^k_{r+1} = \text{train}_S(w_r, \phi^k_r; D_k)

    In round r it takes the shared weights w_r, makes S steps on its own data, together with its personal weights phi^k,
    and gives back what became of the shared ones. train_S are S steps of the configured optimizer, which begins anew in
    every round, as the weights do; data and dropout of a step depend on its number alone, so that a round can be
    repeated.

    Args:
        model: trained in place.
        sharing: which of its weights travel.
        batch: tensors of a batch, a pure function of the step, which counts on over rounds.
        loss: of `(model, tensors)`, a scalar or an output with `.loss`, as in `train`.
        config: `steps` are those of all rounds together, and the schedule runs over them.
        rounds: in which they are made; divides the steps.
        num_examples: n_k, the weight of this client in averages.
        evaluate: measures the model in eval mode without gradients, e.g. `{"validation_loss": 1.23}`.
        folder: where personal weights are kept between rounds; needed where there are some.

    Example:
        >>> model, data = nn.Linear(3, 1), torch.randn(20, 8, 3)
        >>> client = Client(
        ...     model, Sharing(shared=("base",)), lambda step: data[step],
        ...     lambda model, x: (model(x) - x.sum(-1, keepdim=True)).square().mean(), TrainConfig(steps=20), rounds=4,
        ...     num_examples=160)
        >>> update, metrics = client.fit({"weight": torch.zeros(1, 3), "bias": torch.zeros(1)}, round=1)
        >>> list(update), client.local_steps, sorted(metrics)
        (['weight', 'bias'], 5, ['loss'])
    """

    def __init__(
        self,
        model: nn.Module,
        sharing: Sharing,
        batch: Callable[[int], Any],
        loss: Loss,
        config: TrainConfig,
        *,
        rounds: int,
        num_examples: int,
        evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        if rounds < 1 or config.steps % rounds:
            raise ValueError(f"Expected steps that divide into {rounds} rounds (got {config.steps}). Do change either.")
        usual = TrainConfig(steps=1)
        unused = [name for name in _UNUSED if getattr(config, name) != getattr(usual, name)]
        if unused or num_examples < 1:
            raise ValueError(
                f"Expected examples, and nothing that clients do not do (got {num_examples} and {unused}). Do drop it."
            )
        sharing.prepare(model)
        if sharing.personal and folder is None:
            raise ValueError(f"Expected a folder for the personal {sharing.personal} (got folder=None). Do pass one.")
        self.model, self.sharing, self.batch, self.loss, self.config = model, sharing, batch, loss, config
        self.local_steps, self.num_examples, self.evaluate = config.steps // rounds, num_examples, evaluate
        self.folder = None if folder is None else Path(folder)
        self.device = torch.device(device_kind(config.device))
        model.to(self.device)
        # What every round without personal weights of an earlier one begins with.
        self._start = {name: tensor.clone() for name, tensor in sharing.personal_state(model).items()}

    def fit(self, shared: Mapping[str, Tensor], round: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Trains one round, counted from 1, on the weights of all by name.

        Returns what became of them, on the CPU, and the mean loss. Weights of another model are a `ValueError`; with a
        `FloatingPointError`, for a loss that is not finite, personal weights are left as they were.
        """
        self._load(shared, before=round)
        total, first = 0.0, (round - 1) * self.local_steps
        optimizer = make_optimizer(self.model, self.config, self.device)
        schedule = LambdaLR(optimizer, lambda step: self.config.learning_rate_factor(first + step))
        self.model.train()
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            for step in range(first, first + self.local_steps):
                total += self._step(step, optimizer)
                schedule.step()
        if not math.isfinite(total):
            raise FloatingPointError(
                f"Expected a finite loss (got {total} in round {round}). Do lower the learning rate."
            )
        if self.sharing.personal:
            _save(there(self.folder), round, self.sharing.personal_state(self.model))
        update = {name: tensor.cpu().clone() for name, tensor in self.sharing.shared_state(self.model).items()}
        return update, {"loss": total / self.local_steps}

    def measure(self, shared: Mapping[str, Tensor], round: int) -> dict[str, float]:
        """Evaluates shared weights together with the personal ones after `round`; 0 is before all training."""
        self._load(shared, before=round + 1)
        self.model.eval()
        with torch.no_grad():
            return {} if self.evaluate is None else self.evaluate(self.model)

    def _step(self, step: int, optimizer: torch.optim.Optimizer) -> float:
        digest = hashlib.blake2b(f"{self.config.seed}:{step}".encode(), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(digest, "little") >> 1)
        tensors = self.batch(step)
        is_single = isinstance(tensors, Tensor)
        tensors = tensors.to(self.device) if is_single else [tensor.to(self.device) for tensor in tensors]
        output = self.loss(self.model, tensors)
        loss = output if isinstance(output, Tensor) else output.loss
        optimizer.zero_grad()
        loss.backward()
        if self.config.grad_clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        optimizer.step()
        return loss.item()

    def _load(self, shared: Mapping[str, Tensor], *, before: int) -> None:
        load_state(self.sharing.shared_state(self.model), shared)
        if self.sharing.personal:
            load_state(self.sharing.personal_state(self.model), _last(there(self.folder), before) or self._start)


def _save(folder: Path, round: int, state: Mapping[str, Tensor]) -> None:
    """Writes the personal weights after a round; the round before is kept, for this one may be repeated."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    path = folder / f"round-{round:06d}.safetensors"
    write_whole(path, lambda pending: save_file(tensors, pending), flush=True)
    files = _files(folder)
    earlier = sorted(number for number in files if number < round)[:-1]
    for number in [*earlier, *(number for number in files if number > round)]:
        files[number].unlink()


def _last(folder: Path, before: int) -> dict[str, Tensor] | None:
    """Returns the personal weights after the last round before a given one."""
    files = {number: path for number, path in _files(folder).items() if number < before}
    return load_file(files[max(files)]) if files else None


def _files(folder: Path) -> dict[int, Path]:
    return {int(path.stem.split("-")[1]): path for path in folder.glob("round-*.safetensors")}
