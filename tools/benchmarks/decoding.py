"""Decoding one token with routed heads: the layers to compare, the call to time, and what it reads of the cache."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.timing import Call
from gohgraph.attention.block import MultiHeadAttention
from gohgraph.attention.cache import KeyValueCache
from gohgraph.graphs.config import HeadGraphConfig, RoutingConfig
from gohgraph.graphs.site_config import SiteConfig
from gohgraph.models.config import TransformerConfig
from gohgraph.models.stacks import EncoderLayer

# The form of attention by what a row says of skipping.
SKIPPING = {"off": "plain", "on": "skipped", "auto": None}
# Largest difference between outputs with and without skipping, as a share of the largest output.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class Case(NamedTuple):
    """What is measured: M, H, the keys S a token attends to (its own is the last), and sequences B."""

    d_model: int
    num_heads: int
    context: int
    batch: int


class Variant(NamedTuple):
    """One row: the percentage of active heads, skipping as named in `SKIPPING`, and a graph of outputs or none."""

    percent: int
    skipping: str
    graph: bool = False

    @property
    def name(self) -> str:
        """What the row is called."""
        return f"head graph + MoH {self.percent} %" if self.graph else f"MoH {self.percent} %"


def budget(num_heads: int, percent: int) -> RoutingConfig:
    """Returns the routing by which `percent` of the heads, a multiple of 25, work for each token.

    Example:
        >>> [(b.num_shared, b.top_k) for b in (budget(8, percent) for percent in (100, 75, 50, 25))]
        [(2, 6), (2, 4), (2, 2), (1, 1)]
    """
    active, quarter = num_heads * percent // 100, num_heads // 4
    num_shared = quarter if active > quarter else active // 2
    return RoutingConfig(num_shared, active - num_shared)


def build(variant: Variant | None, case: Case, seed: int = 0) -> EncoderLayer:
    """Returns the causal layer of a row in eval mode, `None` for plain, in float32 on the CPU; equal seeds, weights.

    Example:
        >>> build(Variant(50, "on"), Case(d_model=24, num_heads=8, context=5, batch=1)).attention.object.router.top_k
        2
    """
    # No rotary positions: the same cost in every row. The feed-forward is not run.
    shape: dict[str, Any] = {"num_layers": 1, "d_ff": 1, "positions": "learned", "qk_norm": False}
    config = TransformerConfig(1, case.d_model, case.num_heads, **shape)
    torch.manual_seed(seed)
    layer = plain = EncoderLayer(config, causal=True)
    if variant is not None:
        outputs = SiteConfig() if variant.graph else None
        graphs = HeadGraphConfig(outputs, routing=budget(case.num_heads, variant.percent))
        layer = EncoderLayer(replace(config, head_graph=graphs), causal=True)
        layer.load_state_dict(plain.state_dict(), strict=False)
        attention_of(layer).form = SKIPPING[variant.skipping]
    for key, parameter in layer.named_parameters():
        if ".edges." in key:
            nn.init.normal_(parameter, std=0.02)
        elif ".router." in key:
            nn.init.normal_(parameter, std=case.d_model**-0.5)
    return layer.eval()


def attention_of(layer: nn.Module) -> MultiHeadAttention:
    """Returns the self attention of a layer of ours."""
    attention = layer.get_submodule("attention.object")
    assert isinstance(attention, MultiHeadAttention)
    return attention


def filled_cache(keys: Tensor, values: Tensor) -> KeyValueCache:
    """Returns a cache of its own memory that holds `[B, S, G, D]` keys and values."""
    cache = KeyValueCache()
    cache.update(keys, values)
    return cache


class Decode(Call):
    """One call to be measured: attention sublayers decode one token; the caches forget it before the next call.

    Args:
        layers: `EncoderLayer`s, one after another.
        caches: of each, filled with the tokens before.
        tokens: `[N, B, 1, M]`; call n reads token n modulo N.
    """

    def __init__(self, layers: list[EncoderLayer], caches: list[KeyValueCache], tokens: Tensor) -> None:
        super().__init__(tokens.device)
        self.layers, self.caches, self.past = layers, caches, len(caches[0])
        self.tokens, self.x = itertools.cycle(tokens), tokens[0]

    def prepare(self) -> None:
        """Goes on to the next token."""
        for cache in self.caches:
            cache.truncate(self.past)
        self.x = next(self.tokens)  # [B, 1, M]

    def work(self) -> None:
        """Decodes the token."""
        with torch.no_grad():
            x = self.x
            for layer, cache in zip(self.layers, self.caches, strict=True):
                x = layer.attention(x, cache=cache)[0]


@torch.no_grad()
def decoded(layer: EncoderLayer, cache: KeyValueCache, x: Tensor) -> Tensor:
    """Returns what the attention of `layer` adds to one token `[B, 1, M]`, and lets the cache forget it again."""
    past, attention = len(cache), layer.attention
    y = attention.object(attention.norm(x), cache=cache)[0]  # [B, 1, M]
    cache.truncate(past)
    return y


def check_agreement(layers: dict[Variant | None, EncoderLayer], cache: KeyValueCache, tokens: Tensor) -> None:
    """Checks that rows which differ in skipping alone give equal outputs for tokens `[N, B, 1, M]`.

    Raises:
        RuntimeError: outputs that differ by more than `TOLERANCE` of the largest.
    """
    for variant, layer in layers.items():
        if variant is None or variant.skipping == "off":
            continue
        for x in tokens:
            expected, y = (decoded(each, cache, x) for each in (layers[variant._replace(skipping="off")], layer))
            error = ((y - expected).abs().max() / expected.abs().max()).item()
            # Not error > tolerance: NaN must not pass.
            if not error <= TOLERANCE[x.dtype]:
                raise RuntimeError(
                    f"Expected equal outputs with and without skipping (got {variant.name}, skipping "
                    f"{variant.skipping}: {error:.1e} of the largest apart). Do not use skipping before that is found."
                )


def heads_read(layer: EncoderLayer, cache: KeyValueCache, x: Tensor) -> Tensor:
    """Returns which cached heads `[B, G]` decoding the token `x [B, 1, M]` reads.

    One head after another is filled with NaN: where the output becomes NaN, it has been read.
    """
    keys, values = cache.read()  # [B, S, G, D], views into the cache
    found = []
    for head in range(keys.shape[2]):
        kept = [heads[:, :, head].clone() for heads in (keys, values)]
        for heads in (keys, values):
            heads[:, :, head] = float("nan")
        found.append(decoded(layer, cache, x).isnan().any(dim=-1).squeeze(1))  # [B]
        for heads, saved in zip((keys, values), kept, strict=True):
            heads[:, :, head] = saved
    return torch.stack(found, dim=-1)


def cache_bytes(read: Tensor, length: int, head_dim: int, itemsize: int) -> float:
    """Returns the bytes of keys and values read per token, the mean over sequences.

    Args:
        read: bool `[B, G]`, the cached heads that are read.
        length: S, keys of each.
        head_dim: D.
        itemsize: bytes per number.

    Example:
        >>> cache_bytes(torch.tensor([[True, False], [True, True]]), length=100, head_dim=8, itemsize=4)
        9600.0
    """
    return read.sum().item() / read.shape[0] * length * head_dim * 2 * itemsize
