"""What the command lines share: one sentence for bad input, and exit codes."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

BAD_INPUT, INTERRUPTED = 2, 130
# Wrong values, a loss that runs away, and a package that is not installed.
REFUSALS = (ValueError, TypeError, FloatingPointError, ImportError)


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser for `run`: flags that do not parse raise `ValueError`, without the usage text.

    Example:
        >>> parser = ArgumentParser(prog="heads")
        >>> _ = parser.add_argument("--threshold")
        >>> parser.parse_args(["--treshold", "1"])
        Traceback (most recent call last):
        ValueError: Expected other flags (got --treshold 1; the nearest is --threshold). Do see heads --help.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses all: an unknown flag is named here, by the parser, perhaps of a subcommand, that knows the others."""
        found, others = super().parse_known_args(args, namespace)
        # What a subcommand had left over has been refused there.
        if others:
            raise ValueError(f"Expected other flags (got {self._named(others)}). Do see {self.prog} --help.")
        return found, others

    def error(self, message: str) -> NoReturn:
        """Raises `ValueError` for a flag that does not parse."""
        raise ValueError(f"Expected other flags (got: {message}). Do see {self.prog} --help.")

    def _named(self, others: Sequence[str]) -> str:
        flag = next((word for word in others if word.startswith("-")), "").split("=")[0]
        nearest = get_close_matches(flag, self._option_string_actions, 1)
        return " ".join(others) + (f"; the nearest is {nearest[0]}" if nearest else "")


def given_flags(parser: argparse.ArgumentParser, argv: Sequence[str]) -> set[str]:
    """Returns the names of the flags that a command line gives, those with their default's value too.

    Example:
        >>> parser = ArgumentParser()
        >>> _ = parser.add_argument("--steps", type=int, default=500), parser.add_argument("--seed", default=0)
        >>> given_flags(parser, ["--steps", "500"])
        {'steps'}
    """
    missing = object()
    names = vars(parser.parse_args(argv))
    found = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, missing)))
    return {name for name, value in vars(found).items() if value is not missing}


def fill_in(flags: argparse.Namespace, values: Mapping[str, Any]) -> None:
    """Gives flags that have no value theirs, such as the sizes of a full run, or those of `--smoke`.

    Example:
        >>> flags = argparse.Namespace(steps=None, seed=3)
        >>> fill_in(flags, {"steps": 500, "seed": 0})
        >>> flags
        Namespace(steps=500, seed=3)
    """
    for name, value in values.items():
        if getattr(flags, name) is None:
            setattr(flags, name, value)


def run(
    parser: argparse.ArgumentParser, command: Callable[[argparse.Namespace], None], argv: Sequence[str] | None = None
) -> int:
    """Parses `argv`, calls `command(flags)` and returns the exit code: 0, 2 for bad input, 130 after Ctrl-C.

    Bad input is an `OSError`, or one of `REFUSALS` whose message begins with "Expected": it is printed as one line
    without a traceback, and the code is 2. Any other exception is a fault of the program and is raised.

    Example:
        >>> run(ArgumentParser(), lambda flags: None, [])
        0
    """
    try:
        command(parser.parse_args(argv))
    except (OSError, *REFUSALS) as error:
        if not isinstance(error, OSError) and not str(error).startswith("Expected"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0
