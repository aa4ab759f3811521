"""Checks of one value each, which name what they refuse: `TypeError` for its type, `ValueError` for the value."""

import math
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch.torch_version import TorchVersion

Value = TypeVar("Value")


def check_int(name: str, value: Any, *, low: int | None = None, high: int | None = None) -> None:
    """Refuses what is not an int in `low..high`; True and False are no ints here.

    Args:
        name: what the message calls the value.
        value: to check.
        low, high: the lowest and the highest int allowed; `None` for no bound.

    Example:
        >>> check_int("rounds", 0, low=1)
        Traceback (most recent call last):
        ValueError: Expected rounds to be an int >= 1 (got 0). Do raise it.
    """
    expected = f"Expected {name} to be an int{_bounds(low, high)} (got {value!r})."
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{expected} Do pass a whole number.")
    if low is not None and value < low:
        raise ValueError(f"{expected} Do raise it.")
    if high is not None and value > high:
        raise ValueError(f"{expected} Do lower it.")


def check_number(
    name: str, value: Any, *, low: float | None = None, high: float | None = None, above: float | None = None,
    below: float | None = None,
) -> None:  # fmt: skip
    """Refuses what is not a finite int or float within the bounds; True and False are no numbers here.

    Args:
        name: what the message calls the value.
        value: to check.
        low, high: the lowest and the highest number allowed; `None` for no bound.
        above, below: instead of these, where the bound itself is refused.

    Example:
        >>> check_number("dropout", 1.0, low=0, below=1)
        Traceback (most recent call last):
        ValueError: Expected dropout to be a finite number >= 0 and < 1 (got 1.0). Do lower it.
    """
    bounds = {">=": low, ">": above, "<=": high, "<": below}
    allowed = " and ".join(f"{sign} {bound}" for sign, bound in bounds.items() if bound is not None)
    expected = f"Expected {name} to be a finite number{allowed and ' '}{allowed} (got {value!r})."
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{expected} Do pass a number.")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{expected} Do pass a finite one.")
    if (low is not None and value < low) or (above is not None and value <= above):
        raise ValueError(f"{expected} Do raise it.")
    if (high is not None and value > high) or (below is not None and value >= below):
        raise ValueError(f"{expected} Do lower it.")


def check_weight(name: str, value: Any) -> None:
    """Refuses what is not a finite number >= 0, such as the weight of a term in a loss; see `check_number`."""
    check_number(name, value, low=0)


def check_probability(name: str, value: Any) -> None:
    """Refuses what is not a number in [0, 1]; see `check_number`."""
    check_number(name, value, low=0, high=1)


def check_bool(name: str, value: Any) -> None:
    """Refuses what is neither True nor False, with a `TypeError`."""
    if not isinstance(value, bool):
        raise TypeError(f"Expected {name} to be True or False (got {value!r}). Do pass a bool.")


def needed(name: str, value: Value | None) -> Value:
    """Returns a value that a caller may leave out but that is read here; `None` is refused with a `ValueError`.

    Example:
        >>> needed("context", None)
        Traceback (most recent call last):
        ValueError: Expected a context (got None). Do pass it, this module reads it.
    """
    if value is None:
        raise ValueError(f"Expected a {name} (got None). Do pass it, this module reads it.")
    return value


def there(value: Value | None) -> Value:
    """Returns a value that a check before has made sure of, where types cannot tell.

    Example:
        >>> there({"heads": 8}.get("heads"))
        8
    """
    assert value is not None
    return value


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Refuses what is none of the choices, with a `ValueError`.

    Example:
        >>> check_choice("norm", "batch", ("layer", "rms"))
        Traceback (most recent call last):
        ValueError: Expected norm of ['layer', 'rms'] (got 'batch'). Do choose one of them.
    """
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"Expected {name} of {choices} (got {value!r}). Do choose one of them.")


def _bounds(low: int | None, high: int | None) -> str:
    if low is not None and high is not None:
        return f" in {low}..{high}"
    return f" >= {low}" if low is not None else f" <= {high}" if high is not None else ""


def check_torch(oldest: str, purpose: str, otherwise: str) -> None:
    """Refuses a torch that is older than what a part of the library needs.

    Args:
        oldest: the version that it needs.
        purpose: of the part, as "to compile steps".
        otherwise: what can be done without it.

    Raises:
        ValueError: torch is older.

    Example:
        >>> check_torch("99.0", "to predict", "guess")
        Traceback (most recent call last):
        ValueError: Expected torch 99.0 or newer to predict (got ...). Do upgrade it, or guess.
    """
    if TorchVersion(torch.__version__) < oldest:
        raise ValueError(
            f"Expected torch {oldest} or newer {purpose} (got {torch.__version__}). Do upgrade it, or {otherwise}."
        )
