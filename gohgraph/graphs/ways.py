"""The one place that chooses how the messages of a head graph over features are computed.

Every way computes the same numbers, those of `add_product` on the whole adjacency, which also runs where nothing else
does: under torch.compile and export, `torch.func`, forward-mode gradients, autocast, in half precision and on a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gohgraph.common.modules import is_traced
from gohgraph.graphs.chunked import KEPT_NUMBERS
from gohgraph.graphs.edges import EdgeWeights
from gohgraph.graphs.token_edges import TokenEdges

if TYPE_CHECKING:
    from gohgraph.graphs.conv import HeadGraphConv

# Fewer weights than so many, of all tokens, lie in a core's cache: then nothing pays but the fewest calls.
FROM_WEIGHTS = 2**18

# Gathered senders take about 8 ns for a number of theirs, forward and backward, and an adjacency 7 to 9 for a cell:
# from so many cells a number on, gathering is faster (in-degree 4, 1,024 tokens, one thread, ms: 64 heads of 8 18 for
# 28, 128 of 4 29 for 158, but 32 of 16 13 for 10 and 64 of 8 under in-degree 8 38 for 30).
CELLS_A_NUMBER = 1.3


def pays_gathered(senders: Tensor, alpha: Tensor, in_degree: int, num_heads: int) -> bool:
    """Whether messages from senders `[*, S, D]` with weights `[*, E]` go edge by edge rather than as a product.

    Example:
        >>> z, alpha = torch.randn(2, 512, 64, 8), torch.randn(2, 512, 256)
        >>> pays_gathered(z, alpha, 4, 64), pays_gathered(z.bfloat16(), alpha, 4, 64), pays_gathered(z, alpha, 8, 64)
        (True, False, False)
    """
    # Whatever the features: a complete graph asks nothing further, which counts where tokens come one at a time.
    if in_degree * CELLS_A_NUMBER >= senders.shape[-2]:
        return False
    # No other size of what is traced may be compared, or it would hold for that size alone.
    if not is_ordinary(senders, alpha):
        return False
    cells = num_heads * senders.shape[-2]
    if alpha.shape[:-1] != senders.shape[:-2] or senders.shape[:-2].numel() * cells < FROM_WEIGHTS:
        return False
    return in_degree * num_heads * senders.shape[-1] * CELLS_A_NUMBER < cells


def edges_in_chunks(conv: HeadGraphConv, z: Tensor, context: Tensor | None, active: Tensor | None) -> TokenEdges | None:
    """Returns what the weights of a graph are computed from, where they are too many to keep; otherwise `None`.

    Where a token has more edges than `KEPT_NUMBERS` for every number of its context, they would outgrow the
    feed-forward of a block of the usual width. Computing some again costs time: `tools/benchmark.py scaling` and
    `memory` with `--heads 32 64 128`.
    """
    edges = conv.edges
    # First, since it is told by the graph alone: most have fewer, and a token less to wait for. PEFT wraps edges.
    if type(edges) is not EdgeWeights or edges.num_edges <= KEPT_NUMBERS * edges.context_dim:
        return None
    if conv.backend != "dense" or not conv.num_runs or edges.weight is None:
        return None
    parameters = (edges.weight, edges.bias)
    if context is None or not is_ordinary(z, context, *parameters):
        return None
    if active is not None or conv.top_edges is not None or context.shape[:-1] != z.shape[:-2]:
        return None
    tokens = z.shape[:-2].numel()
    if tokens * edges.num_edges < FROM_WEIGHTS:
        return None
    # Whoever watches or changes the weights by hooks must be called.
    if edges._forward_hooks or edges._forward_pre_hooks:
        return None
    if len({x.dtype for x in (z, context, *parameters)}) > 1 or context.shape[-1] != edges.context_dim:
        return None
    seen = context if edges.down is None else torch.nn.functional.linear(context, edges.down[0])  # [*, M or r]
    flat = seen.reshape(-1, seen.shape[-1])  # [N, M or r]
    # Views: the gradient of an index would be written into zeros of all rounds, in memory twice.
    weight, bias = (x.flatten(0, 1) for x in parameters)  # [E, M or r], [E]
    return TokenEdges(flat, weight, bias, edges.activation == "tanh", conv.num_heads // conv.num_runs)


def is_ordinary(*tensors: Tensor) -> bool:
    """Whether tensors are what the faster ways take: in full precision on a CPU, and neither traced nor mapped.

    Example:
        >>> is_ordinary(torch.ones(3)), torch.func.vmap(lambda x: x * is_ordinary(x))(torch.ones(1)).item()
        (True, 0.0)
    """
    if is_traced() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if torch.autograd.forward_ad._current_level >= 0 or torch.is_autocast_enabled("cpu"):
        return False
    plain = (torch.Tensor, torch.nn.Parameter)
    return all(type(x) in plain and x.is_cpu and x.dtype in (torch.float32, torch.float64) for x in tensors)
