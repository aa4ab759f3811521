"""Independent parts of one computation on a CPU, each in a thread of its own.

Torch's operators share out every operation to all threads, and wait for the last one after each. Where a computation
falls apart into many small ones, a thread that makes some of them from end to end finds what it wrote in its own cache.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Task = TypeVar("Task")
Result = TypeVar("Result")

# Threads wait for one another where Python runs, between the operators.
MOST_PARTS = 8


def dealt(tasks: Sequence[Task], parts: int) -> list[list[Task]]:
    """Deals out tasks that cost more and more, or less and less, to and fro, so that all parts cost about as much.

    Example:
        >>> dealt([8, 7, 6, 5, 4, 3, 2, 1], 2)
        [[8, 5, 4, 1], [7, 6, 3, 2]]
    """
    order = [*range(parts), *reversed(range(parts))]
    return [[task for index, task in enumerate(tasks) if order[index % len(order)] == part] for part in range(parts)]


def most_parts() -> int:
    """Returns into how many parts work may fall: as many as threads, or one under modes, which are of one thread.

    Example:
        >>> 1 <= most_parts() <= MOST_PARTS
        True
    """
    return 1 if torch._C._len_torch_dispatch_stack() else min(torch.get_num_threads(), MOST_PARTS)


def shared_out(work: Callable[[Task], Result], parts: Sequence[Task]) -> list[Result]:
    """Returns what `work` gives for every part, without gradients; all run at once, on as many threads as torch has.

    Example:
        >>> shared_out(lambda part: sum(part), dealt([torch.ones(3), torch.zeros(3)], 2))
        [tensor([1., 1., 1.]), tensor([0., 0., 0.])]
    """
    if len(parts) < 2:
        return [work(part) for part in parts]
    threads, begun = torch.get_num_threads(), threading.Barrier(len(parts) + 1)
    is_inference = torch.is_inference_mode_enabled()

    def run(part: Task) -> Result:
        # A thread's first question makes it begin with the number that was set last anywhere, which is set back below.
        torch.get_num_threads()
        torch.set_num_threads(max(1, threads // len(parts)))
        begun.wait()
        # Modes are of one thread, and what was made in inference mode can be written to within it alone.
        with torch.inference_mode(is_inference), torch.no_grad():
            return work(part)

    with ThreadPoolExecutor(len(parts)) as pool:
        try:
            futures = [pool.submit(run, part) for part in parts]
            begun.wait()
        except BaseException:
            # Where a thread could not start, or Ctrl-C came, the others would wait for ever.
            begun.abort()
            raise
        finally:
            torch.set_num_threads(threads)
        return [future.result() for future in futures]
