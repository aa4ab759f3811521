"""Which call of a module in a forward pass it is: models may use one module as several layers (ALBERT)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


class Passes:
    """The forward passes of some modules: a new one begins where none of them is under way.

    Attributes:
        number: passes so far.
    """

    def __init__(self) -> None:
        self.number = 0
        self._under_way: list[nn.Module] = []

    @contextmanager
    def following(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Follows the calls of these modules while the block runs."""
        with ExitStack() as hooks:
            for module in modules:
                hooks.enter_context(module.register_forward_pre_hook(self._enter))
                hooks.enter_context(module.register_forward_hook(self._leave, always_call=True))
            yield

    def counter(self) -> Counter:
        """Returns a counter of calls, which begins anew with every pass."""
        return Counter(self)

    @property
    def is_under_way(self) -> bool:
        """Whether a pass is under way."""
        return bool(self._under_way)

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        self.number += not self._under_way
        self._under_way.append(module)

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        # What was interrupted inside has not left.
        while any(one is module for one in self._under_way):
            if self._under_way.pop() is module:
                break


class Counter:
    """Counts calls within a pass; outside of any, every call is the first."""

    def __init__(self, passes: Passes) -> None:
        self._passes, self._pass, self._calls = passes, 0, 0

    def next(self) -> int:
        """Returns the index of this call."""
        if not self._passes.is_under_way or self._pass != self._passes.number:
            self._pass, self._calls = self._passes.number, 0
        self._calls += 1
        return self._calls - 1

