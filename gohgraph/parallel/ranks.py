"""The processes of a job that `torchrun` starts: their group, what the first decides, and when one is lost."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
from torch import distributed

Value = TypeVar("Value")
# What gloo and NCCL say when a process at the other end is gone or does not answer.
LOST = ("gloo", "Connection closed", "Connection reset", "Broken pipe", "NCCL", "Timed out", "timeout")


def world_size() -> int:
    """Processes that `torchrun` has started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def under_torchrun() -> bool:
    """Whether `torchrun` has started this process, perhaps as the only one."""
    return "WORLD_SIZE" in os.environ


def machines() -> int:
    """Machines that the processes run on, as `torchrun` tells."""
    return max(1, world_size() // int(os.environ.get("LOCAL_WORLD_SIZE", world_size())))


@contextmanager
def process_group(device: str | None = None) -> Iterator[None]:
    """Joins the processes of `torchrun`, and leaves them at the end; does nothing without it.

    Args:
        device: `"cpu"` talks over gloo; `None` takes the accelerator where there is one.
    """
    if not under_torchrun() or distributed.is_initialized():
        yield
        return
    current = torch.accelerator.current_accelerator(check_available=True)
    chosen = current if device is None else torch.device(device)
    on_cpu = chosen is None or chosen.type == "cpu"
    if not on_cpu:
        torch.get_device_module(chosen).set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group("gloo" if on_cpu else None)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def on_first_rank(decide: Callable[[], Value]) -> Value:
    """Calls `decide` on the first rank and returns its value, or raises its error, on all of them.

    Example:
        >>> on_first_rank(lambda: 7)
        7
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return decide()
    outcome: list[tuple[Value | None, Exception | None]] = [(None, None)]
    if distributed.get_rank() == 0:
        try:
            outcome = [(decide(), None)]
        except Exception as error:
            outcome = [(None, error)]
    distributed.broadcast_object_list(outcome, src=0)
    value, refusal = outcome[0]
    if refusal is not None:
        raise refusal
    return cast(Value, value)


class _Terminated(BaseException):
    """`torchrun` has asked this process to end."""


@contextmanager
def lost_ranks(remedy: str) -> Iterator[None]:
    """Makes it an error of one sentence, with what to do, that another process of the job has ended.

    The others see a lost connection, or SIGTERM from `torchrun`, whichever is first. Does nothing for a process alone.
    The remedy completes "Do ...".
    """
    if not under_torchrun():
        yield
        return
    try:
        with _terminated():
            yield
    except (_Terminated, RuntimeError) as error:
        lines = str(error).strip().splitlines()
        if isinstance(error, _Terminated):
            lines = ["torchrun has sent SIGTERM"]
        elif not any(sign in str(error) for sign in LOST):
            raise
        raise ValueError(
            f"Expected all {world_size()} ranks to go on (got one that has ended or does not answer: "
            f"{lines[0][:200]}). Do {remedy}."
        ) from error


@contextmanager
def _terminated() -> Iterator[None]:
    # Python gives signals to the main thread only, and refuses handlers elsewhere.
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: object) -> None:
        raise _Terminated

    previous = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
