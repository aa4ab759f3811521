"""Counts what a step of a planned model really sends, on ranks of this machine."""

from __future__ import annotations

import torch

from gohgraph.common.checks import there
from gohgraph.graphs.config import HeadGraphConfig
from gohgraph.models.config import TransformerConfig
from gohgraph.models.models import LanguageModel
from gohgraph.parallel.layout import Layout, ParallelConfig
from gohgraph.parallel.sharding import parallelize
from planning.cost import Workload
from planning.traffic import Traffic

DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


def count_step(graphs: HeadGraphConfig | None, model: Workload, parallel: ParallelConfig) -> int:
    """Builds the model on the ranks of this job and returns the bytes that this rank sends in a step, both ways.

    All ranks call it, under `process_group`.

    Args:
        graphs: `None` for plain attention.
        model: of a size for this machine; `number_bytes` is 2, 4 or 8.
        parallel: the kinds of parallelism.

    Raises:
        ValueError: another number of bytes, or as `parallelize`.
    """
    if model.number_bytes not in DTYPES:
        raise ValueError(f"Expected number_bytes of {sorted(DTYPES)} (got {model.number_bytes}). Do choose one.")
    torch.manual_seed(0)
    config = TransformerConfig(
        model.vocab_size, model.d_model, model.num_heads, num_layers=model.num_layers, d_ff=model.d_ff, bias=False,
        head_graph=graphs,
    )  # fmt: skip
    built = LanguageModel(config).to(DTYPES[int(model.number_bytes)])
    built = parallelize(built, Layout(parallel))
    tokens = torch.randint(model.vocab_size, (model.batch_size, model.length + 1))
    with Traffic() as traffic:
        there(built(tokens[:, :-1], targets=tokens[:, 1:]).loss).backward()
    return traffic.total
