"""Recording what every head attends to, on stock models, converted ones and our own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gohgraph.analysis.architectures import wiring_of
from gohgraph.analysis.module_names import block_titles, layer_of
from gohgraph.analysis.passes import Passes
from gohgraph.attention.attention_map import attention_map
from gohgraph.attention.block import MultiHeadAttention
from gohgraph.attention.call import Call, Mask
from gohgraph.attention.routing import Routing
from gohgraph.attention.slots import HeadSlots
from gohgraph.attention.watching import watching
from gohgraph.common.checks import check_bool
from gohgraph.common.modules import is_recomputed, working_modules

# Bytes that the maps of a recording may take.
MOST_BYTES = 1 << 30


class Choice(NamedTuple):
    """Which maps are kept: of these layers and heads (`None` for all), of every example or their mean."""

    layers: Sequence[int] | None = None
    heads: Sequence[int] | None = None
    every_example: bool = False

    @classmethod
    def of(cls, asked: bool | Mapping[str, Any]) -> Choice | None:
        """Returns the choice that `record(attention=...)` asks for; `None` for no maps."""
        if not isinstance(asked, Mapping):
            check_bool("attention", asked)
            return cls() if asked else None
        if unknown := sorted(set(asked) - set(cls._fields)):
            raise ValueError(
                f"Expected attention to choose by {', '.join(cls._fields)} (got {', '.join(map(str, unknown))}). "
                'Do pass e.g. attention={"layers": [0, 5]}.'
            )
        choice = cls(**asked)
        check_bool("every_example", choice.every_example)
        for name in ("layers", "heads"):
            numbers = getattr(choice, name)
            if numbers is not None and (not numbers or not all(type(n) is int and n >= 0 for n in numbers)):
                raise ValueError(f"Expected {name} as a list of numbers from 0 (got {numbers!r}). Do name some.")
        return choice


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
        known = sorted({layer_of(name) for name in modules} - {None})
        raise ValueError(f"Expected layers of {known} (got {list(wanted or ())}). Do choose among them.")
    found: dict[str, AttentionRecording] = {}
    calls: dict[tuple[str, int], AttentionRecording] = {}
    watch = _Watch(choice, len(chosen))
    with ExitStack() as stack:
        for name, title in chosen.items():
            module, counter = model.get_submodule(name), passes.counter()

            def finish(maps: Tensor, name: str = name, title: str = title, counter: Any = counter) -> None:
                index = counter.next()
                label = title if index == 0 else f"{title}, call {index}"
                if (name, index) not in calls:
                    heads = range(maps.shape[1]) if choice.heads is None else choice.heads
                    calls[name, index] = AttentionRecording(label, list(heads), choice.every_example)
                    found[name if index == 0 else f"{name}.call.{index}"] = calls[name, index]
                calls[name, index].update(maps)

            for hook in watch.hooks(module, title, finish):
                stack.enter_context(hook)
        stack.enter_context(watching(watch.see))
        stack.enter_context(watch)
        yield found


def attention_modules(model: nn.Module) -> dict[str, str]:
    """Returns the titles of a model's attention modules by name, in model order.

    Raises:
        ValueError: it has no attention of ours, and `wiring_of` does not know its layers.
    """
    own = [name for name, module in working_modules(model) if isinstance(module, (MultiHeadAttention, HeadSlots))]
    try:
        stock = {unit.name: unit.title for unit in wiring_of(model).attentions}
    except ValueError:
        if not own:
            raise
        stock = {}
    # Where ours stands inside of a stock module, or in its place, it is asked itself.
    inside = {name: next((one for one in own if f"{one}.".startswith(f"{name}.")), name) for name in stock}
    titles = {inside[name]: title for name, title in stock.items()}
    others = [name for name in own if name not in titles]
    titles |= dict(zip(others, block_titles(others), strict=True))
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    return dict(sorted(titles.items(), key=lambda item: order[item[0]]))


class _Frame:
    """One call of an attention module that is under way, and the map it was seen to use, `[B, H, T, S]`."""

    def __init__(self, title: str) -> None:
        self.title, self.map, self.told, self.active = title, None, False, None

    def put(self, weights: Tensor) -> None:
        if self.map is not None:
            raise ValueError(
                f"Expected attention in one piece in {self.title} (got several calls of torch's attention). Do leave "
                "this layer out by attention={'layers': [...]}."
            )
        self.map = weights


class _Watch(TorchFunctionMode):
    """Sees the attention that runs inside chosen modules, in the thread that entered it."""

    def __init__(self, choice: Choice, blocks: int) -> None:
        super().__init__()
        self.choice, self.blocks, self.frames = choice, blocks, []
        self._thread = threading.get_ident()

    def hooks(self, module: nn.Module, title: str, finish: Callable[[Tensor], None]) -> list[Any]:
        """The hooks on one attention module, as contexts."""

        def here(one: nn.Module, owner: nn.Module) -> bool:
            return one is owner and threading.get_ident() == self._thread and not is_recomputed()

        def enter(one: nn.Module, inputs: Any) -> None:
            if here(one, module):
                self.frames.append(_Frame(title))

        def leave(one: nn.Module, inputs: Any, result: Any) -> None:
            if not here(one, module) or not self.frames:
                return
            frame = self.frames.pop()
            # What was interrupted has no result.
            if result is not None:
                with torch.no_grad():
                    finish(self._chosen(frame, result))

        hooks = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
        if (router := getattr(module, "router", None)) is not None:

            def routed(one: nn.Module, inputs: Any, routing: Routing) -> None:
                if here(one, router) and self.frames:
                    places = getattr(module, "places", None)
                    active = routing.active if places is None else routing.active.index_select(-1, places)
                    self.frames[-1].active = active  # [B, T, H]

            hooks.append(router.register_forward_hook(routed))
        return hooks

    def see(self, call: Call) -> None:
        """Takes in a call of `gohgraph.attention.forms.attend`."""
        if not self.frames or (call.core is not None and call.core.opaque):
            return
        frame = self.frames[-1]
        self._check_size(len(call.q), call.q.shape[2], call.q.shape[1], call.k.shape[1])
        with torch.no_grad():
            frame.put(attention_map(call).transpose(1, 2))  # [B, H, T, S]
        frame.told = True

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.frames and not self.frames[-1].told and not is_recomputed():
            with torch.no_grad():
                self.frames[-1].put(self._of_torch(*args, **kwargs))
        return func(*args, **kwargs)

    def _of_torch(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """The map of a call of `F.scaled_dot_product_attention`, `[B, H, T, S]`."""
        self._check_size(len(query), query.shape[1], query.shape[2], key.shape[2])
        q, k, v = (heads.transpose(1, 2) for heads in (query, key, value))  # [B, T or S, H or G, D]
        if is_causal:
            # Torch's own causality counts from the first key.
            attn_mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril()  # [T, S]
        if attn_mask is not None:
            attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + attn_mask.shape)  # to four dimensions
        return attention_map(Call(q, k, v, Mask(attn_mask), scale=scale)).transpose(1, 2)  # [B, H, T, S]

    def _check_size(self, examples: int, heads: int, tokens: int, keys: int) -> None:
        heads = heads if self.choice.heads is None else len(self.choice.heads)
        needed = 4 * self.blocks * (examples if self.choice.every_example else 1) * heads * tokens * keys
        if needed > MOST_BYTES:
            raise ValueError(
                f"Expected attention maps of at most {MOST_BYTES / 2**30:.0f} GiB (got {needed / 2**30:.1f} GiB of "
                f"{self.blocks} blocks, {heads} heads, {tokens} x {keys} tokens). Do choose layers and heads, e.g. "
                'attention={"layers": [0], "heads": [0, 1]}, or run fewer tokens.'
            )

    def _chosen(self, frame: _Frame, result: Any) -> Tensor:
        maps = _told_by(result, frame.title) if frame.map is None else frame.map
        first = result[0] if isinstance(result, tuple) else result
        if isinstance(first, Tensor) and not frame.told and maps.shape[2] != first.shape[1] == 1:
            # In decoding, transformers runs the query heads of a group as queries of one head.
            maps = maps.reshape(len(maps), -1, 1, maps.shape[-1])  # [B, H, 1, S]
        if frame.active is not None:
            active = frame.active.transpose(1, 2).unsqueeze(-1)  # [B, H, T, 1]
            maps = maps * active
        if self.choice.heads is None:
            return maps
        if max(self.choice.heads) >= maps.shape[1]:
            raise ValueError(
                f"Expected heads from 0 to {maps.shape[1] - 1} in {frame.title} (got {list(self.choice.heads)}). Do "
                "choose among them."
            )
        return maps[:, list(self.choice.heads)]


def _told_by(result: Any, title: str) -> Tensor:
    """The weights that an attention module returns beside its output, `[B, H, T, S]`."""
    told = [one for one in result[1:] if isinstance(one, Tensor)] if isinstance(result, tuple) else []
    if not told or told[-1].dim() != 4:
        raise ValueError(
            f"Expected attention by torch's scaled_dot_product_attention or one that returns its weights in {title} "
            "(got neither). Do load the model with attn_implementation='sdpa' or 'eager'."
        )
    return told[-1]
