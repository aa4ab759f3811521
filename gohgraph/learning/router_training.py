"""Training of routers: annealed budgets, balance biases, and statistics of the heads' load."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gohgraph.attention.head_load import load_cv, load_entropy
from gohgraph.attention.routing import Routing, routers, share_statistics
from gohgraph.common.checks import there

COLUMNS = ("balance_loss", "z_loss", "load_cv", "load_entropy", "router_entropy")


class RouterTraining:
    """What a training step does with the routers of a model; nothing where it has none.

    A step calls `begin`, `observe` after every micro-batch, and `end` after the optimizer; `row` makes the columns of
    the log out of the steps since it was called last.

    Args:
        model: its routers are trained; not yet wrapped or compiled.
        anneal_top_k: steps over which k falls from all routed heads to each router's own budget; 0 for the budget at
            once. A model without routers has nothing to anneal.
        process_group: ranks whose tokens count together, `None` for this one alone.

    Attributes:
        pending: the values of `COLUMNS` of every step since the last row; a checkpoint keeps them.
    """

    def __init__(self, model: nn.Module, anneal_top_k: int = 0, process_group: Any = None) -> None:
        self.model, self.anneal_top_k, self.process_group = model, anneal_top_k, process_group
        self.routers = routers(model)
        if anneal_top_k and not self.routers:
            kind = type(model).__name__
            raise ValueError(
                f"Expected routers for anneal_top_k = {anneal_top_k} (got a {kind} without). Do set it to 0."
            )
        self.budgets = [router.top_k for router in self.routers]
        self.pending: list[list[float]] = []
        # Of the micro-batches of this step, and of the steps not yet read from the device.
        self._loads: list[list[Tensor]] = []
        self._scalars: list[Tensor] = []
        self._new: list[Tensor] = []

    def begin(self, step: int) -> bool:
        """Prepares the routers for a step; returns whether a k has changed."""
        if self.process_group is not None:
            share_statistics(self.model, self.process_group)
        changed = False
        for router, budget in zip(self.routers, self.budgets, strict=True):
            k = annealed_top_k(step, self.anneal_top_k, router.num_routed, budget)
            changed |= k != router.top_k
            router.top_k = k
        return changed

    def observe(self, routing: Sequence[Routing]) -> None:
        """Takes in the decisions of all routers for one micro-batch; none where the loss does not tell them."""
        has_bias = any(router.balance_bias is not None for router in self.routers)
        if len(routing) != len(self.routers) and (routing or has_bias):
            raise ValueError(
                f"Expected the routing of each of {len(self.routers)} routers (got {len(routing)}). Do let loss return "
                "the model's whole output."
            )
        if routing:
            told = [(there(r.balance_loss).detach(), there(r.z_loss).detach(), there(r.entropy)) for r in routing]
            scalars = [torch.stack(of_router) for of_router in told]
            self._loads.append([there(decision.load) for decision in routing])
            self._scalars.append(torch.stack(scalars).mean(dim=0))

    def end(self) -> None:
        """Moves the balance biases by the load of the whole step and notes its statistics."""
        if not self._loads:
            return
        evenness = []
        for router, *parts in zip(self.routers, *self._loads, strict=True):
            load = torch.stack(parts).mean(dim=0)  # [H]
            if router.balance_bias is not None:
                router.update_balance_bias(load)
            evenness.append(torch.stack((load_cv(load, router.num_shared), load_entropy(load, router.num_shared))))
        balance, z, entropy = torch.stack(self._scalars).mean(dim=0)
        self._new.append(torch.stack((balance, z, *torch.stack(evenness).mean(dim=0), entropy)))
        self._loads, self._scalars = [], []

    def read(self) -> None:
        """Reads the statistics of the steps done from the device into `pending`."""
        if self._new:
            self.pending += torch.stack(self._new).tolist()
            self._new = []

    def row(self) -> dict[str, float]:
        """Returns the columns of the log, means over the steps since the row before; none for an unrouted model."""
        steps, self.pending = self.pending, []
        return {name: sum(values) / len(steps) for name, values in zip(COLUMNS, zip(*steps, strict=True), strict=False)}

    def close(self) -> None:
        """Gives the routers their budgets back, and their statistics to this process alone."""
        for router, budget in zip(self.routers, self.budgets, strict=True):
            router.top_k = budget
        if self.process_group is not None:
            share_statistics(self.model, None)


def annealed_top_k(step: int, steps: int, num_routed: int, budget: int) -> int:
    """Returns k after `step` of `steps` steps in which it falls linearly from `num_routed` to `budget`, rounded.

    MoH (arXiv 2410.11842) starts with the budget; starting with all heads lets every head learn before some are left
    out.

    Example:
        >>> [annealed_top_k(step, 4, num_routed=6, budget=2) for step in range(6)]
        [6, 5, 4, 3, 2, 2]
    """
    if step >= steps:
        return budget
    # In whole numbers, halves up: the same on every machine, and every k between takes equally many steps.
    return budget + (2 * (num_routed - budget) * (steps - step) + steps) // (2 * steps)
