"""The key/value caches of gohgraph's own models, as transformers' generation handles a cache."""

import torch
from torch import Tensor

from gohgraph.attention.cache import KeyValueCache, reorder_all


class OwnCache:
    """All caches of one stack, with the methods generation calls: beams reorder it, refused drafts crop it.

    Args:
        layers: of `Stack.new_caches`.

    Example:
        >>> OwnCache([(KeyValueCache(),)]).get_seq_length()
        0
    """

    # What generation asks of a cache: no layer of linear attention, tokens can be forgotten, not for torch.compile.
    is_linear, is_croppable, is_compileable = (False,), True, False

    def __init__(self, layers: list[tuple[KeyValueCache, ...]]) -> None:
        self.layers = layers

    def activate_past_recording(self) -> None:
        """Is told before drafts are tried; tokens can be forgotten at any time here."""

    def get_seq_length(self, layer: int = 0) -> int:
        """Returns the number of tokens kept."""
        return len(self.layers[layer][0])

    def crop(self, length: int) -> None:
        """Keeps the first `length` tokens; forgets the last ones where it is negative."""
        length = length if length >= 0 else self.get_seq_length() + length
        for layer in self.layers:
            for cache in layer:
                if not cache.fixed:
                    cache.truncate(max(0, length))

    def reorder_cache(self, rows: Tensor) -> None:
        """Replaces batch row b by row `rows[b]`."""
        reorder_all(self.layers, rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every batch row."""
        self.reorder_cache(self._rows().repeat_interleave(repeats))

    def batch_select_indices(self, rows: Tensor) -> None:
        """Keeps these batch rows."""
        self.reorder_cache(rows)

    def _rows(self) -> Tensor:
        keys = self.layers[0][0].read()[0]  # [B, S, G, D]
        return torch.arange(keys.shape[0], device=keys.device)
