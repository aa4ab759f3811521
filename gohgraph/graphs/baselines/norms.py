"""Normalisation of head outputs, head by head."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gohgraph.graphs.protocol import FEATURES, SiteGraph, Traits


class HeadNorm(SiteGraph):
    r"""RMS normalisation of every head's output, with a gain for each of its features.

    .. math:: z'_i(t) = \gamma_i \odot z_i(t) \,/\, \sqrt{\mathrm{mean}_d\, z_{id}(t)^2 + \epsilon}

    Not neutral: heads enter the output projection at equal size whatever they found.

    Source: the head-level normalisation of RetNet (arXiv 2307.08621, equation 8) and of the Differential Transformer
    (arXiv 2410.05258, section 2.1). Differs: gains are not shared between heads.

    Args:
        num_heads, head_dim, context_dim: H, D and M (not used); nodes are `[*, H, D]`.
        eps: epsilon.

    Example:
        >>> z = HeadNorm(num_heads=5, head_dim=4, context_dim=20)(torch.randn(2, 3, 5, 4))
        >>> bool((z.square().mean(-1) - 1).abs().max() < 1e-3)
        True
    """

    def __init__(self, num_heads: int, head_dim: int, context_dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.num_heads, self.eps = num_heads, eps
        self.traits = Traits(num_heads, FEATURES)
        self.gain = nn.Parameter(torch.ones(num_heads, head_dim))

    def reset_parameters(self) -> None:
        """Sets all gains to 1."""
        nn.init.ones_(self.gain)

    def forward(
        self, nodes: Tensor, context: Tensor | None = None, earlier: Any = (), active: Tensor | None = None, **call: Any
    ) -> Tensor:
        """Normalises the nodes `[*, H, D]`."""
        return F.rms_norm(nodes, nodes.shape[-1:], eps=self.eps) * self.gain.to(nodes.dtype)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, eps={self.eps}"
