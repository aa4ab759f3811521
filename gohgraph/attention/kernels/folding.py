"""How functions that know one batch alone run under `torch.func.vmap`: the mapped dimension becomes part of it."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def fold(size: int, in_dims: Sequence[int | None], inputs: Sequence[Any]) -> list[Any]:
    """Makes a mapped dimension part of the batch, the first dimension of every tensor: `[N * B, *]` each.

    Args:
        size: N, of the mapped dimension.
        in_dims: where each input has it; `None` for one that is the same for all.
        inputs: tensors `[B, *]` beside the mapped dimension, and what is no tensor, which stays as it is.

    Example:
        >>> import torch
        >>> [x.shape for x in fold(3, (1, None), (torch.ones(2, 3, 5), torch.ones(2, 7)))]
        [torch.Size([6, 5]), torch.Size([6, 7])]
    """
    return [
        value if not isinstance(value, Tensor) else _mapped_first(size, dim, value).flatten(0, 1)  # [N*B, *]
        for dim, value in zip(in_dims, inputs, strict=True)
    ]


def unfold(size: int, output: Tensor) -> Tensor:
    """Returns `[N, B, *]` of a tensor `[N * B, *]`."""
    return output.view(size, output.shape[0] // size, *output.shape[1:])  # [N, B, *]


def _mapped_first(size: int, dim: int | None, x: Tensor) -> Tensor:
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)  # [N, B, *]
