"""Recording what head graphs do in a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gohgraph.conv import HeadGraphConv


class Recording:
    """Running mean and variance over tokens of the edge weights of one head graph; memory does not grow with tokens.

    Args:
        conv: the recorded graph.

    Attributes:
        edge_index: `[2, E]`, senders in row 0.
        num_heads: H.
        tokens: number of tokens seen.
        mean: `[R, E]` mean weight of every edge, in each round.
        std: `[R, E]` standard deviation over tokens; 0 for static edges.
    """

    def __init__(self, conv: HeadGraphConv) -> None:
        self.edge_index, self.num_heads = conv.edge_index.detach().cpu(), conv.num_heads
        self.tokens = 0
        self.mean = torch.zeros(conv.rounds, self.edge_index.shape[1], dtype=torch.float64)
        self._squares = torch.zeros_like(self.mean)

    def update(self, alpha: Tensor) -> None:
        """Takes in the weights of one forward pass, `[*, R, E]` (Chan et al. 1979, the pairwise update)."""
        alpha = alpha.detach().double().cpu().reshape(-1, *self.mean.shape)  # [N, R, E]
        new, total = alpha.shape[0], self.tokens + alpha.shape[0]
        if new == 0:
            return
        mean = alpha.mean(dim=0)
        shift = mean - self.mean
        self._squares += (alpha - mean).square().sum(dim=0) + shift.square() * (self.tokens * new / total)
        self.mean += shift * (new / total)
        self.tokens = total

    @property
    def std(self) -> Tensor:
        return (self._squares / max(1, self.tokens)).sqrt()


@contextmanager
def record(model: nn.Module) -> Iterator[dict[str, Recording]]:
    """Records the edge weights of every head graph of `model` while the block runs.

    They are the weights alpha as the context gives them, before a router or `top_edges` leaves any out.

    Args:
        model: any module that contains `HeadGraphConv`s.

    Yields:
        The recordings by module name, e.g. `"decoder.layers.0.attention.object.output_graph"`, in model order.

    Raises:
        ValueError: the model has no head graph.

    Example:
        >>> import gohgraph as goh
        >>> shape = dict(d_model=8, num_heads=2, num_layers=1, d_ff=8)
        >>> model = goh.LanguageModel(goh.TransformerConfig(9, **shape, head_graph=goh.HeadGraphConfig()))
        >>> with record(model) as heads:
        ...     _ = model(torch.tensor([[1, 2, 3]]))
        >>> [(name, heads[name].tokens) for name in heads]
        [('decoder.layers.0.attention.object.output_graph', 3)]
    """
    graphs = {name: module for name, module in model.named_modules() if isinstance(module, HeadGraphConv)}
    if not graphs:
        raise ValueError("Expected a model with head graphs (got none). Do build it with head_graph=HeadGraphConfig().")
    heads = {name: Recording(conv) for name, conv in graphs.items()}
    # Both sites ask the edges for their weights, so that is where they are seen.
    hooks = [conv.edges.register_forward_hook(_updating(heads[name], conv.edges)) for name, conv in graphs.items()]
    try:
        yield heads
    finally:
        for hook in hooks:
            hook.remove()


def _updating(recording: Recording, edges: nn.Module) -> Callable[[nn.Module, Any, Tensor], None]:
    def update(module: nn.Module, inputs: Any, alpha: Tensor) -> None:
        # A deep copy of the model made inside the block carries this hook along: it is not what is recorded.
        if module is edges:
            recording.update(alpha)

    return update
