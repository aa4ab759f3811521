"""What every configuration shares: a plain dictionary form, and defaults by field."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from typing_extensions import Self

Kind = TypeVar("Kind", bound=type)


class Config:
    """What every configuration shares: a plain dictionary form that refuses unknown keys."""

    def to_dict(self) -> dict[str, Any]:
        """Returns a dictionary of plain JSON values."""
        return {name: _plain(getattr(self, name)) for name in _names(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Builds the configuration from `to_dict`'s form."""
        if not isinstance(values, dict):
            raise TypeError(f"Expected a dictionary for {cls.__name__} (got {type(values).__name__}). Do pass one.")
        unknown = sorted(set(values) - set(_names(cls)), key=str)
        if unknown:
            raise ValueError(
                f"Expected keys of {cls.__name__} among {sorted(_names(cls))} (got {unknown}). Do remove them, "
                "or use the gohgraph version that wrote them."
            )
        without = [f.name for f in _fields(cls) if default_of(f) is dataclasses.MISSING]
        missing = [name for name in without if name not in values]
        if missing:
            got = sorted(values)
            raise ValueError(f"Expected {missing} in a dictionary for {cls.__name__} (got only {got}). Do add them.")
        return cls(**cls._nested(values))

    @classmethod
    def _nested(cls, values: dict[str, Any]) -> dict[str, Any]:
        return values


def _names(config: Any) -> list[str]:
    return [f.name for f in _fields(config)]


def _fields(config: Any) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(config)


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, dict):
        return dict(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def default_of(definition: dataclasses.Field) -> Any:
    """Returns the default value of a dataclass field, `dataclasses.MISSING` where it has none."""
    made = definition.default_factory
    return definition.default if made is dataclasses.MISSING else made()


def ignores(*names: str) -> Callable[[Kind], Kind]:
    """Lets what others set on any model's configuration pass without effect on a frozen one; all else is refused.

    Example:
        >>> @ignores("use_cache")
        ... @dataclasses.dataclass(frozen=True)
        ... class Size:
        ...     heads: int
        >>> size = Size(3)
        >>> size.use_cache = False
        >>> size.heads = 4
        Traceback (most recent call last):
        dataclasses.FrozenInstanceError: cannot assign to field 'heads'
    """

    def decorate(kind: Kind) -> Kind:
        changed: Any = kind
        refuse = changed.__setattr__

        def __setattr__(self: Any, name: str, value: Any) -> None:
            if name not in names:
                refuse(self, name, value)

        changed.__setattr__ = __setattr__
        return kind

    return decorate
