"""How benchmarks measure: interleaved rounds, ratios within a round, peak memory, and the machine they ran on."""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import torch
from tqdm import tqdm

WARM_UP = 2
Name = TypeVar("Name", bound=Hashable)


class Call:
    """One call to be measured; a subclass says what is done (`work`) and what before, untimed (`prepare`).

    Args:
        device: where the work happens; the device's work is waited for.

    Attributes:
        clock: tells the time in seconds; that of the wall, unless a subclass sets another.

    Example:
        >>> class Product(Call):
        ...     def work(self):
        ...         torch.ones(50, 50) @ torch.ones(50, 50)
        >>> call = Product(torch.device("cpu"))
        >>> call.seconds() > 0, call.peak_bytes()
        (True, 30000)
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.clock: Callable[[], float] = time.perf_counter

    def prepare(self) -> None:
        """Does what has to be done before each call and is not part of it."""

    def work(self) -> object:
        """Does what is measured."""
        raise NotImplementedError

    def __call__(self) -> None:
        """Does the work and waits for the device."""
        self.work()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self) -> float:
        """Runs once and returns the time, the device's work included."""
        self.prepare()
        start = self.clock()
        self()
        return self.clock() - start

    def peak_bytes(self) -> int:
        """Runs once and returns the peak of allocated bytes above those live before."""
        self.prepare()
        if self.device.type != "cuda":
            return cpu_peak(self)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self()
        return torch.cuda.max_memory_allocated(self.device) - before


def cpu_peak(function: Callable[[], object]) -> int:
    """Returns the most bytes the CPU allocator held for `function` at a time, from the profiler's memory events."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    return max(accumulate((event["args"]["Bytes"] for event in memory), initial=0))


def ratios(seconds: list[float], others: list[float]) -> list[float]:
    """Returns the lower quartile, median and upper quartile of the per-round ratios.

    Args:
        seconds, others: of two calls in the same rounds, at least two; a machine that slows down slows both.

    Example:
        >>> ratios([2.0, 4.0, 8.0], [1.0, 2.0, 4.0])
        [2.0, 2.0, 2.0]
    """
    per_round = [own / other for own, other in zip(seconds, others, strict=True)]
    return statistics.quantiles(per_round, n=4, method="inclusive")


def interleaved(calls: Mapping[Name, Call], repeats: int, progress: tqdm) -> dict[Name, list[float]]:
    """Returns the seconds of each call in each round; a round runs all once in an order of its own."""
    seconds: dict[Name, list[float]] = {name: [] for name in calls}
    for index in range(-WARM_UP, repeats):
        for name in random.Random(index).sample(list(calls), len(calls)):
            seconds[name].append(calls[name].seconds())
            progress.update()
    return {name: found[WARM_UP:] for name, found in seconds.items()}


def machine(device: str, dtype: str, threads: int | str, repeats: int) -> str:
    """Returns the line that says where and how the numbers were taken.

    Example:
        >>> machine("cpu", "float32", 2, 20).split(", torch")[0].endswith("2 CPU threads")
        True
    """
    name = platform.processor() or platform.machine()
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        found = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = found[0].partition(":")[2].strip() if found else name
    malloc = "".join(f", {name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_"))
    return f"{name}, {threads} CPU threads, torch {torch.__version__}, {dtype}, {repeats} interleaved rounds{malloc}"
