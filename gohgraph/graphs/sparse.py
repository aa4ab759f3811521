"""Messages over few edges: cost and memory follow the edges, and no adjacency is made."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gohgraph.graphs.edge_tables import EdgeTables


def add_gathered(z: Tensor | None, senders: Tensor, alpha: Tensor, tables: EdgeTables) -> Tensor:
    r"""Returns the nodes with what they receive, by gathering the senders of one place of every receiver at a time.

    .. math:: z'_i(t) = z_i(t) + \sum_{c = 1}^{k} \alpha_{j_c(i)\, i}(t)\, z_{j_c(i)}(t)

    Equal to `add_product` with the adjacency of alpha, its slow reference. Backward gathers again, receivers of every
    sender: that is the same sum over the reversed graph, so nothing is kept but senders and weights.

    Args:
        z: `[*, H, D]`, or `None` for 0.
        senders: `[*, S, D]`.
        alpha: of every token, `[*, E]`.
        tables: of the edges.

    Example:
        >>> from gohgraph.graphs.edge_tables import edge_tables
        >>> z = torch.tensor([[[1.0], [2.0]]])
        >>> add_gathered(z, z, torch.tensor([[10.0]]), edge_tables([(1, 0)], 2, 2)).tolist()
        [[[21.0], [2.0]]]
    """
    flat = senders.reshape(-1, *senders.shape[-2:])  # [N, S, D]
    received = _Gathered.apply(flat, alpha.reshape(-1, alpha.shape[-1]), tables)  # [N, H, D]
    received = received.view(*senders.shape[:-2], *received.shape[-2:])  # [*, H, D]
    return received if z is None else z + received


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, senders: Tensor, alpha: Tensor, tables: EdgeTables) -> Tensor:
        ctx.save_for_backward(senders, alpha)
        ctx.tables = tables
        return _sum(senders, alpha, tables.senders, tables.edge_of_sender)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Of torch's own differentiable operators: second gradients are theirs.
        senders, alpha = ctx.saved_tensors
        tables, (of_senders, of_alpha, _) = ctx.tables, ctx.needs_input_grad
        dsenders = _sum(grad, alpha, tables.receivers, tables.edge_of_receiver) if of_senders else None
        if not of_alpha:
            return dsenders, None, None
        products = [(grad * senders.index_select(1, heads)).sum(dim=-1) for heads in tables.senders.unbind(1)]
        dalpha = torch.stack(products, dim=-1).flatten(1).index_select(1, tables.place_of_edge)  # [N, E]
        return dsenders, dalpha, None


def _sum(nodes: Tensor, alpha: Tensor, neighbours: Tensor, edges: Tensor) -> Tensor:
    """Sums nodes `[N, S, D]` over `neighbours [H, k]`, weighed by the edges `[H, k]` of alpha `[N, E]`: `[N, H, D]`."""
    padded = F.pad(alpha, (0, 1))  # [N, E+1]
    result = nodes.new_zeros(len(nodes), len(neighbours), nodes.shape[-1])
    for heads, numbers in zip(neighbours.unbind(1), edges.unbind(1), strict=True):
        weights = padded.index_select(1, numbers).unsqueeze(-1)  # [N, H, 1]
        result.addcmul_(nodes.index_select(1, heads), weights)
    return result
