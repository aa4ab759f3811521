"""Hidden states on their way from the input of an attention module to its head graphs.

Attention functions and projections are not told of them. A hook before the attention module notes them for the thread
that calls it, and one after it takes the note back, whatever happened between: nothing of a forward pass stays in a
module, and calls in several threads, inside each other or interrupted by an error do not see each other's.
"""

from __future__ import annotations

import inspect
import threading
from functools import partial
from typing import Any

from torch import Tensor, nn


class _Notes(threading.local):
    """Of every call under way in this thread: whose it is, its hidden states, and whether they were read."""

    def __init__(self) -> None:
        self.stack: list[list[Any]] = []


_NOTES = _Notes()


def read(reader: nn.Module) -> Any:
    """Returns the hidden states noted for a reader in the call under way; `None` where there are none."""
    for note in reversed(_NOTES.stack):
        if note[0] is reader:
            note[2] = True
            return note[1]
    return None


def note_for(module: nn.Module, path: str, required: bool) -> list[Any]:
    """Notes a module's first argument for the module at `path` inside it during every call; returns the hooks.

    Args:
        path: of the reader, empty for the module itself; a path, since a copy of the module must find its own.
        required: a call that ends without reading them is a `RuntimeError`.
    """
    first = partial(_note, path, _first_argument(module))
    return [
        module.register_forward_pre_hook(first, with_kwargs=True),
        module.register_forward_hook(partial(_take_back, path, required), always_call=True),
    ]


def _first_argument(module: nn.Module) -> str:
    """The name of the first argument of a module's forward."""
    names = [
        name
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    return names[0] if names else "hidden_states"


def _note(path: str, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    x = args[0] if args else kwargs.get(name, kwargs.get("hidden_states"))
    _NOTES.stack.append([module.get_submodule(path), x, False])


def _take_back(path: str, required: bool, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    reader, stack = module.get_submodule(path), _NOTES.stack
    if not any(note[0] is reader for note in stack):
        return
    # Calls inside that were interrupted have left theirs above.
    while True:
        owner, x, was_read = stack.pop()
        if owner is reader:
            break
    # Without an output the call itself has failed.
    if required and output is not None and isinstance(x, Tensor) and not was_read:
        raise RuntimeError(
            f"Expected attention that calls its head graphs (got {type(module).__name__}, which passed them by: it "
            "was changed, or wrapped, after the conversion). Do unconvert the model and convert it again."
        )
