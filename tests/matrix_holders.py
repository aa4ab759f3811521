"""Whoever holds head graphs, built small and plain in float64: how a graph is put there, and what attention did."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from helpers import FusedAttention, trained_like
from torch import Tensor, nn

from gohgraph import HeadGraphConfig, LanguageModel, TransformerConfig, convert, unconvert
from gohgraph.attention.block import INNER_SITES
from gohgraph.convert.blocks import head_slots
from gohgraph.convert.conversion import find_blocks
from gohgraph.convert.own_models import attentions
from gohgraph.graphs.protocol import SiteGraph
from gohgraph.graphs.site_config import Site
from gohgraph.parallel.collectives import local

V, B, INNER_WIDTH = 13, 2, 11
INNER = {site: name for name, site in INNER_SITES.items()}
SLOTS = {"outputs": "output_graph", "scores": "score_graph"}


class Sizes(NamedTuple):
    """H query heads over G key/value heads of D features, and T tokens."""

    heads: int
    groups: int
    features: int
    tokens: int


class Attended(NamedTuple):
    """What one block of attention was given and gave: x `[B, T, M]`, head outputs `[B, T, H, D]`, graphs by site."""

    x: Tensor
    z: Tensor
    graphs: dict[str, SiteGraph]
    block: nn.Module


class Holder:
    """A plain model around attention that can hold graphs.

    Attributes:
        model: as it is now.
        tokens, expected: `[B, T]`, and what the plain model says of them.
        causal, caches: whether it is causal, and can be called part after part.
        exact, cached_exact: how close to float64 attention is, and a cache leaves the rest.
        own_sites: a user's own modules can be put there; configurations can be asked for everywhere.
    """

    causal, caches, exact, cached_exact = True, False, 1e-10, 1e-10
    own_sites: tuple[str, ...] = ("outputs", "scores")

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.model = trained_like(self.plain())
        self.tokens = torch.randint(3, V, (B, sizes.tokens))
        self.expected = self.run(self.tokens).detach()

    def plain(self) -> nn.Module:
        """A model without graphs."""
        raise NotImplementedError

    def put(self, site: str, graph: Site | Callable[[int], nn.Module]) -> None:
        """Puts a graph of a configuration, or a module made for so many heads, into every block."""
        if not callable(graph):
            convert(self.model, HeadGraphConfig(**{"outputs": None, site: graph}))
            return
        for block in find_blocks(self.model).blocks.values():
            block.attach(**{SLOTS[site]: graph(self.sizes.heads).double()})

    def take_out(self) -> None:
        """Makes the model plain again."""
        unconvert(self.model)

    def run(self, tokens: Tensor) -> Tensor:
        """What the model says of tokens `[B, T]`, `[B, T, *]`."""
        return self.model(tokens)

    def run_cached(self, parts: list[Tensor]) -> Tensor:
        """The same, of tokens that come part after part."""
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        """The attention modules, whose first argument is x."""
        raise NotImplementedError

    def graphs(self) -> list[dict[str, SiteGraph]]:
        """The graphs of every block by site."""
        return [{site: getattr(sites, slot) for site, slot in SLOTS.items() if getattr(sites, slot) is not None}
                for sites in self.holders()]  # fmt: skip

    def holders(self) -> list[Any]:
        """What has the slots of every block, and its `form`."""
        return list(head_slots(self.model).values())

    def reads_heads(self, block: nn.Module) -> nn.Module:
        """The projection that reads the heads."""
        raise NotImplementedError

    def heads_of(self, read: Tensor) -> Tensor:
        """Head outputs `[B, T, H, D]` from what the projection reads."""
        return read.unflatten(-1, (self.sizes.heads, -1))

    def x_of(self, given: Tensor) -> Tensor:
        """The context `[B, T, M]` from what the attention is given."""
        return given

    @contextmanager
    def watched(self) -> Iterator[list[Attended]]:
        """Collects what every block of attention does."""
        given, read, seen, hooks = [], [], [], []
        for block in self.blocks():
            hooks.append(block.register_forward_pre_hook(
                lambda module, args, options: given.append(args[0] if args else options["hidden_states"]),
                with_kwargs=True,
            ))  # fmt: skip
            projection = self.reads_heads(block)
            hooks.append(projection.register_forward_pre_hook(lambda module, args: read.append(args[0])))
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()
        for x, z, graphs, block in zip(given, read, self.graphs(), self.blocks(), strict=True):
            seen.append(Attended(self.x_of(local(x)), self.heads_of(local(z)), graphs, block))


class OwnModel(Holder):
    """Two blocks of `MultiHeadAttention` inside a `LanguageModel`."""

    caches, own_sites = True, ("outputs", "scores", "queries", "keys", "values", "weights")

    def plain(self) -> nn.Module:
        heads, groups, features, _ = self.sizes
        shape = {"num_kv_heads": groups, "num_layers": 2, "d_ff": INNER_WIDTH, "tie_embeddings": False}
        return LanguageModel(TransformerConfig(V, heads * features, heads, **shape))

    def put(self, site: str, graph: Site | Callable[[int], nn.Module]) -> None:
        if not callable(graph):
            super().put(site, graph)
            return
        nodes = self.sizes.groups if site in ("keys", "values") else self.sizes.heads
        for block in self.blocks():
            slots = {"output_graph": None, "score_graph": None, "router": None, "inner_graphs": {}}
            made = graph(nodes).double()
            slots |= {SLOTS[site]: made} if site in SLOTS else {"inner_graphs": {INNER[site]: made}}
            block.fill_slots(**slots)

    def run(self, tokens: Tensor) -> Tensor:
        return self.model(tokens).logits

    def run_cached(self, parts: list[Tensor]) -> Tensor:
        caches = self.model.decoder.new_caches()
        return torch.cat([self.model(part, caches=caches).logits for part in parts], dim=1)

    def blocks(self) -> list[nn.Module]:
        return list(attentions(self.model).values())

    holders = blocks

    def graphs(self) -> list[dict[str, SiteGraph]]:
        found = []
        for block in self.blocks():
            named = {"outputs": block.output_graph, "scores": block.score_graph}
            named |= {INNER_SITES[name]: graph for name, graph in block.inner_graphs.items()}
            found.append({site: graph for site, graph in named.items() if graph is not None})
        return found

    def reads_heads(self, block: nn.Module) -> nn.Module:
        return block.output


class TensorParallel(OwnModel):
    """The same with its heads sharded, over a mesh of this process alone."""

    # What it is made of stays plain: there is no way back.
    def put(self, site: str, graph: Site | Callable[[int], nn.Module]) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        from gohgraph.parallel.tensor import tensor_parallel

        self.kept, self.model = self.model, copy.deepcopy(self.model)
        super().put(site, graph)
        tensor_parallel(self.model, init_device_mesh("cpu", (1,)))

    def take_out(self) -> None:
        self.model = self.kept


class Embedded(nn.Module):
    """Tokens, one block of attention and a residual."""

    def __init__(self, width: int, attention: nn.Module, attend: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.tokens, self.layer, self.attend = nn.Embedding(V, width), attention, attend

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        return x + self.attend(self.layer, x)


class DropIn(Holder):
    """torch's encoder layer; with an even number of heads, the causal mask comes with its hint."""

    def plain(self) -> nn.Module:
        width = self.sizes.heads * self.sizes.features
        hint = self.sizes.heads % 2 == 0

        def attend(layer: nn.Module, x: Tensor) -> Tensor:
            future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)  # [T, T]
            return layer(x, src_mask=future, is_causal=hint)

        layer = nn.TransformerEncoderLayer(width, self.sizes.heads, INNER_WIDTH, 0.0, batch_first=True)
        return Embedded(width, layer, attend)

    def blocks(self) -> list[nn.Module]:
        return [self.model.layer.self_attn]

    def reads_heads(self, block: nn.Module) -> nn.Module:
        return block.out_proj

    def heads_of(self, read: Tensor) -> Tensor:
        # Rows lie in torch's order.
        return super().heads_of(read.unflatten(0, (-1, B)).transpose(0, 1))  # [B, T, H, D]


class FusedQkv(Holder):
    """timm's attention."""

    causal = False

    def plain(self) -> nn.Module:
        width = self.sizes.heads * self.sizes.features
        return Embedded(width, FusedAttention(width, self.sizes.heads), lambda layer, x: layer(x))

    def blocks(self) -> list[nn.Module]:
        return [self.model.layer]

    def reads_heads(self, block: nn.Module) -> nn.Module:
        return block.proj


class Llama(Holder):
    """transformers' Llama with grouped heads; its norms and rotary positions are in float32 whatever the weights."""

    implementation, caches, cached_exact = "sdpa", True, 1e-5

    def plain(self) -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        heads, groups, features, _ = self.sizes
        config = LlamaConfig(
            vocab_size=V, hidden_size=4 * heads, intermediate_size=INNER_WIDTH, num_hidden_layers=1,
            num_attention_heads=heads, num_key_value_heads=groups, head_dim=features, max_position_embeddings=64,
            attn_implementation=self.implementation, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        return LlamaForCausalLM(config)

    def run(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits

    def run_cached(self, parts: list[Tensor]) -> Tensor:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        # The one optional argument whose name changes within transformers 5, by place.
        return torch.cat([self.model(part, None, None, cache, use_cache=True).logits for part in parts], dim=1)

    def blocks(self) -> list[nn.Module]:
        return [layer.self_attn for layer in self.model.model.layers]

    def reads_heads(self, block: nn.Module) -> nn.Module:
        return block.o_proj


class EagerLlama(Llama):
    """The same on transformers' eager attention, whose softmax is in float32."""

    implementation, exact = "eager", 1e-5


class Megatron(Holder):
    """Megatron-Core's GPT on one rank, with torch's core attention."""

    own_sites = ()

    def plain(self) -> nn.Module:
        return self.build(HeadGraphConfig(outputs=None))

    def build(self, graphs: HeadGraphConfig) -> nn.Module:
        """A model with these graphs."""
        from megatron.core.models.gpt import GPTModel
        from megatron.core.transformer.transformer_config import TransformerConfig as MegatronConfig

        from gohgraph.parallel.megatron import head_graph_layer_spec

        heads, groups, features, tokens = self.sizes
        off = ("bias_dropout_fusion", "bias_activation_fusion", "masked_softmax_fusion", "gradient_accumulation_fusion")
        config = MegatronConfig(
            num_layers=1, hidden_size=22, num_attention_heads=heads, num_query_groups=groups, kv_channels=features,
            ffn_hidden_size=INNER_WIDTH, use_cpu_initialization=True, hidden_dropout=0.0, attention_dropout=0.0,
            **dict.fromkeys(off, False),
        )  # fmt: skip
        return GPTModel(
            config, head_graph_layer_spec(graphs, self.layer_spec()), vocab_size=V, max_sequence_length=tokens,
            position_embedding_type="rope", share_embeddings_and_output_weights=False,
        )  # fmt: skip

    def layer_spec(self) -> Any:
        """The layer around which graphs are put."""

    def put(self, site: str, graph: Any) -> None:
        self.kept = self.model
        self.model = self.build(HeadGraphConfig(**{"outputs": None, site: graph})).double()

    def take_out(self) -> None:
        self.model = self.kept

    def run(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        # In Megatron-Core's polarity.
        future = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)  # [1, 1, T, T]
        return self.model(tokens, torch.arange(length).expand_as(tokens), future)

    def blocks(self) -> list[nn.Module]:
        return [layer.self_attention for layer in self.model.decoder.layers]

    def holders(self) -> list[Any]:
        return [block.core_attention for block in self.blocks()]

    def reads_heads(self, block: nn.Module) -> nn.Module:
        return block.linear_proj

    def heads_of(self, read: Tensor) -> Tensor:
        return super().heads_of(read.transpose(0, 1))  # [B, T, H, D]

    def x_of(self, given: Tensor) -> Tensor:
        return given.transpose(0, 1)  # [B, T, M]


class MegatronCore(Megatron):
    """The same on Megatron-Core's own core attention."""

    def layer_spec(self) -> Any:
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

        return get_gpt_layer_local_spec()
