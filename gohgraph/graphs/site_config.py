"""Configurations of what stands at one site of attention: a head graph, or a published opponent in its place."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from gohgraph.common.checks import check_bool, check_choice, check_int, check_number
from gohgraph.common.config_base import Config, default_of
from gohgraph.graphs.cross_layer import CrossLayer

KINDS = ("plain", "experts", "learned", "keyed")


@dataclass(frozen=True)
class SiteConfig(Config):
    """The head graph at one site of attention: who may send to whom, and how edges are weighted.

    Args:
        topology: a name of `head_graph`, or the edges as (sender, receiver) pairs.
        options: keyword options of a named topology, e.g. `{"hops": 3}`.
        self_loops: adds i -> i to every head.
        edges, rank, activation, rounds, norm, backend, top_edges: as in `HeadGraphConv`.
        cross_layer: which earlier layers' heads send too: the w nearest, `"first"`, `"all"`, or a `CrossLayer` that
            says over which edges and how loud. For outputs, queries, keys and values.
        kind: `"plain"`; `"experts"`, see `GraphExperts`; `"learned"`, a learned topology, see `LearnedTopologyConv`; or
            `"keyed"`, edges between scores that have a weight of the key's token too, see `KeyedGraphConv`.
        num_shared: of experts, the first heads, nodes of one kind; the others are of another.
        keep_in_degree: of a learned topology, how many incoming edges every head is to keep.
        learning_rate_factor: of the rate that head graphs learn at, > 0.

    Raises:
        TypeError, ValueError: a value of another type or out of its range, or an option of another kind.

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
    cross_layer: int | str | CrossLayer = 0
    norm: bool = False
    backend: str = "dense"
    top_edges: int | None = None
    kind: str = "plain"
    num_shared: int | None = None
    keep_in_degree: int | None = None
    learning_rate_factor: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.topology, str):
            object.__setattr__(self, "topology", _pairs(self.topology))
        check_options(self.options)
        object.__setattr__(self, "options", dict(self.options))
        for name in ("self_loops", "norm"):
            check_bool(name, getattr(self, name))
        check_choice("kind", self.kind, KINDS)
        check_int("rounds", self.rounds, low=1)
        CrossLayer.of(self.cross_layer)
        check_choice("edges", self.edges, ("token", "static", "frozen"))
        check_choice("activation", self.activation, ("tanh", None))
        check_choice("backend", self.backend, ("dense", "pyg"))
        check_number("learning_rate_factor", self.learning_rate_factor, above=0)
        for name in ("rank", "top_edges", "num_shared", "keep_in_degree"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), low=1)
        for name, kind in (("num_shared", "experts"), ("keep_in_degree", "learned")):
            value = getattr(self, name)
            if (value is not None) != (self.kind == kind):
                raise ValueError(
                    f"Expected {name} with kind={kind!r} and only there (got {name}={value!r}, kind={self.kind!r}). Do "
                    "change either."
                )

    @classmethod
    def ring(cls, in_degree: int, **settings: Any) -> SiteConfig:
        """Returns a ring where every head receives from itself and the `in_degree - 1` heads before it."""
        return cls(topology="ring", options={"hops": in_degree - 1}, **settings)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SiteConfig:
        """Builds the configuration from `to_dict`'s form, also that of versions without `kind`."""
        return super().from_dict(_with_kind(values) if isinstance(values, dict) else values)

    @classmethod
    def _nested(cls, values: dict[str, Any]) -> dict[str, Any]:
        cross_layer = values.get("cross_layer")
        return {**values, "cross_layer": CrossLayer.from_dict(cross_layer)} if isinstance(cross_layer, dict) else values

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
        learning_rate_factor: of the rate that head graphs learn at, > 0.

    Example:
        >>> BaselineConfig("gate", {"rank": 16}).options
        {'rank': 16}
    """

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    learning_rate_factor: float = 1.0

    def __post_init__(self) -> None:
        check_options(self.options)
        check_number("learning_rate_factor", self.learning_rate_factor, above=0)
        object.__setattr__(self, "options", dict(self.options))


# One module, or several one after another.
Site = SiteConfig | BaselineConfig | tuple[SiteConfig | BaselineConfig, ...]


def site_from_dict(values: Any) -> Any:
    """Returns the site that `Config.to_dict` made `values` of: a dictionary, several of them in a list, or `None`."""
    if isinstance(values, (list, tuple)):
        return tuple(map(site_from_dict, values))
    if not isinstance(values, dict):
        return values
    return (SiteConfig if values.get("kind", "plain") in KINDS else BaselineConfig).from_dict(values)


def parts_of(site: Site | None) -> tuple[SiteConfig | BaselineConfig, ...]:
    """Returns the modules of a site in order, none for `None`."""
    return () if site is None else site if isinstance(site, tuple) else (site,)


def check_options(options: Any) -> None:
    """Raises `TypeError` for options that are not a dictionary of numbers or words by name."""
    if not isinstance(options, dict) or not all(map(_is_option, options, options.values())):
        raise TypeError(
            f"Expected options to be a dictionary of numbers by name (got {options!r}). Do pass e.g. {{'hops': 3}}."
        )


def upgraded(values: Any) -> Any:
    """Returns JSON values in which the sites of older versions, which had flags in place of `kind`, are as today's.

    Example:
        >>> upgraded([{"topology": "ring", "keyed": True, "in_degree": None}])
        [{'topology': 'ring', 'kind': 'keyed', 'keep_in_degree': None}]
    """
    if isinstance(values, list):
        return [upgraded(value) for value in values]
    if not isinstance(values, dict):
        return values
    values = {name: upgraded(value) for name, value in values.items()}
    return _with_kind(values) if {"topology", "keyed"} <= set(values) else values


def _with_kind(values: dict[str, Any]) -> dict[str, Any]:
    """A dictionary written before there was `kind`, as one of today."""
    if "kind" in values:
        return values
    values = dict(values)
    keyed, keep_in_degree = values.pop("keyed", False), values.pop("in_degree", None)
    flags = {"keyed": keyed, "learned": keep_in_degree is not None, "experts": values.get("num_shared") is not None}
    kind = next((name for name, is_set in flags.items() if is_set), "plain")
    return {**values, "kind": kind, "keep_in_degree": keep_in_degree}


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
