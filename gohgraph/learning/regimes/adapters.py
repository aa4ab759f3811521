"""Small adapters over shared heads: every task owns copies of some modules of a model."""

import copy
from collections.abc import Collection
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gohgraph.common.checks import check_int
from gohgraph.graphs.protocol import SiteGraph
from gohgraph.learning.regimes.low_rank import LowRankUpdate

# What a task may own: its head graphs, its low-rank updates, or both.
ADAPTERS = (SiteGraph, LowRankUpdate)


class TaskAdapters(nn.Module):
    r"""A model whose tasks share everything but their adapters.

    .. math:: f_k(x) = f(x;\; \theta_{shared},\, \phi_k)

    Task k runs the shared model with its own parameters phi_k in place of the model's: those of every module of the
    given types, and of the modules named. An adapter begins as a copy of the model's own module, so where that is
    neutral, every task begins as the shared model, bit for bit.

    Args:
        model: the shared model; its own copies of what tasks own are kept as the pattern and not trained.
        num_tasks: K >= 1.
        types: of the modules that every task owns.
        names: further modules that every task owns, by their name in the model, e.g. a read-out `"head"`.
        frozen: does not train what is shared.

    Example:
        >>> import gohgraph as goh
        >>> config = goh.TransformerConfig(7, d_model=6, num_heads=3, d_ff=5, head_graph=goh.HeadGraphConfig())
        >>> adapters = TaskAdapters(goh.LanguageModel(config), num_tasks=2)
        >>> adapters(torch.tensor([[1, 2]]), task=1).logits.shape
        torch.Size([1, 2, 7])
    """

    def __init__(
        self,
        model: nn.Module,
        num_tasks: int,
        *,
        types: tuple[type[nn.Module], ...] = ADAPTERS,
        names: Collection[str] = (),
        frozen: bool = True,
    ) -> None:
        super().__init__()
        check_int("num_tasks", num_tasks, low=1)
        modules = dict(model.named_modules())
        unknown = sorted(set(names) - set(modules))
        owned: list[str] = []
        for name, module in modules.items():
            # What is inside a module that tasks own is theirs already, such as the graphs of a chain.
            if (isinstance(module, types) or name in names) and not name.startswith(tuple(f"{one}." for one in owned)):
                owned.append(name)
        if unknown or not owned:
            raise ValueError(
                f"Expected modules that tasks can own (got none of {unknown or [one.__name__ for one in types]}). "
                "Do give the model a head graph or low-rank updates."
            )
        self.model, self.num_tasks = model, num_tasks
        pattern = [parameter for name in owned for parameter in modules[name].parameters()]
        _check_not_shared(model, owned, pattern)
        copies = {name.replace(".", "/"): modules[name] for name in owned}
        self.tasks = nn.ModuleList(
            nn.ModuleDict({key: copy.deepcopy(module) for key, module in copies.items()}) for _ in range(num_tasks)
        )
        for parameter in model.parameters():
            parameter.requires_grad_(not frozen)
        for parameter in pattern:
            parameter.requires_grad_(False)

    def forward(self, *inputs: Any, task: int, **options: Any) -> Any:
        """Runs the shared model with the adapter of a task."""
        return functional_call(self.model, dict[str, Tensor](self.parameters_of(task)), inputs, options)

    def parameters_of(self, task: int) -> dict[str, nn.Parameter]:
        """Returns what a task owns, under the names of the shared model."""
        if not 0 <= task < self.num_tasks:
            raise ValueError(f"Expected a task of 0..{self.num_tasks - 1} (got {task}). Do pass its number.")
        return {
            f"{key.replace('/', '.')}.{name}": parameter
            for key, module in cast(nn.ModuleDict, self.tasks[task]).items()
            for name, parameter in module.named_parameters()
        }

    def for_task(self, task: int) -> nn.Module:
        """Returns a view of one task, which is called as the shared model is."""
        return _ForTask(self, task)

    def size(self) -> int:
        """Returns how many parameters a task owns."""
        return sum(parameter.numel() for parameter in self.parameters_of(0).values())

    @torch.no_grad()
    def infer_task(self, tokens: Tensor) -> Tensor:
        """Returns the task of each token sequence `[B, T]`, T >= 2: the one under which it is most likely, `[B]`.

        For models that are called as a `LanguageModel`; a uniform prior over tasks.
        """
        losses = []
        for task in range(self.num_tasks):
            logits = self(tokens[:, :-1], task=task).logits.float().transpose(1, 2)  # [B, V, T-1]
            losses.append(nn.functional.cross_entropy(logits, tokens[:, 1:], reduction="none").mean(dim=1))  # [B]
        return torch.stack(losses).argmin(dim=0)


class _ForTask(nn.Module):
    def __init__(self, adapters: TaskAdapters, task: int) -> None:
        super().__init__()
        self.adapters, self.task = adapters, task
        self.training = adapters.training

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.adapters(*inputs, task=self.task, **options)


def _check_not_shared(model: nn.Module, owned: list[str], pattern: list[nn.Parameter]) -> None:
    """A parameter under another name too, such as a tied embedding, would be replaced under one name only."""
    inside = tuple(f"{name}." for name in owned)
    parameters = model.named_parameters(remove_duplicate=False)
    outside = {id(parameter) for name, parameter in parameters if not name.startswith(inside)}
    if any(id(parameter) in outside for parameter in pattern):
        raise ValueError("Expected modules with parameters of their own (got tied ones). Do untie them.")
