"""The key/value cache of incremental decoding."""

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values of one attention block, grown token by token: plain per-head tensors, with or without graphs.

    A graph whose messages depend on the key's token keeps what it needs of each beside them.

    Memory is reserved in doubling steps, so a token costs no copy of the past on average. Each head's keys lie together
    (`[B, G, S, D]`, read as `[B, S, G, D]`): a token's attention reads them in one stretch, on a CPU twice as fast.

    Args:
        fixed: True for cross attention, whose keys and values are computed once and then only read.

    Example:
        >>> cache = KeyValueCache()
        >>> _ = cache.update(torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 2, 4))
        >>> keys, values = cache.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4))
        >>> len(cache), keys.shape
        (4, torch.Size([1, 4, 2, 4]))
    """

    def __init__(self, fixed: bool = False) -> None:
        self.fixed = fixed
        self._length = 0
        self._tensors: list[Tensor] = []

    def __len__(self) -> int:
        return self._length

    @property
    def is_filled(self) -> bool:
        """True once a fixed cache holds its keys and values."""
        return self.fixed and self._length > 0

    def update(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Appends keys, values and whatever else is kept, `[B, T, G, D]`, and returns all so far, `[B, S, G, D]` each.

        G and D may differ between what is kept, not between calls.
        """
        end = self._length + new[0].shape[1]
        if not self._tensors or end > self._tensors[0].shape[2]:
            self._tensors = [self._grown(index, tensor, end) for index, tensor in enumerate(new)]
        for stored, tensor in zip(self._tensors, new, strict=True):
            # For one token narrow takes half the time of an index.
            stored.narrow(2, self._length, end - self._length).copy_(tensor.transpose(1, 2))  # [B, G, T, D]
        self._length = end
        return self.read()

    def read(self) -> tuple[Tensor, ...]:
        """Returns the keys, the values and whatever else is kept, `[B, S, G, D]` each."""
        return tuple([stored.narrow(2, 0, self._length).transpose(1, 2) for stored in self._tensors])

    def truncate(self, length: int) -> None:
        """Forgets all tokens after the first `length`, as when drafted tokens are refused; their memory stays reserved.

        `length` is at most all there are. Later tokens overwrite them, also in views that `read` and `update` returned.
        """
        if not 0 <= length <= self._length:
            raise ValueError(f"Expected a length in 0..{self._length} (got {length}). Do keep at most all tokens.")
        self._length = length

    def reorder(self, rows: Tensor) -> None:
        """Replaces batch row b by row `rows[b]`, as beam search needs."""
        self._tensors = [stored[rows] for stored in self._tensors]

    def in_place(self, size: int, place: Tensor) -> "StaticCache":
        """Returns what is kept as a cache of `size` tokens, for compiled steps of one token; see `StaticCache`."""
        tensors = [self._with_room(index, size) for index in range(len(self._tensors))]
        return StaticCache(tensors, place)

    def _with_room(self, index: int, size: int) -> Tensor:
        stored = self._tensors[index]
        # Zeros: what is masked may not be NaN, which zero weights would not take away.
        room = stored.new_zeros(*stored.shape[:2], size, stored.shape[3])  # [B, G, size, D]
        room[:, :, : self._length] = stored[:, :, : self._length]
        return room

    def _grown(self, index: int, new: Tensor, length: int) -> Tensor:
        size = length if self.fixed else max(2 * length, 64)
        batch, _, heads, features = new.shape
        grown = new.new_empty(batch, heads, size, features)  # [B, G, size, D]
        if self._tensors:
            grown[:, :, : self._length] = self._tensors[index][:, :, : self._length]
        return grown


class StaticCache(KeyValueCache):
    """A cache whose tensors keep their sizes: the token of a step is written where `place` says, all tokens are read.

    So every step is one program for torch's compiler, which needs a mask of the keys up to the token.

    Args:
        tensors: `[B, G, S, D]` of keys, values and whatever else is kept.
        place: index of the next token, `[1]`; whoever decodes moves it on.

    Example:
        >>> grown, place = KeyValueCache(), torch.tensor([1])
        >>> _ = grown.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))
        >>> keys, values = grown.in_place(3, place).update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4))
        >>> keys[0, :, 0, 0].tolist()
        [0.0, 1.0, 0.0]
    """

    def __init__(self, tensors: list[Tensor], place: Tensor) -> None:
        super().__init__()
        # As many as if the token of a step came last.
        self._tensors, self._length, self.place = tensors, tensors[0].shape[2] - 1, place

    def update(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Writes keys, values and whatever else is kept of one token, `[B, 1, G, D]`; all are `[B, S, G, D]` each."""
        for stored, tensor in zip(self._tensors, new, strict=True):
            stored[:, :, self.place] = tensor.transpose(1, 2)  # [B, G, 1, D]
        return tuple(stored.transpose(1, 2) for stored in self._tensors)


def reorder_all(caches: list[tuple[KeyValueCache, ...]], rows: Tensor) -> None:
    """Reorders the batch rows of every cache of every layer."""
    for layer in caches:
        for cache in layer:
            cache.reorder(rows)


def padded(mask: Tensor, length: int) -> Tensor:
    """Returns a token mask `[B, T]` continued with True to `length` tokens."""
    continued = mask.new_ones(mask.shape[0], length - mask.shape[1])
    return torch.cat((mask, continued), dim=1)  # [B, length]
