"""Small models with weights as after training, shared by the tests. Sizes are distinct primes or twice a prime."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from pairs import EXHAUSTIVE
from torch import Tensor, nn

from gohgraph import (
    Classifier,
    ClassifierConfig,
    HeadGraphConfig,
    HeadGraphConv,
    LanguageModel,
    RoutingConfig,
    SiteConfig,
    Transformer,
    TransformerConfig,
)

TOLERANCE = {"rtol": 0.0, "atol": 1e-10}
# Sequences, their tokens, and the vocabulary.
B, T, V = 2, 7, 13
# The models, by what they are for, and those of `GRAPHS` with losses of their own.
KINDS = ("language", "translation", "classes")
ROUTED = ("moh", "moh-outputs", "experts")

# Every way of running head graphs: sparse scores prefill as wide heads, complete and two-round ones eagerly; then with
# fewer edges or heads for each token.
GRAPHS = {
    "plain": None,
    "outputs": HeadGraphConfig(),
    "outputs-sparse": HeadGraphConfig(SiteConfig.ring(3)),
    "outputs-static": HeadGraphConfig(SiteConfig(topology="star", edges="static")),
    "scores-ring": HeadGraphConfig(None, SiteConfig.ring(2)),
    "scores-complete": HeadGraphConfig(None, SiteConfig()),
    "scores-pyg": HeadGraphConfig(None, SiteConfig.ring(2, backend="pyg")),
    "rounds": HeadGraphConfig(SiteConfig(rounds=2), SiteConfig.ring(2, rounds=2)),
    "cross-layer": HeadGraphConfig(SiteConfig(cross_layer=1, norm=True), SiteConfig.ring(3, rank=3)),
    "top-edges": HeadGraphConfig(SiteConfig(top_edges=2), SiteConfig.ring(3, top_edges=2)),
    "moh": HeadGraphConfig.moh(2, 2),
    "moh-outputs": HeadGraphConfig(SiteConfig(), SiteConfig.ring(2), RoutingConfig(2, 2)),
    "experts": HeadGraphConfig.graph_experts(2, rounds=2, top_k=2, alignment=0.1),
}


def small_config(graph: str = "plain", **settings) -> TransformerConfig:
    """A configuration of M = 30, H = 5, D = 6 over 13 tokens, with one of `GRAPHS`."""
    shape = {"d_model": 30, "num_heads": 5, "num_layers": 3, "d_ff": 11, "max_length": 23}
    return TransformerConfig(vocab_size=V, head_graph=GRAPHS[graph], **{**shape, **settings})


def with_graphs(graphs: HeadGraphConfig | None, **settings) -> TransformerConfig:
    """The configuration of `small_config` with these head graphs."""
    return replace(small_config(**settings), head_graph=graphs)


@torch.no_grad()
def trained_like(model: nn.Module) -> nn.Module:
    """Draws weights far from their start, in float64, so that nothing is zero, uniform or negligible."""
    model.double()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        if isinstance(module, HeadGraphConv):
            nn.init.normal_(module.edges.bias)
            if module.edges.weight is not None:
                nn.init.normal_(module.edges.weight)
    return model


@torch.no_grad()
def moved(module: nn.Module) -> nn.Module:
    """Opens every edge, far from the neutral start, and leaves all other weights as they are."""
    for part in module.modules():
        if isinstance(part, HeadGraphConv):
            nn.init.normal_(part.edges.bias)
            if part.edges.weight is not None:
                nn.init.normal_(part.edges.weight, std=part.edges.context_dim**-0.5)
    return module


def random_tokens(length: int, batch: int = B) -> Tensor:
    """Tokens `[B, length]`, none of them special."""
    return torch.randint(3, V, (batch, length))


def language_model(graph: str = "plain", **settings) -> LanguageModel:
    """A language model with one of `GRAPHS`, as after training."""
    return trained_like(LanguageModel(small_config(graph, **{"tie_embeddings": False, **settings})))


def translator(graph: str = "plain", **settings) -> Transformer:
    """An encoder and decoder with one of `GRAPHS`, as after training."""
    # Tied to random embeddings, a model says its last token again and again: nothing to tell hypotheses apart.
    model = trained_like(Transformer(small_config(graph, **{"num_layers": 2, "tie_embeddings": False, **settings})))
    # The ending token, 2, is rarely the likeliest.
    model.head.weight.data[2] = 0
    return model


def classifier(graph: str = "plain", positions: str = "rotary", **settings) -> Classifier:
    """A classifier with one of `GRAPHS`, as after training."""
    return trained_like(Classifier(ClassifierConfig(small_config(graph, positions=positions), 3, **settings)))


def model_of(kind: str, config: TransformerConfig) -> nn.Module:
    """A new model for `"language"`, `"translation"` or `"classes"`."""
    if kind == "classes":
        return Classifier(ClassifierConfig(config, 3))
    return {"language": LanguageModel, "translation": Transformer}[kind](config)


def inputs_for(kind: str) -> tuple[Tensor, ...]:
    """Positional arguments of such a model, targets last."""
    if kind == "classes":
        return random_tokens(T), torch.tensor([2, 0])
    return (random_tokens(5),) * (kind == "translation") + (random_tokens(T), random_tokens(T))


def gradients_of(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """Gradients by name; of parameters a loss does not reach, zeros."""
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


def assert_same(own: dict[str, Tensor], other: dict[str, Tensor], *, exactly: bool = False) -> None:
    """Equality of tensors by name, bit for bit or to 1e-10."""
    assert own.keys() == other.keys()
    for name in own:
        if exactly:
            assert torch.equal(own[name], other[name]), name
        else:
            torch.testing.assert_close(own[name], other[name], rtol=1e-10, atol=1e-10, msg=name)


def assert_equal_to(actual: Tensor, expected: Tensor) -> None:
    """Equality to 1e-10, absolute."""
    torch.testing.assert_close(actual, expected, **TOLERANCE)


class FusedAttention(nn.Module):
    """timm's `Attention` (vision transformers, timm 1.0), line by line; timm itself needs torchvision."""

    def __init__(self, dim, num_heads, qk_norm=False, scale_norm=False, fused=True):
        super().__init__()
        self.num_heads, self.head_dim, self.scale = num_heads, dim // num_heads, (dim // num_heads) ** -0.5
        self.fused_attn = fused
        self.qkv = nn.Linear(dim, dim * 3)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(0.0)
        self.norm = nn.LayerNorm(dim) if scale_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x, attn_mask=None):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        else:
            attn = (q * self.scale) @ k.transpose(-2, -1)
            x = self.attn_drop(attn.softmax(dim=-1)) @ v
        x = self.norm(x.transpose(1, 2).reshape(B, N, C))
        return self.proj_drop(self.proj(x))


def traced(module: nn.Module) -> nn.Module:
    """The module as `torch.compile` sees it: one graph forward and one back, run without building machine code.

    What could break here is the tracing; kernels are built from its graphs where `tests/graphs/test_conv.py` compiles.
    """
    return torch.compile(module, fullgraph=True, backend="aot_eager")


def compiled(module: nn.Module) -> nn.Module:
    """The module traced, and with `GOHGRAPH_EXHAUSTIVE` as machine code, which takes half a minute to build."""
    return torch.compile(module, fullgraph=True) if EXHAUSTIVE else traced(module)


def load_script(folder: str, name: str) -> ModuleType:
    """Imports a script of `examples` or `tools`, which are no packages."""
    path = Path(__file__).parents[1] / folder / f"{name}.py"
    specification = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(specification)
    # Dataclasses look their module up by name.
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module
