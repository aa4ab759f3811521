"""Megatron-Core's self-attention with head graphs and a router."""

import copy
from typing import Any, cast

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from gohgraph.attention.call import NO_MASK, Call, Core, Mask
from gohgraph.attention.forms import attend
from gohgraph.attention.routing import HeadRouter
from gohgraph.common.checks import there
from gohgraph.graphs.building import build_graph
from gohgraph.graphs.config import HeadGraphConfig
from gohgraph.graphs.conv import HeadGraphConv
from gohgraph.graphs.protocol import Messages, check_site
from gohgraph.graphs.site_config import Site
from gohgraph.parallel.collectives import gather_parts, own_part
from gohgraph.parallel.megatron.checks import check_sizes, check_transformer
from gohgraph.parallel.megatron.graph import MegatronHeadGraphConv
from gohgraph.parallel.megatron.losses import attach_losses
from gohgraph.parallel.megatron.torch_attention import TorchCoreAttention


class HeadGraphSelfAttention(SelfAttention):
    """Megatron-Core's `SelfAttention`, which hands its input x to a core attention with head graphs.

    Built by `head_graph_layer_spec`. Parameters have the names of `SelfAttention`; those of the head graphs lie below
    `core_attention`. Selective recomputation of `core_attn` recomputes the maps of attention, not the messages.

    Args:
        config: of the transformer.
        submodules: whose `core_attention` is a `HeadGraphCoreAttention`.
        layer_number: from 1 on.
        **options: of `SelfAttention`.

    Raises:
        ValueError: a config with context parallelism, CUDA graphs, flash decoding, fp8 or offloaded core attention;
            when called, packed sequences, an attention bias or a cache.
    """

    checkpoint_core_attention: bool

    def __init__(self, config: TransformerConfig, submodules: Any, layer_number: int, **options: Any) -> None:
        check_transformer(config)
        super().__init__(config, submodules, layer_number, **options)
        self.core_attention.recomputes = self.checkpoint_core_attention
        self.checkpoint_core_attention = False

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, *args: Any, **options: Any) -> Any:
        """Returns output and bias, as `SelfAttention` does, for `hidden_states [s, b, M]`."""
        refused = ("attention_bias", "packed_seq_params", "inference_context", "inference_params")
        for name in refused:
            if options.get(name) is not None:
                raise ValueError(
                    f"Expected whole, unpacked sequences without {name} for head graphs (got it). Do call the model "
                    "without."
                )
        x = gather_parts(hidden_states, self.tp_group, 0) if self.config.sequence_parallel else hidden_states
        # The one argument that Megatron-Core passes through to the core attention untouched.
        options["attention_bias"] = x
        return super().forward(hidden_states, attention_mask, *args, **options)


class HeadGraphCoreAttention(MegatronModule):
    r"""Core attention between messages: over scores before it, over head outputs behind it.

    .. math::
        a' = \mathrm{score\_graph}(a, x), \qquad z_i = \mathrm{softmax}(a'_i)\, v_i, \qquad
        z'_i = g_i\, \mathrm{output\_graph}(z, x)_i

    Beside `TorchCoreAttention` every form of attention may stand in for it; on Megatron-Core's own, score messages run
    as attention over wider heads: at in-degree k they cost k times the core of plain attention. Heads and the edges
    into them are sharded over tensor-parallel ranks; the router is whole on all.

    Args:
        config: of the transformer.
        layer_number: from 1 on.
        head_graph: sites and routing.
        attention: module or spec of the attention in between.
        pg_collection: process groups; `None` for Megatron-Core's own.
        **options: what else the slot is built with, for `attention`.

    Shape:
        query `[s, b, H/n, D]`, key and value `[s, b, G/n, D]`, x `[s, b, M]` -> `[s, b, H/n*D]`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        head_graph: HeadGraphConfig,
        attention: Any,
        pg_collection: ProcessGroupCollection | None = None,
        **options: Any,
    ) -> None:
        super().__init__(config=config)
        check_sizes(head_graph, config)
        head_graph = head_graph.at_layer(layer_number - 1, config.num_layers)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"])
        self.layer_number, self.routing_config, self.tp_group = layer_number, head_graph.routing, pg_collection.tp
        self.head_dim, self.recomputes = config.kv_channels, False
        if head_graph.scores is not None:
            # Wider heads have keys of their own, also where heads share them.
            config = copy.deepcopy(config)
            config.num_query_groups = config.num_attention_heads
        self.attention = build_module(
            attention, config=config, layer_number=layer_number, pg_collection=pg_collection, **options
        )
        # Random numbers of their own: equal on all ranks, and other weights start as they would without head graphs.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(torch.initial_seed() + layer_number)
            self.output_graph = self._conv("outputs", head_graph.outputs)
            self.score_graph = self._conv("scores", head_graph.scores)
            sizes = (config.hidden_size, config.num_attention_heads)
            routing = head_graph.routing
            self.router = None if routing is None else HeadRouter.from_config(routing, *sizes, layer=layer_number - 1)
        self._place()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attends and passes messages; `attention_bias` is the input x `[s, b, M]` of the block."""
        x = there(attention_bias)
        routing = None if self.router is None else self.router(x)
        active = None if routing is None else routing.active  # [s, b, H]
        scores = None
        if self.score_graph is not None:
            by_batch = None if active is None else active.transpose(0, 1)  # [b, s, H]
            scores = Messages(self.score_graph, x.transpose(0, 1), by_batch)
        mask, core, scale = self._core(query, attention_mask, attn_mask_type)
        q, k, v = (part.transpose(0, 1) for part in (query, key, value))  # [b, s, H/n or G/n, D] each
        z, _ = attend(Call(q, k, v, mask, scores=scores, core=core, scale=scale))
        z = z.transpose(0, 1)  # [s, b, H/n, D]
        if self.output_graph is not None:
            z = self.output_graph(z, x, (), active)
        if routing is not None:
            z = z * own_part(routing.gates, self.tp_group, -1).unsqueeze(-1).to(z.dtype)
            if self.training:
                z = attach_losses(z, routing, there(self.routing_config), self.config, self.layer_number)
        return z.flatten(-2)  # [s, b, H/n*D]

    def _core(self, query: Tensor, mask: Tensor | None, mask_type: Any) -> tuple[Mask, Core, float | None]:
        """The attention beneath, and its mask and scale where others may stand in for it."""

        def beneath(q: Tensor, k: Tensor, v: Tensor, scale: float | None, is_wide: bool) -> tuple[Tensor, None]:
            # Megatron-Core's own attention views heads and batch as one.
            q, k, v = (part.transpose(0, 1).contiguous() for part in (q, k, v[..., : self.head_dim]))  # [s, b, H/n, D]
            z = self._attend(q, k, v, mask, mask_type)
            return z.unflatten(-1, (-1, self.head_dim)).transpose(0, 1), None  # [b, s, H/n, D]

        if not isinstance(self.attention, TorchCoreAttention):
            return NO_MASK, Core(beneath, f"{type(self.attention).__name__} beneath may do more than attend"), None
        reason = "dropout by Megatron-Core's random state" if self.training and self.attention.dropout else ""
        return self.attention.mask(query, mask, mask_type), Core(beneath, reason), self.attention.scale

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, mask_type: Any) -> Tensor:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return self.attention(
                query, key, value, mask, attn_mask_type=mask_type, attention_bias=None, packed_seq_params=None
            )

        if self.recomputes and self.training:
            return tensor_parallel.checkpoint(attend, False, query, key, value)
        return attend(query, key, value)

    def _conv(self, name: str, site: Site | None) -> MegatronHeadGraphConv | None:
        sizes = (self.config.num_attention_heads, self.head_dim, self.config.hidden_size)
        graph = build_graph(site, sizes)
        if graph is None:
            return None
        check_site(name, graph, sizes[0], ())
        # `check_site` let nothing else stand here.
        return MegatronHeadGraphConv(cast(HeadGraphConv, graph), self.tp_group, over_maps=name == "scores")

    def _place(self) -> None:
        """Moves head graphs and router to where Megatron-Core makes parameters, in its number format."""
        on_cpu = self.config.use_cpu_initialization or not torch.cuda.is_available()
        device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
        parts: list[nn.Module | None] = [self.output_graph, self.score_graph, self.router]
        for part in parts:
            if part is not None:
                part.to(device=device, dtype=self.config.params_dtype)
