"""Configurations of head graphs: the graph at each site of attention, and the routing of heads."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from gohgraph.config_base import Config, check_bool, check_choice, check_int, check_weight, default_of


@dataclass(frozen=True)
class SiteConfig(Config):
    """The head graph at one site of attention: who may send to whom, and how edges are weighted.

    Args:
        topology: a name of `head_graph`, or the edges as (sender, receiver) pairs.
        options: keyword options of a named topology, e.g. `{"hops": 3}`.
        self_loops: adds i -> i to every head.
        edges, rank, activation, rounds, cross_layer, norm, backend, top_edges: as in `HeadGraphConv`.
        num_shared: makes the graph `GraphExperts`, whose first `num_shared` heads are nodes of one kind and the others
            of another; `None` for nodes of one kind.

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
    top_edges: int | None = None
    num_shared: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.topology, str):
            object.__setattr__(self, "topology", _pairs(self.topology))
        if not isinstance(self.options, dict) or not all(map(_is_option, self.options, self.options.values())):
            raise TypeError(
                f"Expected options to be a dictionary of numbers by name (got {self.options!r}). Do pass e.g. "
                "{'hops': 3}."
            )
        object.__setattr__(self, "options", dict(self.options))
        check_bool(self, "self_loops", "norm")
        check_int(self, "rounds", low=1)
        check_int(self, "cross_layer", low=0)
        check_choice(self, "edges", ("token", "static", "frozen"))
        check_choice(self, "activation", ("tanh", None))
        check_choice(self, "backend", ("dense", "pyg"))
        for name in ("rank", "top_edges", "num_shared"):
            if getattr(self, name) is not None:
                check_int(self, name, low=1)

    @classmethod
    def ring(cls, in_degree: int, **settings: Any) -> SiteConfig:
        """Returns a ring where every head receives from itself and the `in_degree - 1` heads before it."""
        return cls(topology="ring", options={"hops": in_degree - 1}, **settings)

    def __repr__(self) -> str:
        changed = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        default = SiteConfig.__dataclass_fields__
        shown = [f"{name}={value!r}" for name, value in changed if value != default_of(default[name])]
        return f"SiteConfig({', '.join(shown)})"


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
        TypeError, ValueError: a value of the wrong type or out of range, named in the message.

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
        check_int(self, "num_shared", low=0)
        check_bool(self, "straight_through")
        for name in ("balance_loss", "z_loss", "bias_rate"):
            check_weight(self, name)
        if isinstance(self.top_k, list):
            object.__setattr__(self, "top_k", tuple(self.top_k))
        budgets = self.top_k if isinstance(self.top_k, tuple) else (self.top_k,)
        if not budgets or any(isinstance(k, bool) or not isinstance(k, int) or k < 0 for k in budgets):
            raise ValueError(f"Expected top_k >= 0, for all layers or each (got {self.top_k!r}). Do pass e.g. 4.")

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
    """The head graphs of an attention block, at its heads' outputs, at their scores, or both, and who is in them.

    Args:
        outputs: messages between head outputs, read out in place of concatenating heads; `None` for none.
        scores: messages between attention scores before the softmax; `None` for none.
        routing: Mixture-of-Head routing; messages then flow among the active heads of a token only. `None`: all work.
        alignment: weight, in a model's training loss, of the alignment between heads before and after all rounds of
            messages (`outputs` with `num_shared` only, see `GraphExperts`).

    Raises:
        TypeError: a site that is not a `SiteConfig`, a routing that is not a `RoutingConfig`.
        ValueError: a score graph with `norm`, `cross_layer` or `num_shared`, which scores do not have; an alignment
            without graph experts.

    Example:
        >>> HeadGraphConfig(scores=SiteConfig.ring(2)).outputs
        SiteConfig()
    """

    outputs: SiteConfig | None = field(default_factory=SiteConfig)
    scores: SiteConfig | None = None
    routing: RoutingConfig | None = None
    alignment: float = 0.0

    def __post_init__(self) -> None:
        for name in ("outputs", "scores"):
            site = getattr(self, name)
            if site is not None and not isinstance(site, SiteConfig):
                raise TypeError(f"Expected {name} to be a SiteConfig or None (got {site!r}). Do pass SiteConfig().")
        if self.scores is not None and (self.scores.norm or self.scores.cross_layer or self.scores.num_shared):
            raise ValueError(
                "Expected a score graph without norm, cross_layer and num_shared (got one). Do set them off."
            )
        if self.routing is not None and not isinstance(self.routing, RoutingConfig):
            raise TypeError(
                f"Expected routing to be a RoutingConfig or None (got {self.routing!r}). Do pass e.g. "
                "RoutingConfig(num_shared=2, top_k=4)."
            )
        check_weight(self, "alignment")
        if self.alignment and (self.outputs is None or self.outputs.num_shared is None):
            raise ValueError("Expected outputs with num_shared for an alignment (got none). Do use graph_experts.")

    @classmethod
    def moh(cls, num_shared: int, top_k: int | tuple[int, ...], **settings: Any) -> HeadGraphConfig:
        """Returns Mixture-of-Head attention (arXiv 2410.11842): routed heads, no messages.

        Args:
            num_shared, top_k, **settings: of `RoutingConfig`.

        Example:
            >>> HeadGraphConfig.moh(num_shared=2, top_k=4).outputs is None
            True
        """
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

        Example:
            >>> HeadGraphConfig.graph_experts(num_shared=2, rounds=3).outputs.topology
            'bipartite'
        """
        options = {"num_shared": num_shared}
        site = SiteConfig("bipartite", options, rounds=rounds, num_shared=num_shared, **settings)
        routing = None if top_k is None else RoutingConfig(num_shared, top_k)
        return cls(outputs=site, routing=routing, alignment=alignment)

    @classmethod
    def _nested(cls, values: dict[str, Any]) -> dict[str, Any]:
        parts = {"outputs": SiteConfig, "scores": SiteConfig, "routing": RoutingConfig}
        made = {name: parts[name].from_dict(values[name]) for name in parts if values.get(name) is not None}
        return {**values, **made}


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
