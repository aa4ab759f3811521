"""Recording what every head attends to, on stock models, converted ones and our own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gohgraph.analysis.architectures import wiring_of
from gohgraph.analysis.attention_watch import AttentionWatch, Choice
from gohgraph.analysis.module_names import block_titles, layer_of
from gohgraph.analysis.passes import Passes
from gohgraph.attention.block import MultiHeadAttention
from gohgraph.attention.slots import HeadSlots
from gohgraph.attention.watching import watching
from gohgraph.common.modules import working_modules


class AttentionRecording:
    """What the heads of one attention block attended to.

    Args:
        title: of the block, e.g. "layer 3".
        heads: the numbers of the heads that are kept.
        every_example: keeps all examples, not their mean.

    Attributes:
        maps: float32 on the CPU, the weight of every key for every query: `[h, T, S]`, the mean over all examples as
            they stand, or with `every_example` `[N, h, T, S]`. Rows of queries that a router left a head out for, or
            that may attend to nothing, are 0; all others add up to 1 (unless there are messages between weights).
        examples: how many there were.

    Example:
        >>> recording = AttentionRecording("layer 0", [1], every_example=False)
        >>> recording.update(torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]]))
        >>> recording.maps.tolist(), recording.examples
        ([[[1.0, 0.0], [0.5, 0.5]]], 1)
    """

    def __init__(self, title: str, heads: Sequence[int], every_example: bool) -> None:
        self.title, self.heads, self.every_example, self.examples = title, list(heads), every_example, 0
        self._maps: Tensor | None = None

    @property
    def maps(self) -> Tensor:
        if self._maps is None:
            raise ValueError(f"Expected attention to have run in {self.title} (got no call). Do run the model first.")
        return self._maps if self.every_example else self._maps / self.examples

    def update(self, maps: Tensor) -> None:
        """Takes in the maps of one pass, `[B, h, T, S]`; those of a decoding step, one row longer, are put below."""
        examples, maps = len(maps), maps.detach().float().cpu()
        maps = maps if self.every_example else maps.sum(dim=0)
        if self._maps is None:
            self._maps, self.examples = maps, examples
            return
        (rows, keys), (before, keys_before) = maps.shape[-2:], self._maps.shape[-2:]
        if before == keys_before and keys == keys_before + rows and rows < keys:
            self._maps = torch.cat([F.pad(self._maps, (0, rows)), maps], dim=-2)
        elif (rows, keys) == (before, keys_before):
            self._maps = torch.cat([self._maps, maps]) if self.every_example else self._maps + maps
            self.examples += examples
        else:
            raise ValueError(
                f"Expected passes of one length in {self.title} (got {rows} queries over {keys} keys after {before} "
                f"over {keys_before}). Do record each in a block of its own."
            )


@contextmanager
def recording_attention(
    model: nn.Module, choice: Choice, passes: Passes
) -> Iterator[dict[str, AttentionRecording]]:
    """Records the maps of a model's attention, by module name, while the block runs and in this thread.

    Own and converted attention is asked for its call; stock attention for what it gives to torch's
    `scaled_dot_product_attention`, or where it computes weights itself, for these. Its results are not touched.
    """
    modules = attention_modules(model)
    wanted = choice.layers
    chosen = {name: title for name, title in modules.items() if wanted is None or layer_of(name) in wanted}
    if not chosen:
        known = sorted({layer for name in modules if (layer := layer_of(name)) is not None})
        raise ValueError(f"Expected layers of {known} (got {list(wanted or ())}). Do choose among them.")
    recordings: dict[str, AttentionRecording] = {}
    calls: dict[tuple[str, int], AttentionRecording] = {}
    watch = AttentionWatch(choice, len(chosen))
    with ExitStack() as stack:
        for name, title in chosen.items():
            module, counter = model.get_submodule(name), passes.counter()

            def finish(maps: Tensor, name: str = name, title: str = title, counter: Any = counter) -> None:
                index = counter.next()
                label = title if index == 0 else f"{title}, call {index}"
                if (name, index) not in calls:
                    heads = range(maps.shape[1]) if choice.heads is None else choice.heads
                    calls[name, index] = AttentionRecording(label, list(heads), choice.every_example)
                    recordings[name if index == 0 else f"{name}.call.{index}"] = calls[name, index]
                calls[name, index].update(maps)

            for hook in watch.hooks(module, title, finish):
                stack.enter_context(hook)
        stack.enter_context(watching(watch.see))
        stack.enter_context(watch)
        yield recordings


def attention_modules(model: nn.Module) -> dict[str, str]:
    """Returns the titles of a model's attention modules by name, in model order.

    Raises:
        ValueError: it has no attention of ours, and `wiring_of` does not know its layers.
    """
    blocks = [name for name, module in working_modules(model) if isinstance(module, (MultiHeadAttention, HeadSlots))]
    try:
        stock = {unit.name: unit.title for unit in wiring_of(model).attentions}
    except ValueError:
        if not blocks:
            raise
        stock = {}
    # Where ours stands inside of a stock module, or in its place, it is asked itself.
    inside = {name: next((one for one in blocks if f"{one}.".startswith(f"{name}.")), name) for name in stock}
    titles = {inside[name]: title for name, title in stock.items()}
    others = [name for name in blocks if name not in titles]
    titles |= dict(zip(others, block_titles(others), strict=True))
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    return dict(sorted(titles.items(), key=lambda item: order[item[0]]))
