"""The opponent in generating text: a decoder in the fewest calls that torch needs for one token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gohgraph.models.models import LanguageModel


class MinimalLayer(nn.Module):
    """A layer with one matrix for queries, keys and values and one for both halves of SwiGLU."""

    def __init__(self, d_model: int, num_heads: int, d_ff: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.before_attention, self.before_feed_forward = (nn.RMSNorm(d_model, eps=1e-5) for _ in range(2))
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.output = nn.Linear(d_model, d_model, bias=False)
        self.inner = nn.Linear(d_model, 2 * d_ff, bias=False)
        self.outer = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], cache: Tensor, past: int) -> Tensor:
        """Returns `[B, T, M]`; `cache [2, B, H, S, D]` takes in keys and values."""
        batch, tokens, d_model = x.shape
        heads = self.qkv(self.before_attention(x)).view(batch, tokens, 3, self.num_heads, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # [B, H, T, D] each
        cache[0, :, :, past : past + tokens], cache[1, :, :, past : past + tokens] = _turned(k, *turn), v
        k, v = cache[:, :, :, : past + tokens]
        z = F.scaled_dot_product_attention(_turned(q, *turn), k, v, is_causal=tokens > 1)
        x = x + self.output(z.transpose(1, 2).reshape(batch, tokens, d_model))
        inner, gate = self.inner(self.before_feed_forward(x)).chunk(2, -1)
        return x + self.outer(F.silu(inner) * gate)


class MinimalModel(nn.Module):
    """A plain `LanguageModel` with rotary positions, RMS norms, SwiGLU and no biases, with its weights.

    Args:
        model: the model.
        length: the longest sequence; caches and rotary tables are made once.
    """

    def __init__(self, model: LanguageModel, length: int) -> None:
        super().__init__()
        config = model.config
        self.config, self.embedding = config, model.embedding.tokens
        sizes = (config.d_model, config.num_heads, config.d_ff)
        layers = [MinimalLayer(*sizes) for _ in range(config.num_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm, self.length = model.decoder.norm, length
        angles = torch.arange(length).unsqueeze(1) * 10000.0 ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
        self.cos, self.sin = angles.cos(), angles.sin()  # [S, D/2]
        for own, layer in zip(layers, model.decoder.layers, strict=True):
            _copy_weights(own, layer)

    def new_caches(self, batch: int) -> Tensor:
        """Returns room for the keys and values of all layers, `[L, 2, B, H, S, D]`."""
        config = self.config
        return torch.empty(len(self.layers), 2, batch, config.num_heads, self.length, config.head_dim)

    def forward(self, tokens: Tensor, caches: Tensor, past: int = 0) -> Tensor:
        """Returns the logits `[B, T, V]` of tokens `[B, T]` after `past` ones."""
        rows = slice(past, past + tokens.shape[1])
        turn, x = (self.cos[rows], self.sin[rows]), self.embedding(tokens)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, turn, cache, past)
        return F.linear(self.norm(x), self.embedding.weight)

    @torch.no_grad()
    def generate(self, tokens: Tensor, max_new_tokens: int) -> Tensor:
        """Continues prompts `[B, T]` greedily, `[B, T + new]`."""
        caches, new, past = self.new_caches(len(tokens)), tokens, 0
        for _ in range(max_new_tokens):
            logits = self(new, caches, past)[:, -1]  # [B, V]
            past, new = past + new.shape[1], logits.argmax(-1, keepdim=True)
            tokens = torch.cat((tokens, new), dim=1)
        return tokens


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


@torch.no_grad()
def _copy_weights(own: MinimalLayer, layer: nn.Module) -> None:
    weight = {name.removesuffix(".weight"): parameter for name, parameter in layer.named_parameters()}
    own.qkv.weight.copy_(torch.cat([weight[f"attention.object.{name}"] for name in ("query", "key", "value")]))
    own.inner.weight.copy_(torch.cat([weight[f"feed_forward.object.{name}"] for name in ("inner", "gate")]))
    own.output.weight.copy_(weight["attention.object.output"])
    own.outer.weight.copy_(weight["feed_forward.object.outer"])
    own.before_attention.weight.copy_(weight["attention.norm"])
    own.before_feed_forward.weight.copy_(weight["feed_forward.norm"])
