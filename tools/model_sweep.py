"""Converts a small model of every class of transformers and writes what came of it as a table.

    python tools/model_sweep.py --rows runs/model_sweep.jsonl --table docs/models.md

Every class runs in a process of its own, one after the other, with a limit of its CPU time; Ctrl-C leaves the rows so
far, and the same command goes on with the others. Causality, caches and loading are checked of models whose edges are
far from their start, where the stock model passes the same check itself ("-": it does not, or has no such thing).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from sweeping.checks import check
from sweeping.small_models import KINDS, classes
from sweeping.table import SILENT, table
from tqdm import tqdm

from gohgraph.common.files import write_text_whole


def main(arguments: list[str] | None = None) -> None:
    """Runs the classes that have no row yet and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, default=Path("runs/model_sweep.jsonl"), help="a line for every class")
    parser.add_argument("--table", type=Path, help="the table, in Markdown")
    parser.add_argument("--only", nargs="+", help="class names")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seconds", type=int, default=90, help="limit for one class, in seconds of CPU time")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = _read(options.rows)
    chosen = [(kind, name) for kind, _, name in classes() if kind in options.kinds]
    if options.only:
        chosen = [(kind, name) for kind, name in chosen if name in options.only]
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    # What all classes import is imported once, before the processes fork.
    check("causal", "LlamaForCausalLM")
    with open(options.rows, "a", encoding="utf-8") as file:
        for kind, name in tqdm([one for one in chosen if one[1] not in rows], unit="class", disable=None):
            rows[name] = _in_process(kind, name, options.seconds)
            file.write(json.dumps(rows[name]) + "\n")
            file.flush()
    if options.table:
        write_text_whole(options.table, table([rows[name] for _, name in chosen if name in rows]))
    bad = [row for row in rows.values() if row["status"] in SILENT]
    print(f"{len(rows)} classes, {len(bad)} silent differences")
    sys.exit(bool(bad))


def _read(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {row["class"]: row for row in rows}


def _in_process(kind: str, name: str, seconds: int) -> dict[str, Any]:
    # A fork has torch and transformers imported; what it leaks or breaks ends with it.
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs, kind, name, seconds), daemon=True)
    process.start()
    theirs.close()
    row = {"kind": kind, "class": name, "status": "not built", "reason": f"no result in {seconds:g} s"}
    try:
        # A process that waits for something uses no time: it has some more on the clock.
        if mine.poll(20 * seconds):
            row = mine.recv()
    except EOFError:
        process.join()
        if process.exitcode != -signal.SIGXCPU:
            row["reason"] = "its process ended without a result"
    process.kill()
    process.join()
    return row


def _send(pipe: Any, kind: str, name: str, seconds: int) -> None:
    import logging
    import resource
    import warnings

    # Of the process alone, however busy the machine is.
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    pipe.send(check(kind, name))


if __name__ == "__main__":
    main()
