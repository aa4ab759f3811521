"""Configurations of what stands at one site of attention: a head graph, or a published opponent in its place."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from gohgraph.common.config_base import Config, check_bool, check_choice, check_int, default_of


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
        in_degree: makes the topology learned, see `LearnedTopologyConv`: heads are to keep so many incoming edges.
        keyed: edges between scores have a weight of the key's token too, see `KeyedGraphConv`.

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
    keyed: bool = False
    in_degree: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.topology, str):
            object.__setattr__(self, "topology", _pairs(self.topology))
        check_options(self.options)
        object.__setattr__(self, "options", dict(self.options))
        check_bool(self, "self_loops", "norm", "keyed")
        check_int(self, "rounds", low=1)
        check_int(self, "cross_layer", low=0)
        check_choice(self, "edges", ("token", "static", "frozen"))
        check_choice(self, "activation", ("tanh", None))
        check_choice(self, "backend", ("dense", "pyg"))
        for name in ("rank", "top_edges", "num_shared", "in_degree"):
            if getattr(self, name) is not None:
                check_int(self, name, low=1)
        if sum((self.num_shared is not None, self.in_degree is not None, self.keyed)) > 1:
            raise ValueError("Expected one of num_shared, in_degree and keyed (got more). Do set the others off.")

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
class BaselineConfig(Config):
    """What a head graph has to beat, in its place: a published way to let heads talk, or to weigh them.

    Args:
        kind: a name of `gohgraph.graphs.baselines.BASELINES`.
        options: keyword options of that module, e.g. `{"rank": 16}`.

    Raises:
        TypeError: options that are not numbers or words by name.

    Example:
        >>> BaselineConfig("element-gate", {"rank": 16}).options
        {'rank': 16}
    """

    kind: str
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_options(self.options)
        object.__setattr__(self, "options", dict(self.options))


# One module, or several one after another.
Site = SiteConfig | BaselineConfig | tuple[SiteConfig | BaselineConfig, ...]


def site_from_dict(values: Any) -> Any:
    """Returns the site that `Config.to_dict` made `values` of: a dictionary, several of them in a list, or `None`."""
    if isinstance(values, (list, tuple)):
        return tuple(map(site_from_dict, values))
    if not isinstance(values, dict):
        return values
    return (BaselineConfig if "kind" in values else SiteConfig).from_dict(values)


def parts_of(site: Site | None) -> tuple[SiteConfig | BaselineConfig, ...]:
    """Returns the modules of a site in order.

    Example:
        >>> len(parts_of(None)), len(parts_of(SiteConfig()))
        (0, 1)
    """
    return () if site is None else site if isinstance(site, tuple) else (site,)


def check_options(options: Any) -> None:
    """Raises `TypeError` for options that are not a dictionary of numbers or words by name."""
    if not isinstance(options, dict) or not all(map(_is_option, options, options.values())):
        raise TypeError(
            f"Expected options to be a dictionary of numbers by name (got {options!r}). Do pass e.g. {{'hops': 3}}."
        )


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
