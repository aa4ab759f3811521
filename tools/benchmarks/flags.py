"""The flags all benchmarks share, and their checks."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from gohgraph.common.checks import check_choice, check_int

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
SMOKE_REPEATS = 2


def add_shared_flags(parser: argparse.ArgumentParser, repeats: int) -> None:
    """Adds the flags every benchmark of tensors has; `repeats` is its default number of rounds."""
    add_round_flags(parser, repeats, threads=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="default: %(default)s")


def add_round_flags(parser: argparse.ArgumentParser, repeats: int, *, threads: int | list[int]) -> None:
    """Adds the flags of rounds and of files; `repeats` and `threads` are their defaults, of threads one or several."""
    text = f"rounds (default: {repeats}, {SMOKE_REPEATS} with --smoke)"
    parser.add_argument("--repeats", type=int, help=text)
    several = "+" if isinstance(threads, list) else None
    parser.add_argument(
        "--threads", type=int, nargs=several, default=threads, help="CPU threads (default: %(default)s)"
    )
    parser.add_argument("--smoke", action="store_true", help="a tiny size, to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the printed tables")


def check_shared_flags(flags: argparse.Namespace, repeats: int) -> None:
    """Fills in the default of `flags.repeats` and checks the shared flags.

    Raises:
        ValueError: a flag out of range, an unknown device, a file that cannot be written.
    """
    check_round_flags(flags, repeats, fewest=2)
    devices = ["cpu", "cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    devices = devices if torch.cuda.is_available() else ["cpu"]
    check_choice("--device", flags.device, devices)


def check_round_flags(flags: argparse.Namespace, repeats: int, *, fewest: int) -> None:
    """Fills in the default of `flags.repeats` and checks the flags of rounds and of files.

    Raises:
        ValueError: fewer than `fewest` rounds, no thread, a file that cannot be written.
    """
    if flags.repeats is None:
        flags.repeats = SMOKE_REPEATS if flags.smoke else repeats
    check_int("--repeats", flags.repeats, low=fewest)
    for threads in flags.threads if isinstance(flags.threads, list) else [flags.threads]:
        check_int("--threads", threads, low=1)
    for path in filter(None, (flags.json, flags.markdown)):
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ValueError(f"Expected a file that can be written (got {path}). Do choose another.")


def place(flags: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments `device` and `dtype` of `torch.randn` and `Module.to` the flags stand for."""
    return {"device": flags.device, "dtype": DTYPES[flags.dtype]}


def numbers_of(text: str, form: str, example: str) -> list[int]:
    """Returns the positive numbers of a size such as 512/8, d_model and heads first.

    Raises:
        ValueError: text of another form, or a d_model that its heads do not divide.

    Example:
        >>> numbers_of("512/8", "d_model/heads", "512/8")
        [512, 8]
    """
    numbers = [int(part) if part.isdecimal() else 0 for part in text.split("/")]
    if len(numbers) != len(form.split("/")) or min(numbers) < 1 or numbers[0] % numbers[1]:
        raise ValueError(f"Expected {form}, heads dividing d_model (got {text!r}). Do pass e.g. {example}.")
    return numbers
