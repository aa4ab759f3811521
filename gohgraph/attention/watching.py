"""Who watches the calls of attention: analysis that asks what every head attends to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from gohgraph.attention.call import Call

_WATCHER: ContextVar[Callable[[Call], None] | None] = ContextVar("gohgraph_attention_watcher", default=None)


@contextmanager
def watching(watcher: Callable[[Call], None]) -> Iterator[None]:
    """Shows `watcher` every `Call` of this thread before it is computed, while the block runs.

    Example:
        >>> from gohgraph.attention.call import Call
        >>> from gohgraph.attention.forms import attend
        >>> seen, q = [], torch.randn(2, 7, 5, 4)
        >>> with watching(seen.append):
        ...     _ = attend(Call(q, q, q))
        >>> len(seen)
        1
    """
    token = _WATCHER.set(watcher)
    try:
        yield
    finally:
        _WATCHER.reset(token)


def show(call: Call) -> None:
    """Shows a call to who watches; nobody does under `torch.compile`."""
    if not torch.compiler.is_compiling() and (watcher := _WATCHER.get()) is not None:
        watcher(call)


def nobody(call: Call) -> None:
    """The watcher of what is computed beside the model's own pass: see `is_beside`."""


def is_beside() -> bool:
    """Whether what runs in this thread is no part of the model's own pass, and not to be recorded."""
    return _WATCHER.get() is nobody
