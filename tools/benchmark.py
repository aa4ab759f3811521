"""Measures head graphs against plain attention and prints Markdown tables.

    python tools/benchmark.py --sizes 512/8/512/2 --repeats 30 --only output score-ring2 --markdown benchmark.md
    python tools/benchmark.py routing --sizes 512/8 --contexts 512 8192
    python tools/benchmark.py kernels --sizes 8/64 32/128 --capability 80
    python tools/benchmark.py convert --kinds "forward and backward" decode --threads 1
    python tools/benchmark.py generate --threads 1
    python tools/benchmark.py rows --threads 1 2
    python tools/benchmark.py operators --only length --sizes 0
    python tools/benchmark.py limits --threads 1 2
    python tools/benchmark.py attribution --sizes 12/12/768 --opponent --threads 1
    python tools/benchmark.py page
    python tools/benchmark.py quality --tasks text two-cues --variants plain element-gate outputs

The first argument names what is measured, `speed` without one; each is a module of `benchmarks`, which says
how it measures.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from types import ModuleType

import torch
from benchmarks import (
    attribution,
    convert,
    counts,
    generate,
    kernels,
    laws,
    limits,
    memory,
    operators,
    page,
    quality,
    recipe,
    routing,
    rows,
    scaling,
    speed,
    thresholds,
)
from benchmarks.timing import machine
from tqdm import tqdm

from gohgraph.common.checks import there
from gohgraph.common.command_line import ArgumentParser, run
from gohgraph.common.files import write_text_whole

COMMANDS = {
    "speed": speed,
    "memory": memory,
    "scaling": scaling,
    "thresholds": thresholds,
    "routing": routing,
    "quality": quality,
    "laws": laws,
    "recipe": recipe,
    "convert": convert,
    "generate": generate,
    "limits": limits,
    "rows": rows,
    "operators": operators,
    "counts": counts,
    "attribution": attribution,
    "page": page,
    "kernels": kernels,
}
DEFAULT = "speed"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    # Or the profiler writes lines of its own between the tables.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    argv = sys.argv[1:] if argv is None else list(argv)
    name, argv = (argv[0], argv[1:]) if argv and argv[0] in COMMANDS else (DEFAULT, argv)
    threads = torch.get_num_threads()
    gc.disable()
    try:
        return run(_parser(name), partial(benchmark, COMMANDS[name]), argv)
    finally:
        gc.enable()
        torch.set_num_threads(threads)


def benchmark(command: ModuleType, flags: argparse.Namespace) -> None:
    """Measures and prints the tables."""
    if hasattr(command, "run"):
        command.run(flags)
        return
    cases = command.cases(flags)
    several = flags.threads if isinstance(flags.threads, list) else [flags.threads]
    torch.set_num_threads(several[0])
    threads = " and ".join(map(str, several))
    texts, rows = [machine(flags.device, flags.dtype, threads, flags.repeats)], []
    print(texts[0])
    with tqdm(total=sum(command.calls(case, flags) for case in cases), unit="call") as progress:
        for case in cases:
            found = command.measure(case, flags, progress)
            shown = command.tables(found)
            progress.write("\n" + "\n\n".join(shown))
            texts += shown
            rows += found
            gc.collect()
    if flags.json:
        write_text_whole(flags.json, json.dumps({"machine": texts[0], "rows": rows}, indent=2) + "\n")
    if flags.markdown:
        write_text_whole(flags.markdown, "\n\n".join(texts) + "\n")


def _parser(name: str) -> ArgumentParser:
    command, own = COMMANDS[name], "benchmark.py" if name == DEFAULT else f"benchmark.py {name}"
    formatter = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser(prog=own, description=_about(command), formatter_class=formatter)
    command.add_flags(parser)
    if name == DEFAULT:
        others = [other for other in COMMANDS if other != DEFAULT]
        parser.epilog = "other benchmarks:\n" + "\n".join(map(_summary, others))
    return parser


def _summary(name: str) -> str:
    return f"{_about(COMMANDS[name])}\n{_parser(name).format_usage()}"


def _about(command: ModuleType) -> str:
    return there(inspect.getdoc(command)).splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
