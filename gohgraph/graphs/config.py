"""Configurations of head graphs: what stands at each site of attention, and the routing of heads."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from gohgraph.common.checks import check_bool, check_int, check_weight
from gohgraph.common.config_base import Config
from gohgraph.graphs.site_config import BaselineConfig, Site, SiteConfig, parts_of, site_from_dict

SITES = ("outputs", "scores", "queries", "keys", "values", "weights")


@dataclass(frozen=True)
class RoutingConfig(Config):
    """Mixture-of-Head routing: which heads a token uses, and how their load is kept balanced.

    Args:
        num_shared: the first heads, always active (0 or more).
        top_k: routed heads a token uses: one number, or a tuple with one for each layer of a stack; 0 when all heads
            are shared.
        straight_through: gates of 0 and 1, as in `HeadRouter`.
        balance_loss: weight of the load-balance loss in a model's training loss (MoH's 0.01 is 0.01 k here: its loss
            is k times ours).
        z_loss: weight of the router z-loss there (0.001 in ST-MoE, arXiv 2202.08906).
        bias_rate: how fast the balance bias moves, per step; 0 for no bias (arXiv 2408.15664 takes 0.001, and no
            `balance_loss`).

    Raises:
        TypeError, ValueError: a number of another type or below 0; in `check_heads`, one that the heads do not have.

    Example:
        >>> RoutingConfig(num_shared=2, top_k=(4, 2)).top_k
        (4, 2)
    """

    num_shared: int
    top_k: int | tuple[int, ...]
    straight_through: bool = False
    balance_loss: float = 0.04
    z_loss: float = 0.0
    bias_rate: float = 0.0

    def __post_init__(self) -> None:
        check_int("num_shared", self.num_shared, low=0)
        check_bool("straight_through", self.straight_through)
        for name in ("balance_loss", "z_loss", "bias_rate"):
            check_weight(name, getattr(self, name))
        if isinstance(self.top_k, list):
            object.__setattr__(self, "top_k", tuple(self.top_k))
        budgets = self.top_k if isinstance(self.top_k, tuple) else (self.top_k,)
        if not budgets:
            raise ValueError("Expected one top_k for all layers or each (got none). Do pass e.g. 4.")
        for number in budgets:
            check_int("top_k", number, low=0)

    def check_heads(self, num_heads: int, num_layers: int) -> None:
        """Raises `ValueError` where a stack of so many heads and layers cannot be routed like this."""
        routed = num_heads - self.num_shared
        budgets = self.top_k if isinstance(self.top_k, tuple) else (self.top_k,) * num_layers
        if len(budgets) != num_layers:
            raise ValueError(f"Expected one top_k for each of {num_layers} layers (got {self.top_k}). Do pass as many.")
        if routed < 0 or not all(min(1, routed) <= k <= routed for k in budgets):
            raise ValueError(
                f"Expected num_shared <= {num_heads} heads, and top_k of at least 1 and at most the others' number, 0 "
                f"if there are none (got num_shared={self.num_shared}, top_k={self.top_k}). Do change them."
            )


@dataclass(frozen=True)
class HeadGraphConfig(Config):
    """The head graphs of an attention block, at its heads' outputs, at scores or further sites, and who is in them.

    A site takes a `SiteConfig`, a `BaselineConfig`, a tuple of them for one after another, or `None` for nothing.
    The default, complete output graphs, is the site that costs least (1.04 of a plain training step at d_model 128).
    It is not chosen for a lower loss: under the default recipe it gains 0.009 ± 0.009 nats of text in a short training,
    none in long ones; a gate on the heads' outputs, `HeadGraphConfig(BaselineConfig("gate"))`, gains as much or more in
    the short one and loses in a long one. Score graphs let many small heads look things up together, which fewer, wider
    heads do without (see docs/experiments.md).

    Args:
        outputs: messages between head outputs, read out in place of concatenating heads.
        scores: messages between attention scores before the softmax.
        routing: Mixture-of-Head routing; messages then flow among the active heads of a token only. `None`: all work.
        alignment: weight, in a model's training loss, of the alignment between heads before and after all rounds of
            messages (`outputs` of graph experts only, see `GraphExperts`).
        queries, keys, values: messages between heads before attention, among key/value heads for the last two.
        weights: messages between attention weights after the softmax.
        layers: indices of the layers that have these graphs, negative ones from the end, e.g. `(-2, -1)`; `None` for
            all. The routing is in every layer.

    Raises:
        TypeError, ValueError: a part of another type, a weight below 0, or an alignment without graph experts.

    Example:
        >>> HeadGraphConfig(scores=SiteConfig.ring(2)).outputs
        SiteConfig()
        >>> HeadGraphConfig.graph_experts(num_shared=2).outputs.topology, HeadGraphConfig.moh(2, top_k=4).outputs
        ('bipartite', None)
    """

    outputs: Site | None = field(default_factory=SiteConfig)
    scores: Site | None = None
    routing: RoutingConfig | None = None
    alignment: float = 0.0
    queries: Site | None = None
    keys: Site | None = None
    values: Site | None = None
    weights: Site | None = None
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in SITES:
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
            for part in parts_of(getattr(self, name)):
                _check_part(name, part)
        if self.routing is not None and not isinstance(self.routing, RoutingConfig):
            raise TypeError(
                f"Expected routing to be a RoutingConfig or None (got {self.routing!r}). Do pass e.g. "
                "RoutingConfig(num_shared=2, top_k=4)."
            )
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))
        if self.layers is not None:
            _check_layers(self.layers)
        check_weight("alignment", self.alignment)
        kinds = [part.kind for part in parts_of(self.outputs)]
        if self.alignment and "experts" not in kinds:
            raise ValueError(
                f"Expected graph experts at outputs for an alignment (got {kinds or None}). Do use graph_experts."
            )

    def at_layer(self, layer: int, num_layers: int) -> HeadGraphConfig:
        """Returns what the layer of that index has in a stack of `num_layers`: everything, or the routing alone.

        Raises:
            ValueError: `layers` names one that the stack does not have.

        Example:
            >>> last = HeadGraphConfig(layers=(-1,))
            >>> [last.at_layer(index, num_layers=3).outputs for index in range(3)]
            [None, None, SiteConfig()]
        """
        if self.layers is None:
            return self
        if unknown := [index for index in self.layers if not -num_layers <= index < num_layers]:
            raise ValueError(
                f"Expected layers among the {num_layers} of the stack (got {unknown}). Do count from 0, or from the "
                "end with -1."
            )
        if layer in self.layers or layer - num_layers in self.layers:
            return self
        return dataclasses.replace(self, alignment=0.0, **dict.fromkeys(SITES))

    @classmethod
    def moh(cls, num_shared: int, top_k: int | tuple[int, ...], **settings: Any) -> HeadGraphConfig:
        """Returns Mixture-of-Head attention (arXiv 2410.11842): routed heads, no messages; see `RoutingConfig`."""
        return cls(outputs=None, routing=RoutingConfig(num_shared, top_k, **settings))

    @classmethod
    def graph_experts(
        cls,
        num_shared: int,
        rounds: int = 2,
        *,
        top_k: int | tuple[int, ...] | None = None,
        alignment: float = 0.0,
        **settings: Any,
    ) -> HeadGraphConfig:
        """Returns graph-convolution experts, in the manner of GaCLLM (arXiv 2402.08859); see `GraphExperts`.

        The first `num_shared` heads and the others are the two kinds of nodes of a bipartite graph.

        Args:
            num_shared: heads of the first kind.
            rounds: R, rounds of one-hop messages.
            top_k: routed heads a token uses; `None` leaves all heads active, without a router.
            alignment: weight of the alignment loss.
            **settings: of `SiteConfig`.
        """
        options = {"num_shared": num_shared}
        site = SiteConfig("bipartite", options, rounds=rounds, kind="experts", num_shared=num_shared, **settings)
        routing = None if top_k is None else RoutingConfig(num_shared, top_k)
        return cls(outputs=site, routing=routing, alignment=alignment)

    @classmethod
    def _nested(cls, values: dict[str, Any]) -> dict[str, Any]:
        made = {name: site_from_dict(values[name]) for name in SITES if values.get(name) is not None}
        if values.get("routing") is not None:
            made["routing"] = RoutingConfig.from_dict(values["routing"])
        return {**values, **made}


def _check_part(name: str, part: Any) -> None:
    if not isinstance(part, (SiteConfig, BaselineConfig)):
        raise TypeError(f"Expected {name} to be a SiteConfig or None (got {part!r}). Do pass SiteConfig().")


def _check_layers(layers: Any) -> None:
    # The exact type: True and 1.5 would pass as 1.
    if not isinstance(layers, tuple) or not layers or any(type(index) is not int for index in layers):
        raise TypeError(f"Expected layers to be None or a tuple of indices (got {layers!r}). Do pass e.g. (-2, -1).")
