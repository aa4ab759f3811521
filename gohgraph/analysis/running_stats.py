"""Mean and variance over tokens, kept up as tokens come: memory does not grow with them."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Numbers turned into float64 at a time.
CHUNK = 1 << 20


class Moments:
    """Running mean and variance of tensors of one shape (Chan et al. 1979, the pairwise update), float64 on the CPU.

    Args:
        shape: of one sample.

    Attributes:
        count: samples seen.
        mean: `[*shape]`.

    Example:
        >>> moments = Moments((2,))
        >>> moments.update(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
        >>> moments.mean.tolist(), moments.std.tolist()
        ([2.0, 5.0], [1.0, 0.0])
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self.count = 0
        self.mean = torch.zeros(*shape, dtype=torch.float64)
        self._squares = torch.zeros_like(self.mean)

    def update(self, values: Tensor) -> None:
        """Takes in samples `[*, *shape]`."""
        values = samples(values, self.mean.dim())  # [N, *shape]
        for part in values.split(max(1, CHUNK // max(1, self.mean.numel()))):
            self._add(part.cpu().double())

    @property
    def std(self) -> Tensor:
        """Standard deviation over samples, `[*shape]`; 0 of fewer than two."""
        return (self._squares / max(1, self.count)).sqrt()

    @property
    def rms(self) -> Tensor:
        """Root of the mean square, `[*shape]`."""
        return (self.mean.square() + self._squares / max(1, self.count)).sqrt()

    def _add(self, values: Tensor) -> None:
        new, total = len(values), self.count + len(values)
        if new == 0:
            return
        mean = values.mean(dim=0)
        shift = mean - self.mean
        self._squares += (values - mean).square().sum(dim=0) + shift.square() * (self.count * new / total)
        self.mean += shift * (new / total)
        self.count = total


def samples(values: Tensor, dims: int) -> Tensor:
    """Returns values with all dimensions before the last `dims` in one, detached; also where they are empty.

    Example:
        >>> samples(torch.zeros(2, 3, 5, 0), 2).shape, samples(torch.zeros(5, 0), 2).shape
        (torch.Size([6, 5, 0]), torch.Size([1, 5, 0]))
    """
    values = values.detach()
    return values.flatten(0, -dims - 1) if values.dim() > dims else values.unsqueeze(0)
