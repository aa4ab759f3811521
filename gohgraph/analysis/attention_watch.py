"""Seeing the attention maps that a model's own pass really uses."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gohgraph.attention.attention_map import attention_map
from gohgraph.attention.call import Call, Mask
from gohgraph.attention.routing import Routing
from gohgraph.common.checks import check_bool
from gohgraph.common.modules import is_recomputed

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


class _Frame:
    """One call of an attention module that is under way, and the map it was seen to use, `[B, H, T, S]`."""

    def __init__(self, title: str) -> None:
        self.title, self.told = title, False
        self.map: Tensor | None = None
        self.active: Tensor | None = None

    def put(self, weights: Tensor) -> None:
        if self.map is not None:
            raise ValueError(
                f"Expected attention in one piece in {self.title} (got several calls of torch's attention). Do leave "
                "this layer out by attention={'layers': [...]}."
            )
        self.map = weights


class AttentionWatch(TorchFunctionMode):
    """Sees the attention that runs inside chosen modules, in the thread that entered it."""

    def __init__(self, choice: Choice, blocks: int) -> None:
        super().__init__()
        self.choice, self.blocks = choice, blocks
        self.frames: list[_Frame] = []
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
