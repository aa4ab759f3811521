"""What is read of a head graph with edges, by whoever records, measures, draws or prunes it."""

from abc import abstractmethod
from collections.abc import Mapping

from torch import Tensor

from gohgraph.graphs.edges import EdgeWeights
from gohgraph.graphs.protocol import SiteGraph


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
    edges: EdgeWeights
    gain: Tensor | None

    @property
    def rounds(self) -> int:
        """R, the number of message-passing rounds."""
        return self.edges.rounds

    @abstractmethod
    def select(self, alpha: Tensor, active: Tensor | None = None) -> Tensor:
        """Returns the weights `[*, R, E]` with zeros where an edge is left out for a token; `active` bool `[*, H]`."""

    @abstractmethod
    def keep_edges(self, kept: Tensor) -> None:
        """Leaves the edges of the bool mask `kept [E]` in the graph, with their weights; the others are gone for good.
        """

    @abstractmethod
    def prune_to_saved(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        """Prunes the graph to the edges that a checkpoint holds under `prefix`, if it has all of them."""

    @abstractmethod
    def edges_changed(self) -> None:
        """Makes anew what follows from the edges, after `edge_index` was changed in place."""
