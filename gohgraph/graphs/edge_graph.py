"""The edges of a head graph: where they lie, which of them stay, and which a token uses."""

from abc import abstractmethod
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from gohgraph.graphs.dense import edge_kinds
from gohgraph.graphs.edge_tables import EdgeTables, edge_tables, num_runs
from gohgraph.graphs.edges import EdgeWeights
from gohgraph.graphs.protocol import SiteGraph, Traits


class EdgeGraph(SiteGraph):
    """A graph with explicit edges, each with a weight for every token: `HeadGraphConv` and its kin.

    These are subclasses of PyG's `MessagePassing`, whose import takes longer than that of everything else together.
    Whoever asks whether a module is one of them asks for this class, which needs no PyG.

    Attributes:
        edge_index: int64 `[2, E]`, from sender j + l*H, head j of the l-th earlier layer, to receiver i.
        num_heads, num_senders: H, and the senders of all layers that send.
        edges: gives the weights, context `[*, M]` -> alpha `[*, R, E]`.
        gain: of normalised messages, `[senders, D]`, or `None`.

    Example:
        >>> import gohgraph as goh
        >>> model = goh.MultiHeadAttention(20, 5, output_graph=goh.HeadGraphConv(goh.head_graph(5, "ring"), 4, 20))
        >>> [module.edge_index.shape for module in model.modules() if isinstance(module, EdgeGraph)]
        [torch.Size([2, 10])]
    """

    edge_index: Tensor
    num_heads: int
    num_senders: int
    cross_layer: int
    top_edges: int | None
    edges: EdgeWeights
    gain: Tensor | None
    # Buffers, see `EdgeTables`.
    edge_of_cell: Tensor
    cell_of_edge: Tensor
    senders: Tensor
    edge_of_sender: Tensor
    receivers: Tensor
    edge_of_receiver: Tensor
    place_of_edge: Tensor
    _edge_list: list[list[int]]
    _edge_kinds: list[str]
    num_runs: int

    @property
    def rounds(self) -> int:
        """R, the number of message-passing rounds."""
        return self.own_edges.rounds

    @property
    def own_edges(self) -> EdgeWeights:
        """The edge weights themselves: where an adapter stands in their place, it answers calls alone."""
        beneath = getattr(self.edges, "get_base_layer", None)
        return self.edges if beneath is None else beneath()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "EdgeGraph":
        # What follows from edges is in no file: who loads a model on meta tensor by tensor leaves it there.
        if not self.edge_index.is_meta and any(buffer.is_meta for buffer in self.buffers()):
            self.edges_changed()
        return super()._apply(fn, recurse)

    @property
    def is_complete(self) -> bool:
        """True when every sender reaches every receiver, so that edges in order are the rows of the adjacency."""
        return self.own_edges.num_edges == self.num_heads * self.num_senders

    @property
    def local_edges(self) -> Tensor:
        """Edges `[2, E]` as this module computes them: the place of the sender among its senders, and the receiver."""
        return self.edge_index

    @torch.no_grad()
    def keep_edges(self, kept: Tensor) -> None:
        """Leaves the edges of the bool mask `kept [E]` in the graph, with their weights; the others are gone for good.

        Of a whole model `gohgraph.prune` does this.
        """
        if kept.dtype != torch.bool or kept.shape != (self.edges.num_edges,):
            raise ValueError(
                f"Expected a bool mask of shape [{self.edges.num_edges}] (got {kept.dtype} {list(kept.shape)}). "
                "Do pass one value for each edge."
            )
        kept = kept.to(self.edge_index.device)
        self.edge_index = self.edge_index[:, kept]
        self.edges.keep_edges(kept)
        self.edges_changed()

    def prune_to_saved(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        """Prunes the graph to the edges that a checkpoint holds under `prefix`, if it has all of them."""
        saved = tensors.get(prefix + "edge_index")
        if saved is None or saved.dim() != 2 or saved.shape[1] >= self.edges.num_edges:
            return
        edges = {tuple(edge) for edge in saved.t().tolist()}
        kept = torch.tensor([tuple(edge) in edges for edge in self.edge_index.t().tolist()])
        if torch.equal(self.edge_index[:, kept], saved.to(self.edge_index.device)):
            self.keep_edges(kept)

    def edges_changed(self) -> None:
        """Makes anew what follows from the edges: the tables of where they lie, and the traits."""
        self._edge_list = self.edge_index.t().tolist()
        edges = [(j, i) for j, i in self.local_edges.t().tolist()]
        self._edge_kinds = edge_kinds(edges, self.num_heads, 1 + self.cross_layer)
        # Of runs of heads that are complete graphs, edges in order are the rows of all their adjacencies.
        self.num_runs = num_runs(edges, self.num_heads, self.num_senders)
        tables = edge_tables(edges, self.num_heads, self.num_senders)
        for name, table in tables._asdict().items():
            self.register_buffer(name, table.to(self.edge_index.device), persistent=False)
        if self.edges.scaled is not None:
            self.edges.scaled = self._crosses_layers().to(self.edge_index.device)
        self.traits = self._traits(tables)._replace(learning_rate_factor=self.traits.learning_rate_factor)

    @abstractmethod
    def _traits(self, tables: EdgeTables) -> Traits:
        """The traits that follow from the edges."""

    def select(self, alpha: Tensor, active: Tensor | None = None) -> Tensor:
        """Returns the weights `[*, R, E]` with zeros where the induced subgraph or `top_edges` leaves an edge out."""
        if active is not None:
            alpha = alpha * self._linked(active).unsqueeze(-2)  # [*, R, E]
        return alpha if self.top_edges is None else self._strongest(alpha)

    def _dense(self, alpha: Tensor) -> Tensor:
        if not self.is_complete:
            alpha = F.pad(alpha, (0, 1)).index_select(-1, self.edge_of_cell)  # [*, H*S]
        return alpha.reshape(*alpha.shape[:-1], self.num_heads, self.num_senders)  # [*, H, S]

    def _crosses_layers(self) -> Tensor:
        return self.edge_index[0] >= self.num_heads  # [E]

    def _linked(self, active: Tensor) -> Tensor:
        # Heads of earlier layers that were off there send zeros: only the receiver counts.
        sending = F.pad(active, (0, self.num_senders - self.num_heads), value=True)  # [*, S]
        senders, receivers = self.edge_index
        return sending.index_select(-1, senders) & active.index_select(-1, receivers)  # [*, E]

    def _strongest(self, alpha: Tensor) -> Tensor:
        size = self._dense(alpha.detach().abs())  # [*, R, H, S]
        best = size.argsort(dim=-1, descending=True, stable=True)[..., : self.top_edges]  # [*, R, H, k]
        is_best = torch.zeros_like(size).scatter(-1, best, 1.0).flatten(-2)  # [*, R, H*S]
        return alpha - (alpha * (1 - is_best.index_select(-1, self.cell_of_edge))).detach()

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        saved = state_dict.get(prefix + "edge_index")
        if saved is not None and saved.t().tolist() != self._edge_list:
            errors.append(
                f"Expected weights of this head graph at {prefix!r} (got another graph, {saved.shape[1]} edges for "
                f"{len(self._edge_list)}). Do build the model with the topology it was saved with."
            )
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        # A model that was built on meta and made empty elsewhere has lost its tables.
        if not self.edge_index.is_meta:
            self.edges_changed()
