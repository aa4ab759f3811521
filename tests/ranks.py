"""Starts the ranks of a distributed test: processes on this machine that talk over gloo."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from typing import Any
from unittest import mock

import torch

# One process imports everything once, what ranks do in the tests too, and every rank is a fork of it.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["rank_imports"])


def start(function: Callable[..., Any], *args: Any) -> BaseProcess:
    """Calls the function in a process of its own."""
    # Python 3.11's fork server does not look for modules where this process does.
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        ensure_running()
    process = _CONTEXT.Process(target=function, args=args)
    process.start()
    return process


def run_ranks(
    world: int, function: Callable[..., Any], *args: Any, timeout: float = 1000, dies: bool = False
) -> list[Any]:
    """Calls `function(rank, *args)` in `world` processes of one group; returns what each gave, in order of ranks.

    Where the last one `dies`, what the others gave.
    """
    with tempfile.TemporaryDirectory() as folder:
        pool = [_CONTEXT.Pipe(duplex=False) for _ in range(world)]
        processes = [
            start(_rank, rank, world, f"{folder}/store", sender, function, args)
            for rank, (_, sender) in enumerate(pool)
        ]
        try:
            living = pool[: world - dies]
            found = [receiver.recv() if receiver.poll(timeout) else "timed out" for receiver, _ in living]
        finally:
            for process in processes:
                process.join(5)
                if process.is_alive():
                    process.kill()
    failed = [result for result in found if isinstance(result, str)]
    assert not failed, "\n".join(failed)
    return [result[0] for result in found]


def _rank(rank: int, world: int, store: str, sender: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    try:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        sender.send((function(rank, *args),))
    except BaseException:
        sender.send(f"rank {rank} of {world}:\n{traceback.format_exc()}")
