"""The sublayers of a transformer: residual connection and normalisation around an object."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from gohgraph.common.checks import check_choice

NORMS: dict[str, Callable[..., nn.Module]] = {
    "layer": nn.LayerNorm,
    "rms": nn.RMSNorm,
    "unweighted-rms": partial(nn.RMSNorm, elementwise_affine=False),
}


class Residual(nn.Module):
    r"""Residual connection and normalisation around an object (attention or feed-forward).

    .. math::
        \text{pre-norm: } x + \mathrm{drop}(f(\mathrm{norm}(x))), \qquad
        \text{post-norm: } \mathrm{norm}(x + \mathrm{drop}(f(x)))

    Post-norm is Vaswani et al. 2017 (section 5.4); pre-norm is Xiong et al. 2020 (arXiv 2002.04745).

    Args:
        object: a module `x, ... -> y` or `x, ... -> (y, more)`.
        d_model: M.
        norm_first: pre-norm when True.
        norm: `"layer"`, `"rms"` or `"unweighted-rms"`.
        dropout: probability of dropping a unit of y in training.

    Shape:
        x `[B, T, M]` -> `[B, T, M]`, or a pair with what the object returned beside y.

    Example:
        >>> import torch
        >>> Residual(nn.Identity(), 4)(torch.randn(2, 3, 4)).shape
        torch.Size([2, 3, 4])
    """

    def __init__(
        self, object: nn.Module, d_model: int, *, norm_first: bool = True, norm: str = "layer", dropout: float = 0.0
    ) -> None:
        super().__init__()
        check_choice("norm", norm, NORMS)
        self.object = object
        self.norm = NORMS[norm](d_model, eps=1e-5)
        self.norm_first = norm_first
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Applies the object inside its residual connection; further arguments go to the object."""
        result = self.object(self.norm(x) if self.norm_first else x, *args, **kwargs)
        y, extra = result if isinstance(result, tuple) else (result, None)
        # A call that does nothing costs as much as the addition, where tokens come one at a time.
        x = x + (self.dropout(y) if self.dropout.training else y)
        x = x if self.norm_first else self.norm(x)
        return x if extra is None else (x, extra)
