"""What stands at a site of attention: one protocol for head graphs, their opponents, and modules of your own.

A site is a place in attention where heads can hear of each other. At `outputs`, `queries`, `keys` and `values` the
nodes are heads with features; at `scores` and `weights` they are the heads' attention maps over keys.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gohgraph.graphs.cross_layer import Reach
from gohgraph.graphs.token_edges import TokenEdges

FEATURES = frozenset({"outputs", "queries", "keys", "values"})
MAPS = frozenset({"scores", "weights"})
ALIGNMENT = "alignment"
# What is asked for of a training loss, by name, and what graphs have put there.
Losses = dict[str, list[Tensor]]


class Traits(NamedTuple):
    """What a graph says of itself once, so that nobody has to probe it.

    Args:
        num_heads: H, the nodes.
        sites: where it can stand: of `FEATURES` and `MAPS`.
        reach: the earlier layers whose nodes at its site it reads: w for the w before, `"first"`, `"all"`.
        linear: nodes' = W nodes with one matrix W `[H, H]` a token, the same for every feature: it has `matrix`.
        static: it is the same linear map of all heads' features for every token: it can be folded into a projection.
        keyed: it reads a state of the keys' tokens, which `key_state` makes of them.
        losses: names of what it adds to the training loss.
        in_degree: the most senders of a receiver, itself included, where `sparse` knows fewer than all; else 0.
        sharded: its heads may lie on several ranks, see `gohgraph.parallel.sharded_graph`.
        weight_decay: the optimizer decays its matrices. A start at zero is no prior: by default it does not.
        limited_by: the option that keeps it from further sites, for messages, e.g. `"norm=True"`.
        learning_rate_factor: of the optimizer's rate for graphs, > 0; graphs inside have the product of all around.
        run: messages stay within runs of so many heads, one after another; 0 for all heads.
        joins_keys: attention is one softmax over the keys of all heads of a run; its forms see to it.
        reads_values: of a graph at outputs, it is handed the values of the tokens themselves, `values`.
        learned: its topology is: training prunes it, see `LearnedTopologyConv`.
    """

    num_heads: int
    sites: frozenset[str] = FEATURES | MAPS
    reach: Reach = 0
    linear: bool = False
    static: bool = False
    keyed: bool = False
    losses: tuple[str, ...] = ()
    in_degree: int = 0
    sharded: bool = False
    weight_decay: bool = False
    limited_by: str = ""
    learning_rate_factor: float = 1.0
    run: int = 0
    joins_keys: bool = False
    reads_values: bool = False
    learned: bool = False

    @property
    def most_senders(self) -> int:
        """Of a graph that has `sparse`, the most senders of a receiver; 0 where it has not."""
        return self.in_degree or (self.num_heads if self.linear else 0)


class Sparse(NamedTuple):
    """A linear graph over maps as every receiver's few senders: what attention over wider heads needs.

    Args:
        senders: `[H, k]`, the heads that each receiver reads.
        weights: w, `[B, T, H, k]` or `[H, k]`, identity included; zero where a receiver has fewer senders.
        key_weights: u, `[B, S, H, k]`, of keyed graphs; `None` for 1.
    """

    senders: Tensor
    weights: Tensor
    key_weights: Tensor | None = None


class SiteGraph(nn.Module, ABC):
    r"""A module at a site of attention: nodes in, nodes out, under the context of their token.

    .. math:: z'(t) = f\big(z(t);\, x(t)\big), \qquad z, z' \in \mathbb{R}^{H \times F}

    Subclasses set `traits` in their constructor and define `forward`; a graph that is linear has `matrix`, one that is
    keyed has `key_state`. Everything else follows from the traits: where it may stand, in which form attention is
    computed around it, and what can be recorded, folded and pruned.

    Shape:
        nodes `[*, H, F]`, context `[*, M]` -> `[*, H, F]`.

    Example:
        >>> class Mean(SiteGraph):
        ...     def __init__(self, num_heads: int) -> None:
        ...         super().__init__()
        ...         self.traits = Traits(num_heads, sites=FEATURES)
        ...         self.share = nn.Parameter(torch.zeros(()))
        ...     def forward(self, nodes, context=None, earlier=(), active=None, *, keys=None, losses=None):
        ...         return nodes + self.share * nodes.mean(dim=-2, keepdim=True)
        >>> import gohgraph as goh
        >>> y, _ = goh.MultiHeadAttention(20, 5, output_graph=Mean(5))(torch.randn(2, 3, 20))
        >>> y.shape
        torch.Size([2, 3, 20])
    """

    traits: Traits

    @abstractmethod
    def forward(
        self,
        nodes: Tensor,
        context: Tensor | None = None,
        earlier: Sequence[Tensor] = (),
        active: Tensor | None = None,
        *,
        keys: Tensor | None = None,
        losses: Losses | None = None,
        values: Tensor | None = None,
    ) -> Tensor:
        """Passes messages between the nodes, `[*, H, F] -> [*, H, F]`.

        Args:
            context: `[*, M]`, the attention block's own input.
            earlier: with `reach`, the nodes `[*, H, F]` of the earlier layers it names, nearest first: those of the
                same tokens at the same site, after messages and before rotary positions, zero for heads that were off.
                Where fewer layers are before, there are fewer.
            active: bool `[*, H]`, the heads that work for a token; `None` for all.
            keys: of a keyed graph, what `key_state` made of the keys' tokens, `[B, S, U]`.
            losses: takes in what the graph adds to the training loss: under those of its names that are asked for, a
                number for every node, `[*, H]`.
            values: `[*, H, F]`, every head's value of the token itself; handed over where the traits ask for it.
        """

    if TYPE_CHECKING:
        __call__ = forward

    def key_state(self, source: Tensor) -> Tensor | None:
        """Returns what a keyed graph needs of the keys' tokens, `[B, S, M] -> [B, S, U]`; a cache keeps it."""
        return None

    def matrix(self, context: Tensor | None = None, active: Tensor | None = None) -> Tensor:
        """Returns W of a linear graph, nodes' = W nodes: `[*, H, H]`, or `[H, H]` for all tokens; else `ValueError`."""
        raise ValueError(
            f"Expected a graph that is linear in the nodes (got {type(self).__name__}). Do check traits.linear."
        )

    def token_edges(self, nodes: Tensor, context: Tensor, active: Tensor | None) -> TokenEdges | None:
        """Returns what the matrices of a complete graph are computed from, where they are too many to keep."""
        return None

    def sparse(self, context: Tensor | None, active: Tensor | None = None, keys: Tensor | None = None) -> Sparse:
        """Returns every receiver's senders and their weights; of a linear graph at least all heads and its matrix."""
        matrix = self.matrix(context, active)  # [*, H, H]
        senders = torch.arange(matrix.shape[-1], device=matrix.device).expand(matrix.shape[-2:])  # [H, H]
        return Sparse(senders, matrix)

    def gather_senders(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Returns queries and keys with those of senders elsewhere appended; here all are at hand."""
        return q, k


def check_site(site: str, graph: SiteGraph, num_heads: int, allowed: Collection[str] = ("whole",)) -> None:
    """Raises `ValueError` for a graph that cannot stand at a site, naming what does not fit.

    Args:
        site: of `FEATURES` and `MAPS`.
        graph, num_heads: what is to stand there, and the nodes there.
        allowed: what whoever holds the site can give: `"reach"`, heads of earlier layers; `"keyed"`, the keys' tokens;
            `"nonlinear"`, whole maps for graphs over them that are no matrix; `"whole"`, all heads on one rank;
            `"values"`, the tokens' own values; `"joined keys"`, one softmax over the keys of several heads.
    """
    traits, name = graph.traits, type(graph).__name__
    if traits.num_heads != num_heads:
        raise ValueError(
            f"Expected a graph over {num_heads} heads at {site} (got {name} over {traits.num_heads}). Do build it for "
            f"{num_heads}."
        )
    if site not in traits.sites:
        limit = f" with {traits.limited_by}" if traits.limited_by else ""
        raise ValueError(
            f"Expected a graph that can stand at {site} (got {name}{limit}, which is for "
            f"{', '.join(sorted(traits.sites))}). Do move it there, or build another one."
        )
    if not traits.sharded and "whole" not in allowed:
        raise ValueError(
            f"Expected a HeadGraphConv at {site}, whose heads may lie on several ranks (got {name}). Do replace it, or "
            "train data parallel: ddp or fsdp."
        )
    if traits.reach and "reach" not in allowed:
        raise ValueError(
            f"Expected no heads of earlier layers at {site} here (got cross_layer={traits.reach!r}). Do "
            "set cross_layer=0; gohgraph's own models have them at outputs, queries, keys and values."
        )
    if traits.keyed and "keyed" not in allowed:
        raise ValueError(
            f"Expected messages by the query's token alone at {site} here (got {name}, which reads the keys' tokens). "
            "Do leave it out; gohgraph's own models have it at scores."
        )
    if traits.reads_values and "values" not in allowed:
        raise ValueError(
            f"Expected no graph that reads the tokens' own values at {site} here (got {name}). Do leave it out; "
            "gohgraph's own models have it at outputs."
        )
    if traits.joins_keys and "joined keys" not in allowed:
        raise ValueError(
            f"Expected attention of every head over its own keys at {site} here (got {name}). Do use gohgraph's own "
            "models, with as many key/value heads as heads, no router, and nothing at weights."
        )
    if site in MAPS and not traits.linear and "nonlinear" not in allowed:
        raise ValueError(
            f"Expected a graph that is linear in the heads at {site} here (got {name}). Do use a HeadGraphConv, or "
            "gohgraph's own models."
        )


class Messages(NamedTuple):
    """A graph over maps, bound to the tokens of one call.

    Args:
        graph: over scores or weights.
        context: of the queries, `[B, T, M]`.
        active: bool `[B, T, H]`, the heads that work for a token; `None` for all.
        keys: what `graph.key_state` made of the keys' tokens, `[B, S, U]`.
    """

    graph: SiteGraph
    context: Tensor
    active: Tensor | None = None
    keys: Tensor | None = None

    def __call__(self, maps: Tensor) -> Tensor:
        """Returns maps `[B, T, H, S]` after messages."""
        return self.graph(maps, self.context, (), self.active, keys=self.keys)

    def matrix(self) -> Tensor:
        """Returns the same as a matrix over heads for every query, `[B, T, H, H]` or `[H, H]`."""
        return self.graph.matrix(self.context, self.active)

    def widen(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""Returns Q', K' and V, whose plain attention of scale 1/sqrt(D) is attention under the messages.

        .. math::
            Q'_i(t) = \mathrm{concat}_{j \in N(i)}\, w_{ji}(t)\, q_j(t), \qquad
            K'_i(s) = \mathrm{concat}_{j \in N(i)}\, u_{ji}(s)\, k_j(s)

        Args:
            q: `[B, T, H, D]`.
            k, v: `[B, S, G, D]`, G dividing H.

        Returns:
            `[B, T, H, k*D]`, `[B, S, H, k*D]`, and V padded to that width, since backends are slow on unequal ones.
        """
        senders, weights, key_weights = self.graph.sparse(self.context, self.active, self.keys)
        groups, shape = q.shape[2] // k.shape[2], senders.shape
        # index_select and not indexing: its backward adds whole heads, not single elements.
        wide_q = q.index_select(2, senders.flatten()).unflatten(2, shape)  # [B, T, H, k, D]
        wide_q = (wide_q * weights.unsqueeze(-1).to(q.dtype)).flatten(-2)  # [B, T, H, k*D]
        wide_k = k.index_select(2, senders.flatten() // groups).unflatten(2, shape)  # [B, S, H, k, D]
        if key_weights is not None:
            wide_k = wide_k * key_weights.unsqueeze(-1).to(k.dtype)
        wide_k = wide_k.flatten(-2)  # [B, S, H, k*D]
        v = v.repeat_interleave(shape[0] // v.shape[2], dim=2)  # [B, S, H, D]
        return wide_q, wide_k, F.pad(v, (0, wide_k.shape[-1] - v.shape[-1]))
