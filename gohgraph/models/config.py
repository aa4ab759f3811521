"""Configurations of models: frozen, validated once, stored in every checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gohgraph.common.checks import check_bool, check_choice, check_int, check_number
from gohgraph.common.config_base import Config, ignores
from gohgraph.graphs.config import HeadGraphConfig

FEED_FORWARD_ACTIVATIONS = ("relu", "relu2", "gelu", "swiglu")
POSITIONS = ("sinusoidal", "learned", "rotary", "none")
NORMS = ("layer", "rms", "unweighted-rms")
RESIDUALS = ("plain", "hyper", "dynamic-hyper", "dense")
INITS = ("normal", "fan-in", "fan-in-zero")
# What a dictionary means that was written before these fields were.
BEFORE = {"qk_norm": False, "embedding_norm": False, "logit_cap": None, "init": "normal", "residual": "plain"}


# transformers' Trainer sets it on the configuration of every model; these keep no cache but where they are given one.
@ignores("use_cache")
@dataclass(frozen=True)
class TransformerConfig(Config):
    """The shape of a transformer; every model of the package is built from one.

    Args:
        vocab_size: number of token ids V.
        d_model: width M, a multiple of `num_heads`.
        num_heads: query heads H, the nodes of the head graphs.
        num_kv_heads: key/value heads, a divisor of `num_heads`; `None` for H.
        num_layers: layers per stack (6 in Vaswani et al. 2017).
        d_ff: inner width of the feed-forward.
        max_length: longest sequence, in tokens (learned positions only; the others have no limit).
        activation: `"relu"`, `"relu2"`, `"gelu"` or `"swiglu"`, as in `FeedForward`.
        positions: `"sinusoidal"`, `"learned"`, `"rotary"` or `"none"` (inputs that are a set, or NoPE, arXiv
            2305.19466).
        norm_first: pre-norm (True) or post-norm as in the original.
        norm: `"layer"`, `"rms"`, or `"unweighted-rms"` without a gain.
        qk_norm: RMS that queries and keys of every head start with before rotary positions, see `QueryKeyNorm`; 0
            leaves them as they are, True is 1.
        embedding_norm: the embedding is normalised before the first layer.
        logit_cap: c, logits become c tanh(logits / c) (Gemma 2, arXiv 2408.00118, section 2); `None` for no cap.
        init: how matrices start, `"normal"`, `"fan-in"` or `"fan-in-zero"`, see `gohgraph.models.init`.
        residual: `"plain"`; hyper-connections between four streams, static `"hyper"` or by the token
            `"dynamic-hyper"`, see `HyperConnection`; or `"dense"` ones before the last two layers, see
            `DenseConnection`.
        dropout: probability in [0, 1).
        bias: biases in the linear layers.
        tie_embeddings: the output projection reuses the token embedding.
        head_graph: the head graphs of every attention block; `None` is plain attention.

    Raises:
        TypeError, ValueError: a value of another type, out of its range, or that does not go with the others.

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
    qk_norm: float = 1.0
    embedding_norm: bool = False
    logit_cap: float | None = None
    init: str = "fan-in"
    residual: str = "plain"
    dropout: float = 0.0
    bias: bool = True
    tie_embeddings: bool = True
    head_graph: HeadGraphConfig | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "num_heads", "num_layers", "d_ff", "max_length"):
            check_int(name, getattr(self, name), low=1)
        for name in ("norm_first", "embedding_norm", "bias", "tie_embeddings"):
            check_bool(name, getattr(self, name))
        check_choice("activation", self.activation, FEED_FORWARD_ACTIVATIONS)
        check_choice("positions", self.positions, POSITIONS)
        check_choice("norm", self.norm, NORMS)
        check_choice("init", self.init, INITS)
        if not isinstance(self.qk_norm, bool):
            check_number("qk_norm", self.qk_norm, low=0)
        # As configurations were written while it was a flag.
        object.__setattr__(self, "qk_norm", float(self.qk_norm))
        self._check_residual()
        if self.logit_cap is not None:
            check_number("logit_cap", self.logit_cap, above=0)
        if self.d_model % self.num_heads:
            raise ValueError(
                f"Expected d_model to be a multiple of num_heads = {self.num_heads} (got {self.d_model}). Do change it."
            )
        if self.num_kv_heads is not None:
            check_int("num_kv_heads", self.num_kv_heads, low=1)
            if self.num_heads % self.num_kv_heads:
                raise ValueError(
                    f"Expected num_kv_heads to divide num_heads = {self.num_heads} (got {self.num_kv_heads}). "
                    "Do choose a divisor."
                )
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(
                f"Expected an even head_dim for rotary positions (got {self.head_dim}). Do change d_model or num_heads."
            )
        check_number("dropout", self.dropout, low=0, below=1)
        if self.head_graph is not None and not isinstance(self.head_graph, HeadGraphConfig):
            raise TypeError(f"Expected a HeadGraphConfig or None (got {self.head_graph!r}). Do pass HeadGraphConfig().")
        if self.head_graph is not None and self.head_graph.routing is not None:
            self.head_graph.routing.check_heads(self.num_heads, self.num_layers)

    def _check_residual(self) -> None:
        check_choice("residual", self.residual, RESIDUALS)
        if self.residual != "plain" and not self.norm_first:
            raise ValueError(f"Expected norm_first=True with residual={self.residual!r} (got False). Do change either.")
        if self.residual == "dense" and self.num_layers < 2:
            raise ValueError(
                f"Expected at least 2 layers for residual='dense' (got {self.num_layers}). Do change either."
            )

    @property
    def head_dim(self) -> int:
        """D, the features of one head."""
        return self.d_model // self.num_heads

    @classmethod
    def _nested(cls, values: dict[str, Any]) -> dict[str, Any]:
        values, graph = {**BEFORE, **values}, values.get("head_graph")
        return values if graph is None else {**values, "head_graph": HeadGraphConfig.from_dict(graph)}


def with_settings_of_before(values: Any) -> Any:
    """Returns JSON values in which dictionaries of a `TransformerConfig` have its younger fields, as they were then.

    Example:
        >>> with_settings_of_before({"model": {"d_model": 8, "positions": "none"}})["model"]["init"]
        'normal'
    """
    if not isinstance(values, dict):
        return values
    values = {name: with_settings_of_before(value) for name, value in values.items()}
    return {**BEFORE, **values} if {"d_model", "positions"} <= set(values) else values


@ignores("use_cache")
@dataclass(frozen=True)
class ClassifierConfig(Config):
    """A classifier: the transformer's shape, what it reads and how many classes it tells apart.

    Args:
        transformer: the encoder; its `vocab_size` is not used for images.
        num_classes: number of classes.
        patch_size: side of the square patches of an image, in pixels; `None` for token sequences.
        channels: channels of an image.

    Raises:
        TypeError, ValueError: a value of another type or out of its range.

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
            check_int(name, getattr(self, name), low=1)

    @classmethod
    def _nested(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "transformer": TransformerConfig.from_dict(values["transformer"])}
