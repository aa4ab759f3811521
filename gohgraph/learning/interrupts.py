"""Ctrl-C, or an orderly end from outside, that lets the running step finish."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class TrainingInterrupted(KeyboardInterrupt):
    """Raised after Ctrl-C or SIGTERM, once every run has written a checkpoint it can be resumed from."""


@contextmanager
def interrupts() -> Iterator[threading.Event]:
    """Yields an event that the first Ctrl-C sets; a second one raises `KeyboardInterrupt` at once.

    SIGTERM, by which `kill`, `timeout` and schedulers ask for an end, sets it too, and never does more.

    Example:
        >>> with interrupts() as interrupted:
        ...     signal.raise_signal(signal.SIGINT)
        ...     interrupted.is_set()
        True
    """
    interrupted = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupted.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        interrupted.set()

    # Python gives signals to the main thread only, and refuses handlers elsewhere.
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupted
    finally:
        for number, handler in previous.items():
            # None: a handler that Python did not set, and cannot set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
