"""The stacks of a transformer: encoder and decoder layers and their repetition."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gohgraph.attention.block import Heads, MultiHeadAttention
from gohgraph.attention.cache import KeyValueCache
from gohgraph.attention.history import Readers
from gohgraph.attention.routing import HeadRouter, Routing
from gohgraph.graphs.building import build_graph
from gohgraph.graphs.config import HeadGraphConfig
from gohgraph.graphs.protocol import ALIGNMENT, Losses
from gohgraph.models.config import TransformerConfig
from gohgraph.models.embeddings import positions_of_heads, shared_rotation
from gohgraph.models.objects import FeedForward
from gohgraph.models.streams import HyperConnection, ResidualPath
from gohgraph.models.sublayers import NORMS, Residual

NO_GRAPHS = HeadGraphConfig(outputs=None)


class EncoderLayer(nn.Module):
    """One layer of self attention and feed-forward; causal, it is the layer of a decoder-only language model.

    With plain attention and no `qk_norm` it equals `torch.nn.TransformerEncoderLayer` of the same weights.

    Args:
        config: the transformer's configuration.
        causal: token t attends to s <= t only.
        layer: index in the stack; graphs with `cross_layer` reach back at most so far.

    Shape:
        x `[B, T, M]` -> (`[B, T, M]`, a tuple of the `Heads` of its attention); with hyper-connections `[B, T, n, M]`.

    Example:
        >>> import torch
        >>> x, (heads,) = EncoderLayer(TransformerConfig(7, d_model=8, num_heads=2, d_ff=16))(torch.randn(1, 3, 8))
        >>> heads.outputs.shape
        torch.Size([1, 3, 2, 4])
    """

    def __init__(self, config: TransformerConfig, *, causal: bool = False, layer: int = 0) -> None:
        super().__init__()
        self.attention = _residual(_attention(config, layer, causal=causal), config, 2 * layer)
        self.feed_forward = _residual(_feed_forward(config), config, 2 * layer + 1)

    def forward(
        self, x: Tensor, *, caches: tuple[KeyValueCache, ...] = (), **context: Any
    ) -> tuple[Tensor, tuple[Heads, ...]]:
        """Returns the layer's output and what its heads did; the context is that of `MultiHeadAttention`."""
        x, heads = self.attention(x, cache=caches[0] if caches else None, **context)
        return self.feed_forward(x), (heads,)

    if TYPE_CHECKING:
        __call__ = forward


class DecoderLayer(nn.Module):
    """One layer of causal self attention, cross attention to the encoder's output, and feed-forward.

    With plain attention and no `qk_norm` it equals `torch.nn.TransformerDecoderLayer` of the same weights. Both
    attentions have head graphs of their own.

    Args:
        config: the transformer's configuration.
        layer: index in the stack.

    Shape:
        x `[B, T, M]`, memory `[B, S, M]` -> (`[B, T, M]`, the `Heads` of self attention and of cross attention).

    Example:
        >>> import torch
        >>> layer = DecoderLayer(TransformerConfig(7, d_model=8, num_heads=2, d_ff=16))
        >>> layer(torch.randn(1, 3, 8), torch.randn(1, 5, 8))[0].shape
        torch.Size([1, 3, 8])
    """

    def __init__(self, config: TransformerConfig, *, layer: int = 0) -> None:
        super().__init__()
        self.attention = _residual(_attention(config, layer, causal=True), config, 3 * layer)
        self.cross_attention = _residual(_attention(config, layer, cross=True), config, 3 * layer + 1)
        self.feed_forward = _residual(_feed_forward(config), config, 3 * layer + 2)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        *,
        memory_keep_mask: Tensor | None = None,
        caches: tuple[KeyValueCache, ...] = (),
        **context: Any,
    ) -> tuple[Tensor, tuple[Heads, ...]]:
        """Returns the output and what the heads did; masks broadcast to `[B, H, T, T]` and `[B, H, T, S]`."""
        cache, cross_cache = caches or (None, None)
        x, heads = self.attention(x, cache=cache, **context)
        shared = {name: context[name] for name in ("token_mask", "losses") if name in context}
        x, cross_heads = self.cross_attention(x, memory, keep_mask=memory_keep_mask, cache=cross_cache, **shared)
        return self.feed_forward(x), (heads, cross_heads)

    if TYPE_CHECKING:
        __call__ = forward


class StackOutput(NamedTuple):
    """What a stack returns.

    Args:
        x: `[B, T, M]`.
        routings: of every routed attention, in model order; empty without routers.
        losses: by name, what the graphs of every block add to the training loss.
    """

    x: Tensor
    routings: tuple[Routing, ...] = ()
    losses: Losses = {}


class Stack(nn.Module):
    """A stack of layers with a final normalisation when they are pre-norm.

    Args:
        config: the transformer's configuration; `num_layers` layers are built.
        kind: `"encoder"`, `"causal"` (decoder-only) or `"decoder"` (with cross attention).

    Shape:
        x `[B, T, M]` -> `StackOutput` with x `[B, T, M]`.

    Raises:
        ValueError: another kind.

    Example:
        >>> import torch
        >>> config = TransformerConfig(7, d_model=8, num_heads=2, num_layers=2, d_ff=16)
        >>> Stack(config, "causal")(torch.randn(1, 3, 8)).x.shape
        torch.Size([1, 3, 8])
    """

    def __init__(self, config: TransformerConfig, kind: str = "encoder") -> None:
        super().__init__()
        if kind not in ("encoder", "causal", "decoder"):
            raise ValueError(f"Expected kind 'encoder', 'causal' or 'decoder' (got {kind!r}). Do choose one of them.")
        self.kind = kind
        indices = range(config.num_layers)
        if kind == "decoder":
            self.layers = nn.ModuleList(DecoderLayer(config, layer=i) for i in indices)
        else:
            self.layers = nn.ModuleList(EncoderLayer(config, causal=kind == "causal", layer=i) for i in indices)
        self.path = ResidualPath(config.residual, config.d_model, config.num_layers)
        self.norm = NORMS[config.norm](config.d_model, eps=1e-5) if config.norm_first else nn.Identity()
        self.graphs_changed(config.head_graph or NO_GRAPHS)
        # Whether backward computes the inside of a layer again, instead of keeping it in memory.
        self.recompute = False

    def forward(
        self, x: Tensor, *memory: Tensor, caches: list[tuple[KeyValueCache, ...]] | None = None, **masks: Tensor | None
    ) -> StackOutput:
        """Passes `x` through all layers; further arguments go to each layer."""
        earlier = self.readers.nothing()
        routings: list[Routing] = []
        losses: Losses = {name: [] for name in self.losses}
        layers: Iterable[Any] = self.layers
        rotaries = [layer.attention.object.rotary for layer in layers]
        context: dict[str, Any] = {**masks, "positions": shared_rotation(rotaries, masks.get("positions"))}
        x = self.path.enter(x)
        inputs: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            layer_caches = () if caches is None else caches[index]
            run: Callable[..., Any] = layer
            if self.recompute and self.training:
                run = partial(checkpoint, layer, use_reentrant=False)
            # Backward may run the layer again: what counts is what its first run gave.
            of_layer: Losses = {name: [] for name in losses}
            x = self.path.before(index, x, inputs)
            x, blocks = run(x, *memory, caches=layer_caches, earlier=earlier, losses=of_layer, **context)
            earlier = self.readers.after(index, earlier, blocks[0].nodes)
            routings += [heads.routing for heads in blocks if heads.routing is not None]
            for name, values in of_layer.items():
                losses[name] += values
        return StackOutput(self.norm(self.path.leave(x)), tuple(routings), losses)

    if TYPE_CHECKING:
        __call__ = forward

    def graphs_changed(self, graphs: HeadGraphConfig) -> None:
        """Takes note of what the graphs of its layers ask for: nodes of earlier layers, and losses."""
        layers: Iterable[Any] = self.layers
        self.readers = Readers([layer.attention.object.graphs for layer in layers])
        outputs = [block.output_graph for block in self.modules() if isinstance(block, MultiHeadAttention)]
        traits = [graph.traits for graph in outputs if graph is not None]
        names = dict.fromkeys(name for graph_traits in traits for name in graph_traits.losses)
        self.losses = tuple(name for name in names if name != ALIGNMENT or graphs.alignment)

    def new_caches(self) -> list[tuple[KeyValueCache, ...]]:
        """Returns empty key/value caches for incremental decoding, one tuple a layer."""
        if self.kind == "decoder":
            return [(KeyValueCache(), KeyValueCache(fixed=True)) for _ in self.layers]
        return [(KeyValueCache(),) for _ in self.layers]


def _residual(object: nn.Module, config: TransformerConfig, place: int) -> Residual:
    kind = config.residual
    common: dict[str, Any] = {"norm": config.norm, "dropout": config.dropout}
    if kind in ("hyper", "dynamic-hyper"):
        return HyperConnection(object, config.d_model, place=place, dynamic=kind == "dynamic-hyper", **common)
    return Residual(object, config.d_model, norm_first=config.norm_first, **common)


def _feed_forward(config: TransformerConfig) -> FeedForward:
    return FeedForward(config.d_model, config.d_ff, config.activation, bias=config.bias, dropout=config.dropout)


def _attention(
    config: TransformerConfig, layer: int, *, causal: bool = False, cross: bool = False
) -> MultiHeadAttention:
    return MultiHeadAttention(
        config.d_model,
        config.num_heads,
        num_kv_heads=config.num_kv_heads,
        bias=config.bias,
        dropout=config.dropout,
        causal=causal,
        rotary=positions_of_heads(config, cross=cross),
        **build_slots(config, layer, cross=cross),
    )


def build_slots(config: TransformerConfig, layer: int, *, cross: bool = False) -> dict[str, Any]:
    """Builds what `config` puts into the slots of one attention block, by the names of `MultiHeadAttention`.

    `layer` is the index in the stack; cross attention is handed no nodes of earlier layers, its graphs have none, and
    its tokens have no values of their own.
    """
    before = 0 if cross else layer
    graphs = (config.head_graph or NO_GRAPHS).at_layer(layer, config.num_layers)
    sizes = (config.num_heads, config.head_dim, config.d_model)
    key_sizes = (config.num_kv_heads or config.num_heads, config.head_dim, config.d_model)
    inner = {
        "query": build_graph(graphs.queries, sizes, layer=before),
        "key": build_graph(graphs.keys, key_sizes, layer=before),
        "value": build_graph(graphs.values, key_sizes, layer=before),
        "weight": build_graph(graphs.weights, sizes),
    }
    return {
        "output_graph": build_graph(graphs.outputs, sizes, layer=before, cross=cross),
        "score_graph": build_graph(graphs.scores, sizes),
        "router": graphs.routing
        and HeadRouter.from_config(graphs.routing, config.d_model, config.num_heads, layer=layer),
        "inner_graphs": {site: graph for site, graph in inner.items() if graph is not None},
    }
