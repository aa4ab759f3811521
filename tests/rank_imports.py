"""What is imported once, before any rank is forked: all that the ranks of the tests use."""

import gc
from contextlib import suppress

import accelerate  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import parallel_checks  # noqa: F401
import sharded_graphs  # noqa: F401
import shared_statistics  # noqa: F401
import torch._dynamo  # noqa: F401

import gohgraph as goh
import gohgraph.learning.cli.comparison  # noqa: F401

with suppress(ImportError):
    import megatron_ranks  # noqa: F401

# With the first graph of a process PyG fills in the templates of its class.
goh.HeadGraphConv(goh.head_graph(2), 2, 2)
# What was imported is never garbage: no rank looks through it, which would copy it from memory that all share.
gc.collect()
gc.freeze()
