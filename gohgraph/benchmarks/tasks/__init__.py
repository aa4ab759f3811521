"""The tasks of the quality benchmark, by name."""

from gohgraph.benchmarks.tasks.associative import ManyQueries
from gohgraph.benchmarks.tasks.base import Task
from gohgraph.benchmarks.tasks.digits import Digits
from gohgraph.benchmarks.tasks.find_block import FindBlock
from gohgraph.benchmarks.tasks.text import Text
from gohgraph.benchmarks.tasks.two_cues import TwoCues
from gohgraph.benchmarks.tasks.two_hops import TwoHops

__all__ = ["TASKS", "Task"]

TASKS: dict[str, type[Task]] = {
    "text": Text,
    "two-cues": TwoCues,
    "mqar": ManyQueries,
    "two-hops": TwoHops,
    "find-block": FindBlock,
    "digits": Digits,
}
