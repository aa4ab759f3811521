"""Message passing between the heads of one token over learned edges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn import MessagePassing

from gohgraph.common.checks import check_choice, check_int
from gohgraph.graphs.chunked import add_in_chunks
from gohgraph.graphs.cross_layer import CrossLayer, reached
from gohgraph.graphs.dense import add_layers, add_product, add_runs, pays_by_layer
from gohgraph.graphs.edge_graph import EdgeGraph
from gohgraph.graphs.edge_tables import EdgeTables
from gohgraph.graphs.edges import EdgeWeights
from gohgraph.graphs.graph import head_graph
from gohgraph.graphs.protocol import FEATURES, MAPS, Losses, Sparse, Traits
from gohgraph.graphs.site_config import SiteConfig
from gohgraph.graphs.sparse import add_gathered
from gohgraph.graphs.token_edges import TokenEdges
from gohgraph.graphs.ways import edges_in_chunks, pays_gathered

BACKENDS = ("dense", "pyg")
OPTIONS = ("edges", "rank", "activation", "rounds", "cross_layer", "norm", "backend", "top_edges")


class HeadGraphConv(MessagePassing, EdgeGraph):
    r"""Head-graph convolution: every head adds a signed, token-wise weighted sum of its senders.

    .. math::
        \alpha_{ji}(t) = \tanh(s_{ji} + (W c(t))_{ji}), \qquad
        z'_i(t) = z_i(t) + \sum_{j \to i} \alpha_{ji}(t)\, z_j(t)

    With `rounds = R > 1` the update is repeated, m^(r) being the sum in round r, and the rounds are fused by learned
    coefficients: z' = z + sum_r (1 + f_r) m^(r). All of s, W and f start at zero, so a new graph returns its input bit
    for bit. The nodes may be head outputs (features: head_dim) or attention scores (features: keys); a token's
    messages stay with the token. Under a router, a token's graph is the induced subgraph of its active heads: the
    others neither send nor receive.

    Differs from `torch_geometric.nn.GATv2Conv`: weights are signed and not normalised over senders, come from a context
    shared by all edges and not from pairs of nodes, and nodes carry batch dimensions `[*, H, D]`.

    Args:
        graph: PyG `Data` over the H heads (`head_graph`), edges from sender j to receiver i.
        head_dim: D, the node features; sizes the gain of `norm`.
        context_dim: M, size of the context c(t), usually d_model.
        edges: `"token"` | `"static"` | `"frozen"`, see `EdgeWeights`.
        rank: low rank of W, or `None` for full rank.
        activation: `"tanh"` or `None`.
        rounds: R >= 1.
        cross_layer: w >= 0 adds the nodes of the w layers before as senders (bipartite), over the same edges: sender
            index j + l*H is head j of the l-th layer before. `"first"` adds those of the first layer, as l = 1; a
            `CrossLayer` says more.
        norm: messages are RMS-normalised per head, with a learned gain `[senders, D]`, before they are weighted.
        backend: `"dense"`, one batched matrix product (trains faster), or `"pyg"`, `propagate`, the definition.
        top_edges: per token, every head keeps so many of its incoming edges, those of the largest |alpha|; `None` for
            all. The weights of the others become zero but still get their gradients, so that none is lost for good.
            Under a router the edges of the induced subgraph compete.

    Shape:
        z `[*, H, D]`, context `[*, M]`, earlier: one tensor `[*, H, D]` of each layer that sends (nearest first),
        active: bool `[*, H]`, or `None` for all -> `[*, H, D]`.

    Raises:
        ValueError: an option out of its range; in forward, nodes of another number of heads, a context of another
            size, or fewer earlier layers than send.

    Example:
        >>> conv = HeadGraphConv(head_graph(8), head_dim=4, context_dim=32)
        >>> z, x = torch.randn(2, 5, 8, 4), torch.randn(2, 5, 32)
        >>> torch.equal(conv(z, context=x), z)
        True
        >>> conv.edge_weight(x).shape, conv.adjacency(x).shape
        (torch.Size([2, 5, 64]), torch.Size([2, 5, 8, 8]))
    """

    # Whether senders are nodes as they are, so that messages can be added layer by layer, without joining the layers.
    by_layer = True
    # Whether weights are those of `edges` as they are, so that they can be computed for a few tokens at a time.
    in_chunks = True
    # PyG writes it for every class.
    propagate: Callable[..., Tensor]
    # Options of the constructor, and what a `SiteConfig` calls them.
    options: ClassVar[dict[str, str]] = {name: name for name in OPTIONS}

    def __init__(
        self,
        graph: Data,
        head_dim: int,
        context_dim: int,
        *,
        edges: str = "token",
        rank: int | None = None,
        activation: str | None = "tanh",
        rounds: int = 1,
        cross_layer: int | str | CrossLayer = 0,
        norm: bool = False,
        backend: str = "dense",
        top_edges: int | None = None,
    ) -> None:
        super().__init__(aggr="add", node_dim=-2)
        _check_conv(graph, head_dim, context_dim, backend, top_edges)
        cross = CrossLayer.of(cross_layer)
        self.num_heads, self.head_dim, self.backend, self.cross_layer = graph.num_nodes, head_dim, backend, cross.count
        self.reach, self.num_senders = cross.layers, self.num_heads * (1 + self.cross_layer)
        self.top_edges = top_edges
        edge_index = cross.joined(head_graph(self.num_heads, graph, self_loops=False).edge_index, self.num_heads)
        num_edges = edge_index.shape[1]
        scaled, scale_start = None, 0.0
        if cross.scale is not None and self.cross_layer:
            scaled, scale_start = edge_index[0] >= self.num_heads, cross.scale
        scale = max(1.0, num_edges / self.num_heads) ** -0.5
        self.edges = EdgeWeights(
            num_edges,
            context_dim,
            kind=edges,
            rank=rank,
            activation=activation,
            rounds=rounds,
            scale=scale,
            scaled=scaled,
            scale_start=scale_start,
        )
        self.fusion = nn.Parameter(torch.zeros(rounds)) if rounds > 1 else None
        self.gain = nn.Parameter(torch.ones(self.num_senders, head_dim)) if norm else None
        # Saved with the weights, so that they never meet another graph of equally many edges.
        self.register_buffer("edge_index", edge_index)
        self.traits = Traits(self.num_heads)
        self.edges_changed()

    @classmethod
    def from_config(
        cls,
        config: SiteConfig,
        num_heads: int,
        head_dim: int,
        context_dim: int,
        *,
        layer: int | None = None,
    ) -> HeadGraphConv:
        """Builds the graph and convolution a `SiteConfig` names, for the layer of that index in its stack.

        A layer has only `layer` layers before it: `cross_layer` is cut to that, unless `layer` is `None`.
        """
        graph = head_graph(num_heads, config.topology, self_loops=config.self_loops, **config.options)
        options = {name: getattr(config, field) for name, field in cls.options.items()}
        options["cross_layer"] = CrossLayer.of(config.cross_layer).at(layer)
        return cls(graph, head_dim, context_dim, **options)

    def reset_parameters(self) -> None:
        """Returns to the neutral start."""
        self.edges.reset_parameters()
        if self.fusion is not None:
            nn.init.zeros_(self.fusion)
        if self.gain is not None:
            nn.init.ones_(self.gain)

    def _traits(self, tables: EdgeTables) -> Traits:
        is_linear = self.gain is None and not self.cross_layer
        can_be_sparse = is_linear and self.rounds == 1 and self.backend == "dense"
        return Traits(
            self.num_heads,
            FEATURES | MAPS if self.gain is None else FEATURES,
            reach=self.reach,
            linear=is_linear,
            static=is_linear and self.edges.weight is None,
            in_degree=tables.senders.shape[1] if can_be_sparse else 0,
            sharded=True,
            limited_by="" if self.gain is None else "norm=True",
        )

    def forward(
        self,
        z: Tensor,
        context: Tensor | None = None,
        earlier: Sequence[Tensor] = (),
        active: Tensor | None = None,
        *,
        keys: Tensor | None = None,
        losses: Losses | None = None,
        values: Tensor | None = None,
    ) -> Tensor:
        """Passes messages between the nodes `z [*, H, D]` under the context `[*, M]`; see `SiteGraph.forward`."""
        if self.fusion is None:
            self._check_nodes(z, earlier)
            many = edges_in_chunks(self, z, context, active) if self.in_chunks else None
            if many is not None:
                return add_in_chunks(z, self._senders(z, earlier), many)
            alpha = self.edge_weight(context, 0, active).to(z.dtype)
            if self.by_layer and self.gain is None and self.backend == "dense" and pays_by_layer(self._edge_kinds):
                return add_layers((z, *reached(earlier, self.reach)), self._edge_kinds, alpha, self.edge_of_cell)
            return self._add_messages(z, self._senders(z, earlier), alpha)
        return self._fuse(z, self.messages(z, context, earlier, active))

    def messages(
        self, z: Tensor, context: Tensor | None = None, earlier: Sequence[Tensor] = (), active: Tensor | None = None
    ) -> list[Tensor]:
        """Returns m^(1), ..., m^(R), `[*, H, D]` each: what heads receive in each round; z^(r) = z^(r-1) + m^(r)."""
        self._check_nodes(z, earlier)
        weights = self._weights(context, active).to(z.dtype)  # [*, R, E] or [R, E]
        received = []
        for index in range(self.rounds):
            received.append(self._add_messages(None, self._senders(z, earlier), weights[..., index, :]))  # [*, H, D]
            z = z + received[-1]
        return received

    def edge_weight(self, context: Tensor | None = None, index: int = 0, active: Tensor | None = None) -> Tensor:
        """Returns alpha of round `index`: `[*, E]` for a context `[*, M]` or active heads `[*, H]`, else `[E]`."""
        return self._weights(context, active)[..., index, :]

    def adjacency(self, context: Tensor | None = None, index: int = 0, active: Tensor | None = None) -> Tensor:
        """Returns alpha of round `index` as a matrix `[*, H, senders]`: rows receive, absent edges are zero."""
        return self._dense(self.edge_weight(context, index, active))

    def matrix(self, context: Tensor | None = None, active: Tensor | None = None) -> Tensor:
        """Returns the linear map `[*, H, H]` of all rounds, z' = matrix z; `ValueError` unless `traits.linear`."""
        if not self.traits.linear:
            return super().matrix(context, active)
        dtype = self.own_edges.bias.dtype if context is None else context.dtype
        eye = torch.eye(self.num_senders, dtype=dtype, device=self.edge_index.device)  # [S, S]
        if self.rounds == 1 and self.num_senders == self.traits.num_heads:
            return self._dense(self.edge_weight(context, 0, active).to(dtype)) + eye  # [*, H, H]
        varying = context if self.own_edges.weight is not None else active
        tokens = () if varying is None else varying.shape[:-1]
        return self(eye.expand(*tokens, -1, -1), context, active=active)  # [*, H, S]

    def sparse(self, context: Tensor | None, active: Tensor | None = None, keys: Tensor | None = None) -> Sparse:
        """Returns every head's senders `[H, k]`, itself first, and their weights `[*, H, k]`, identity included."""
        if not self.traits.in_degree:
            return super().sparse(context, active, keys)
        weights = self._by_sender(self.edge_weight(context, 0, active))  # [*, H, k]
        identity = torch.arange(self.senders.shape[1], device=weights.device) == 0  # [k]
        key_weights = None if keys is None else 1 + self._by_sender(keys)  # [B, S, H, k]
        return Sparse(self.senders, weights + identity.to(weights.dtype), key_weights)

    def token_edges(self, nodes: Tensor, context: Tensor, active: Tensor | None) -> TokenEdges | None:
        """Returns what `matrix` is computed from for nodes `[*, H, D]`, where it has many cells and is one run."""
        is_product = self.traits.linear and self.in_chunks and self.rounds == self.num_runs == 1
        return edges_in_chunks(self, nodes, context, active) if is_product else None

    def _by_sender(self, alpha: Tensor) -> Tensor:
        weights = F.pad(alpha, (0, 1)).index_select(-1, self.edge_of_sender.flatten())  # [*, H*k]
        return weights.unflatten(-1, self.edge_of_sender.shape)  # [*, H, k]

    def message(self, x_j: Tensor, alpha: Tensor) -> Tensor:
        """The message of each edge: its weight times its sender, `[*, E, D]`."""
        return alpha.unsqueeze(-1) * x_j

    def _fuse(self, z: Tensor, messages: list[Tensor]) -> Tensor:
        fusion = self._fusion()
        for index, message in enumerate(messages):
            factor = 1.0 if fusion is None else (1 + fusion[index]).to(message.dtype)
            z = z + factor * message
        return z

    def _fusion(self) -> Tensor | None:
        return self.fusion

    def _weights(self, context: Tensor | None, active: Tensor | None) -> Tensor:
        return self.select(self.edges(context), active)  # [*, R, E] or [R, E]

    def _senders(self, nodes: Tensor, earlier: Sequence[Tensor]) -> Tensor:
        senders = torch.cat((nodes, *reached(earlier, self.reach)), dim=-2) if self.cross_layer else nodes  # [*, S, D]
        gain = self._gain()
        return senders if gain is None else F.rms_norm(senders, (senders.shape[-1],)) * gain.to(senders.dtype)

    def _gain(self) -> Tensor | None:
        return self.gain

    def _add_messages(self, z: Tensor | None, senders: Tensor, alpha: Tensor) -> Tensor:
        if self.backend == "pyg":
            size = (self.num_senders, self.num_heads)
            received = self.propagate(self.local_edges, x=(senders, None), alpha=alpha, size=size)  # [*, H, D]
            return received if z is None else z + received
        if pays_gathered(senders, alpha, self.senders.shape[1], self.num_heads):
            tables = EdgeTables(*(getattr(self, name) for name in EdgeTables._fields))
            return add_gathered(z, senders, alpha, tables)
        if self.num_runs > 1:
            return add_runs(z, alpha, senders, self.num_runs)
        return add_product(z, self._dense(alpha), senders)

    def _check_nodes(self, z: Tensor, earlier: Sequence[Tensor]) -> None:
        if z.dim() < 2 or z.shape[-2] != self.traits.num_heads:
            raise ValueError(
                f"Expected nodes of shape [*, {self.traits.num_heads}, D] (got {list(z.shape)}). "
                "Do build the graph over as many heads as the attention has."
            )
        if len(earlier) < self.cross_layer:
            raise ValueError(
                f"Expected the nodes of {self.cross_layer} layers before (got {len(earlier)}). Do pass them as "
                "`earlier`, nearest first."
            )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(num_heads={self.num_heads}, head_dim={self.head_dim}, "
            f"cross_layer={self.reach!r}, norm={self.gain is not None}, backend={self.backend!r}, {self.edges})"
        )


def _check_conv(graph: Data, head_dim: int, context_dim: int, backend: str, top_edges: int | None) -> None:
    if not isinstance(graph, Data):
        raise TypeError(f"Expected a PyG Data (got {type(graph).__name__}). Do build it with head_graph(num_heads).")
    check_int("head_dim", head_dim, low=1)
    check_int("context_dim", context_dim, low=1)
    if top_edges is not None:
        check_int("top_edges", top_edges, low=1)
    check_choice("backend", backend, BACKENDS)
