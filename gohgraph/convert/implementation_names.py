"""The name by which an attention module of transformers calls its attention, head graphs included.

transformers looks the attention function up by `config._attn_implementation`, and many models also ask for that name:
`if self.config._attn_implementation in ("eager", "sdpa")`. A converted attention module sees its configuration through
`NamedByUs`: the name is the one it had to whoever compares it, and ours to whoever looks it up. The configuration
itself is left alone, and so are masks, other models that share it, and a later `set_attn_implementation`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

PREFIX = "gohgraph_"


class Implementation(str):
    """The name of an attention implementation that equals what it was, and is looked up as ours."""

    base: str

    def __new__(cls, base: str) -> Implementation:
        self = super().__new__(cls, base)
        self.base = base
        return self

    # In words that torch's compiler can trace.
    def __eq__(self, other: object) -> bool:
        return other == self.base or other == PREFIX + self.base

    def __ne__(self, other: object) -> bool:
        return not (other == self.base or other == PREFIX + self.base)

    def __hash__(self) -> int:
        return hash(PREFIX + self.base)

    def removeprefix(self, prefix: str) -> Implementation:
        """Returns the name without a prefix, e.g. "paged|", still looked up as ours."""
        return implementation(self.base.removeprefix(prefix))


class Overlay:
    """An object as another one sees it: some attributes are others, all else is its own."""

    def __init__(self, beneath: Any, **others: Any) -> None:
        self.__dict__.update(others, _beneath=beneath)

    def __getattr__(self, name: str) -> Any:
        # A copy that is still being filled has nothing beneath, and special methods are never another's.
        if name.startswith("__") or "_beneath" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["_beneath"], name)


class NamedByUs(Overlay):
    """The configuration of a converted attention module, as the module sees it.

    Args:
        beneath: the configuration, which every other attribute is of, written ones too.
    """

    def __init__(self, beneath: Any) -> None:
        super().__init__(beneath)

    @property
    def _attn_implementation(self) -> Implementation:
        return implementation(base_of(self))

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_beneath"], name, value)


def beneath(config: Any) -> Any:
    """Returns the configuration itself of one that may be seen through `NamedByUs`."""
    return config.__dict__["_beneath"] if isinstance(config, NamedByUs) else config


def base_of(config: Any) -> str:
    """Returns the implementation a configuration names; `None` stands for eager."""
    return beneath(config)._attn_implementation or "eager"


_KNOWN: dict[str, Implementation] = {}


def implementation(base: str) -> Implementation:
    """Returns our name of an implementation, whose attention function is registered then."""
    if base not in _KNOWN:
        from transformers import AttentionInterface

        from gohgraph.convert.attention_interface import graph_attention

        AttentionInterface.register(PREFIX + base, partial(graph_attention, base))
        _KNOWN[base] = Implementation(base)
    return _KNOWN[base]
