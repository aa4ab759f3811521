"""What the command lines share: one sentence for bad input, and exit codes."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

BAD_INPUT, INTERRUPTED = 2, 130
# Wrong values, a loss that runs away, and a package that is not installed.
REFUSALS = (ValueError, TypeError, FloatingPointError, ImportError)


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser for `run`: flags that do not parse raise `ValueError`, without the usage text."""

    def error(self, message: str) -> NoReturn:
        """Raises `ValueError` for a flag that does not parse."""
        raise ValueError(f"Expected other flags (got: {message}). Do see {self.prog} --help.")


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
