"""Flags of a command line that describe head graphs and routing, and the configuration they make."""

import argparse
from typing import Any

from gohgraph.graphs.config import HeadGraphConfig, RoutingConfig
from gohgraph.graphs.cross_layer import ALL, FIRST
from gohgraph.graphs.site_config import SiteConfig
from gohgraph.graphs.topologies import TOPOLOGIES

SITES = ("none", "outputs", "scores", "both")
# None and False tell a flag that is not given; what it is by default is said in its help.
OUTPUT_FLAGS = ("topology", "in_degree", "cross_layer", "edge_norm", "experts")
SCORE_FLAGS = ("score_topology", "score_in_degree")
EDGE_FLAGS = ("rank", "rounds", "top_edges", "graph_layers")
ROUTER_FLAGS = ("top_k", "balance_loss", "z_loss", "bias_rate", "straight_through", "anneal_top_k")


def add_graph_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags to a parser, in two groups of its help."""
    graph = parser.add_argument_group("head graph").add_argument
    graph("--sites", choices=SITES, default="outputs", help="where heads send messages")
    graph("--topology", choices=sorted(TOPOLOGIES), help="graph over head outputs (default: complete)")
    graph("--in-degree", type=int, help="senders of each head, itself included (ring, random)")
    graph("--score-topology", choices=sorted(TOPOLOGIES), help="graph over attention scores (default: ring)")
    graph("--score-in-degree", type=int, help="as --in-degree, for scores (default: 2 in a ring)")
    graph("--edges", choices=("token", "static", "frozen"), default="token", help="how edges are weighted")
    graph("--rank", type=int, help="low rank of token edges (default: full)")
    graph("--edge-activation", choices=("tanh", "none"), default="tanh")
    graph("--rounds", type=int, help="rounds of message passing (default: 1, with --experts 2)")
    graph("--cross-layer", type=_layers, help="earlier layers whose heads send too: a number, first or all (outputs)")
    graph("--edge-norm", action="store_true", help="normalise messages per head (outputs)")
    graph("--top-edges", type=int, help="per token, each head keeps so many incoming edges (default: all)")
    graph("--graph-layers", type=int, nargs="+", help="layers that have the graphs, from the end by -1 (default: all)")
    graph("--experts", action="store_true", help="graph experts: messages between two kinds of heads (outputs)")
    graph("--alignment", type=float, help="weight of the experts' alignment loss (default: 0)")
    route = parser.add_argument_group("head routing").add_argument
    route("--router", action="store_true", help="each token chooses its heads (Mixture-of-Head)")
    route("--num-shared", type=int, help="heads always active; of --experts, the first kind (default: a quarter)")
    route("--top-k", type=int, nargs="+", help="further heads a token uses, in all layers or each (default: to 75 %%)")
    route("--balance-loss", type=float, help=f"weight of the load-balance loss (default: {RoutingConfig.balance_loss})")
    route("--z-loss", type=float, help="weight of the router z-loss (default: 0)")
    route("--bias-rate", type=float, help="how far the balance bias moves a step (default: 0, no bias)")
    route("--straight-through", action="store_true", help="gates of 0 and 1")
    route("--anneal-top-k", type=int, help="steps over which k falls from all routed heads to --top-k (default: 0)")


def graph_from_flags(flags: argparse.Namespace, num_heads: int) -> HeadGraphConfig | None:
    """Returns the head graphs and the routing of `num_heads` heads; `None` for plain attention.

    By default a quarter of the heads are shared, and three quarters work for a token.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_graph_flags(parser)
        >>> graph_from_flags(parser.parse_args("--sites none --router".split()), num_heads=8)
        HeadGraphConfig(outputs=None, scores=None, routing=RoutingConfig(num_shared=2, top_k=4, ...), ...)
    """
    _check(flags)
    edges = {"edges": flags.edges, "rank": flags.rank, "top_edges": flags.top_edges}
    edges["activation"] = None if flags.edge_activation == "none" else flags.edge_activation
    at_outputs = {**edges, "cross_layer": flags.cross_layer or 0, "norm": flags.edge_norm}
    rounds = flags.rounds if flags.rounds is not None else 2 if flags.experts else 1
    num_shared = round(num_heads / 4) if flags.num_shared is None else flags.num_shared
    outputs = scores = None
    if flags.experts:
        outputs = HeadGraphConfig.graph_experts(num_shared, rounds, **at_outputs).outputs
    elif flags.sites in ("outputs", "both"):
        place = _topology(flags.topology or "complete", flags.in_degree, "--in-degree")
        outputs = SiteConfig(**place, **at_outputs, rounds=rounds)
    if flags.sites in ("scores", "both"):
        place = _topology(flags.score_topology or "ring", flags.score_in_degree, "--score-in-degree")
        scores = SiteConfig(**place, **edges, rounds=rounds)
    routing = _routing(flags, num_heads, num_shared) if flags.router else None
    if outputs is scores is routing is None:
        return None
    layers = tuple(flags.graph_layers) if flags.graph_layers else None
    return HeadGraphConfig(outputs, scores, routing, flags.alignment or 0.0, layers=layers)


def _check(flags: argparse.Namespace) -> None:
    """A flag that would change nothing is an error."""
    if flags.sites in ("none", "outputs"):
        _refuse(flags, SCORE_FLAGS, f"with --sites {flags.sites}", "add the site")
    if flags.sites in ("none", "scores"):
        _refuse(flags, OUTPUT_FLAGS, f"with --sites {flags.sites}", "add the site")
    if flags.sites == "none":
        _refuse(flags, EDGE_FLAGS, "with --sites none", "add a site")
    if flags.experts:
        _refuse(flags, ("topology", "in_degree"), "with --experts, whose graph is bipartite", "drop --experts")
    else:
        _refuse(flags, ("alignment",), "without --experts", "add --experts")
    if not flags.router:
        _refuse(flags, ROUTER_FLAGS, "without --router", "add --router")
    if not flags.router and not flags.experts:
        _refuse(flags, ("num_shared",), "without --router or --experts", "add one")


def _routing(flags: argparse.Namespace, num_heads: int, num_shared: int) -> RoutingConfig:
    top_k: int | tuple[int, ...]
    if flags.top_k is None:
        routed = max(0, num_heads - num_shared)
        top_k = min(max(1, round(0.75 * num_heads) - num_shared), routed)
    else:
        top_k = flags.top_k[0] if len(flags.top_k) == 1 else tuple(flags.top_k)
    weights = {name: getattr(flags, name) for name in ("balance_loss", "z_loss", "bias_rate")}
    given = {name: weight for name, weight in weights.items() if weight is not None}
    return RoutingConfig(num_shared, top_k, straight_through=flags.straight_through, **given)


def _layers(text: str) -> int | str:
    return text if text in (FIRST, ALL) else int(text)


def _topology(name: str, in_degree: int | None, flag: str) -> dict[str, Any]:
    if in_degree is None:
        return {"topology": name}
    option = {"ring": "hops", "random": "in_degree"}.get(name)
    if option is None:
        raise ValueError(f"Expected a ring or random topology with {flag} (got {name}). Do drop it or change topology.")
    if in_degree < 1:
        raise ValueError(f"Expected {flag} of at least 1, the head itself (got {in_degree}). Do raise it.")
    return {"topology": name, "options": {option: in_degree - 1}}


def _refuse(flags: argparse.Namespace, names: tuple[str, ...], why: str, remedy: str) -> None:
    for name in names:
        value = getattr(flags, name)
        if value is not None and value is not False:
            flag = "--" + name.replace("_", "-")
            given = flag if value is True else f"{flag} {value}"
            raise ValueError(f"Expected no {flag} {why} (got {given}). Do drop it, or {remedy}.")
