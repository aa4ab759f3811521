"""The tasks of the quality benchmark, by name."""

from benchmarks.tasks.associative import ManyQueries
from benchmarks.tasks.base import Task
from benchmarks.tasks.digits import Digits
from benchmarks.tasks.find_block import FindBlock
from benchmarks.tasks.text import Text
from benchmarks.tasks.translation import Translation
from benchmarks.tasks.two_cues import TwoCues
from benchmarks.tasks.two_hops import TwoHops

__all__ = ["TASKS", "Task"]

TASKS: dict[str, type[Task]] = {
    "text": Text,
    "two-cues": TwoCues,
    "mqar": ManyQueries,
    "two-hops": TwoHops,
    "find-block": FindBlock,
    "digits": Digits,
    "translation": Translation,
}
