"""Configurations: frozen, validated once, stored in every checkpoint."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

FEED_FORWARD_ACTIVATIONS = ("relu", "gelu", "swiglu")
POSITIONS = ("sinusoidal", "learned", "rotary", "none")
NORMS = ("layer", "rms")


class _Config:
    """What every configuration shares: a plain dictionary form that refuses unknown keys."""

    def to_dict(self) -> dict[str, Any]:
        """Returns a dictionary of plain JSON values."""
        return {name: _plain(getattr(self, name)) for name in _names(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]):
        """Builds the configuration from `to_dict`'s form.

        Raises:
            TypeError: `values` is not a dictionary.
            ValueError: an unknown key, or a value the constructor refuses.
        """
        if not isinstance(values, dict):
            raise TypeError(f"Expected a dictionary for {cls.__name__} (got {type(values).__name__}). Do pass one.")
        unknown = sorted(set(values) - set(_names(cls)), key=str)
        if unknown:
            raise ValueError(
                f"Expected keys of {cls.__name__} among {sorted(_names(cls))} (got {unknown}). Do remove them, "
                "or use the gohgraph version that wrote them."
            )
        missing = [f.name for f in dataclasses.fields(cls) if _is_required(f) and f.name not in values]
        if missing:
            raise ValueError(f"Expected {missing} in a dictionary for {cls.__name__} (got none). Do add them.")
        return cls(**cls._nested(values))

    @classmethod
    def _nested(cls, values: dict[str, Any]) -> dict[str, Any]:
        return values


@dataclass(frozen=True)
class SiteConfig(_Config):
    """The head graph at one site of attention: who may send to whom, and how edges are weighted.

    Args:
        topology: a name of `head_graph`, or the edges as (sender, receiver) pairs.
        options: keyword options of a named topology, e.g. `{"hops": 3}`.
        self_loops: adds i -> i to every head.
        edges, rank, activation, rounds, cross_layer, norm, backend: as in `HeadGraphConv`.

    Raises:
        ValueError: a value of the wrong kind; the graph itself is checked when it is built.

    Example:
        >>> SiteConfig.ring(4)
        SiteConfig(topology='ring', options={'hops': 3})
    """

    topology: str | tuple[tuple[int, int], ...] = "complete"
    options: dict[str, Any] = field(default_factory=dict)
    self_loops: bool = True
    edges: str = "token"
    rank: int | None = None
    activation: str | None = "tanh"
    rounds: int = 1
    cross_layer: int = 0
    norm: bool = False
    backend: str = "dense"

    def __post_init__(self) -> None:
        if not isinstance(self.topology, str):
            object.__setattr__(self, "topology", _pairs(self.topology))
        if not isinstance(self.options, dict) or not all(map(_is_option, self.options, self.options.values())):
            raise TypeError(
                f"Expected options to be a dictionary of numbers by name (got {self.options!r}). Do pass e.g. "
                "{'hops': 3}."
            )
        object.__setattr__(self, "options", dict(self.options))
        _check_bool(self, "self_loops", "norm")
        _check_int(self, "rounds", low=1)
        _check_int(self, "cross_layer", low=0)
        _check_choice(self, "edges", ("token", "static", "frozen"))
        _check_choice(self, "activation", ("tanh", None))
        _check_choice(self, "backend", ("dense", "pyg"))
        if self.rank is not None:
            _check_int(self, "rank", low=1)

    @classmethod
    def ring(cls, in_degree: int, **settings: Any) -> SiteConfig:
        """Returns a ring where every head receives from itself and the `in_degree - 1` heads before it."""
        return cls(topology="ring", options={"hops": in_degree - 1}, **settings)

    def __repr__(self) -> str:
        changed = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        default = SiteConfig.__dataclass_fields__
        shown = [f"{name}={value!r}" for name, value in changed if value != _default(default[name])]
        return f"SiteConfig({', '.join(shown)})"


@dataclass(frozen=True)
class HeadGraphConfig(_Config):
    """The head graphs of an attention block: at its heads' outputs, at their scores, or both.

    Args:
        outputs: messages between head outputs, read out in place of concatenating heads; `None` for none.
        scores: messages between attention scores before the softmax; `None` for none.

    Raises:
        TypeError: a site that is not a `SiteConfig`.
        ValueError: a score graph with `norm` or `cross_layer`, which scores do not have.

    Example:
        >>> HeadGraphConfig(scores=SiteConfig.ring(2)).outputs
        SiteConfig()
    """

    outputs: SiteConfig | None = field(default_factory=SiteConfig)
    scores: SiteConfig | None = None

    def __post_init__(self) -> None:
        for name in ("outputs", "scores"):
            site = getattr(self, name)
            if site is not None and not isinstance(site, SiteConfig):
                raise TypeError(f"Expected {name} to be a SiteConfig or None (got {site!r}). Do pass SiteConfig().")
        if self.scores is not None and (self.scores.norm or self.scores.cross_layer):
            raise ValueError(
                "Expected a score graph without norm and cross_layer (got one). Do set both off."
            )

    @classmethod
    def _nested(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {name: None if site is None else SiteConfig.from_dict(site) for name, site in values.items()}


@dataclass(frozen=True)
class TransformerConfig(_Config):
    """The shape of a transformer; every model of the package is built from one.

    Args:
        vocab_size: number of token ids V.
        d_model: width M, a multiple of `num_heads`.
        num_heads: query heads H, the nodes of the head graphs.
        num_kv_heads: key/value heads, a divisor of `num_heads`; `None` for H.
        num_layers: layers per stack (6 in Vaswani et al. 2017).
        d_ff: inner width of the feed-forward.
        max_length: longest sequence, in tokens (learned positions only; the others have no limit).
        activation: `"relu"`, `"gelu"` or `"swiglu"`.
        positions: `"sinusoidal"`, `"learned"`, `"rotary"` or `"none"` (inputs that are a set, or NoPE, arXiv
            2305.19466).
        norm_first: pre-norm (True) or post-norm as in the original.
        norm: `"layer"` or `"rms"`.
        dropout: probability in [0, 1).
        bias: biases in the linear layers.
        tie_embeddings: the output projection reuses the token embedding.
        head_graph: the head graphs of every attention block; `None` is plain attention.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range, named in the message.

    Example:
        >>> config = TransformerConfig(vocab_size=256, d_model=64, num_heads=4, head_graph=HeadGraphConfig())
        >>> TransformerConfig.from_dict(config.to_dict()) == config
        True
    """

    vocab_size: int
    d_model: int = 512
    num_heads: int = 8
    num_kv_heads: int | None = None
    num_layers: int = 6
    d_ff: int = 2048
    max_length: int = 1024
    activation: str = "gelu"
    positions: str = "rotary"
    norm_first: bool = True
    norm: str = "layer"
    dropout: float = 0.0
    bias: bool = True
    tie_embeddings: bool = True
    head_graph: HeadGraphConfig | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "num_heads", "num_layers", "d_ff", "max_length"):
            _check_int(self, name, low=1)
        _check_bool(self, "norm_first", "bias", "tie_embeddings")
        _check_choice(self, "activation", FEED_FORWARD_ACTIVATIONS)
        _check_choice(self, "positions", POSITIONS)
        _check_choice(self, "norm", NORMS)
        if self.d_model % self.num_heads:
            raise ValueError(
                f"Expected d_model to be a multiple of num_heads = {self.num_heads} (got {self.d_model}). "
                "Do change either."
            )
        if self.num_kv_heads is not None:
            _check_int(self, "num_kv_heads", low=1)
            if self.num_heads % self.num_kv_heads:
                raise ValueError(
                    f"Expected num_kv_heads to divide num_heads = {self.num_heads} (got {self.num_kv_heads}). "
                    "Do choose a divisor."
                )
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(
                f"Expected an even head_dim for rotary positions (got {self.head_dim}). Do change d_model or num_heads."
            )
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"Expected dropout in [0, 1) (got {self.dropout!r}). Do pass e.g. 0.1.")
        if self.head_graph is not None and not isinstance(self.head_graph, HeadGraphConfig):
            raise TypeError(f"Expected a HeadGraphConfig or None (got {self.head_graph!r}). Do pass HeadGraphConfig().")

    @property
    def head_dim(self) -> int:
        """D, the features of one head."""
        return self.d_model // self.num_heads

    @classmethod
    def _nested(cls, values: dict[str, Any]) -> dict[str, Any]:
        graph = values.get("head_graph")
        return values if graph is None else {**values, "head_graph": HeadGraphConfig.from_dict(graph)}


@dataclass(frozen=True)
class ClassifierConfig(_Config):
    """A classifier: the transformer's shape, what it reads and how many classes it tells apart.

    Args:
        transformer: the encoder; its `vocab_size` is not used for images.
        num_classes: number of classes.
        patch_size: side of the square patches of an image, in pixels; `None` for token sequences.
        channels: channels of an image.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range, named in the message.

    Example:
        >>> ClassifierConfig(TransformerConfig(vocab_size=256), num_classes=10).channels
        3
    """

    transformer: TransformerConfig
    num_classes: int
    patch_size: int | None = None
    channels: int = 3

    def __post_init__(self) -> None:
        if not isinstance(self.transformer, TransformerConfig):
            raise TypeError(f"Expected a TransformerConfig (got {self.transformer!r}). Do pass one first.")
        for name in ("num_classes", "channels") + (() if self.patch_size is None else ("patch_size",)):
            _check_int(self, name, low=1)

    @classmethod
    def _nested(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "transformer": TransformerConfig.from_dict(values["transformer"])}


def _names(config: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(config)]


def _plain(value: Any) -> Any:
    if isinstance(value, _Config):
        return value.to_dict()
    if isinstance(value, dict):
        return dict(value)
    return [list(pair) for pair in value] if isinstance(value, tuple) else value


def _pairs(topology: Any) -> tuple[tuple[int, int], ...]:
    if not isinstance(topology, (list, tuple)) or not all(map(_is_edge, topology)):
        raise TypeError(
            f"Expected topology to be a name or (sender, receiver) pairs of ints (got {topology!r}). Do pass e.g. "
            "'ring' or [(0, 1), (1, 0)]."
        )
    return tuple((j, i) for j, i in topology)


def _is_edge(pair: Any) -> bool:
    # The exact type: True and 1.5 would pass as 1.
    return isinstance(pair, (list, tuple)) and [type(head) for head in pair] == [int, int]


def _is_option(name: Any, value: Any) -> bool:
    return isinstance(name, str) and (value is None or isinstance(value, (int, float, str)))


def _is_required(definition: dataclasses.Field) -> bool:
    return definition.default is dataclasses.MISSING and definition.default_factory is dataclasses.MISSING


def _default(definition: dataclasses.Field) -> Any:
    made = definition.default_factory
    return definition.default if made is dataclasses.MISSING else made()


def _check_int(config: Any, name: str, *, low: int) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"Expected {name} to be an int (got {value!r}). Do pass a whole number.")
    if value < low:
        raise ValueError(f"Expected {name} >= {low} (got {value}). Do raise it.")


def _check_bool(config: Any, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(config, name), bool):
            raise TypeError(f"Expected {name} to be True or False (got {getattr(config, name)!r}). Do pass a bool.")


def _check_choice(config: Any, name: str, choices: tuple) -> None:
    if getattr(config, name) not in choices:
        raise ValueError(f"Expected {name} of {list(choices)} (got {getattr(config, name)!r}). Do choose one of them.")
