"""The forms of one attention layer that are timed: plain, with head graphs, routed, and other libraries'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.decoding import attention_of, budget
from gohgraph.attention.block import MultiHeadAttention
from gohgraph.attention.kernels.mixed_attention import kernel_refuses
from gohgraph.convert.fold import fold
from gohgraph.graphs.baselines.presets import MIXING
from gohgraph.graphs.config import HeadGraphConfig
from gohgraph.graphs.site_config import SiteConfig
from gohgraph.models.config import TransformerConfig
from gohgraph.models.stacks import EncoderLayer


class Size(NamedTuple):
    """What is measured: M, H, T and B."""

    d_model: int
    num_heads: int
    length: int
    batch: int


@dataclass(frozen=True)
class Variant:
    """One form of attention.

    Args:
        head_graph: its graphs.
        form: in which its `MultiHeadAttention` computes, of `gohgraph.attention.forms.FORMS`; `None` for the default.
        change: applied to that module once the edges have their weights.
        fewest_heads: of a size that can be measured.
        active: percentage of heads that work for a token, under a router; `None` for no router.
        foreign: makes another library's layer of the plain one, `None` for ours.
    """

    head_graph: HeadGraphConfig | None = None
    form: str | None = None
    change: Callable[[nn.Module], object] = lambda attention: None
    fewest_heads: int = 1
    active: int | None = None
    foreign: Callable[[EncoderLayer, Size], nn.Module] | None = None

    def runs(self, size: Size, device: str, dtype: torch.dtype) -> bool:
        """Whether the form can be measured there: a kernel where a GPU takes these heads, all others everywhere."""
        head_dim = size.d_model // size.num_heads
        return self.form != "kernel" or not kernel_refuses(torch.device(device), dtype, size.num_heads, head_dim)


class TorchLayer(nn.Module):
    """The outside opponent, `torch.nn.TransformerEncoderLayer`, with the weights of a plain causal `EncoderLayer`."""

    def __init__(self, plain: EncoderLayer, size: Size) -> None:
        super().__init__()
        self.layer = own = nn.TransformerEncoderLayer(
            size.d_model, size.num_heads, 4 * size.d_model, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(size.length))
        attention = attention_of(plain)
        projections = (attention.query, attention.key, attention.value)
        with torch.no_grad():
            own.self_attn.in_proj_weight.copy_(torch.cat([linear.weight for linear in projections]))  # [3*M, M]
            own.self_attn.in_proj_bias.copy_(torch.cat([linear.bias for linear in projections]))  # [3*M]
        theirs = (own.self_attn.out_proj, own.norm1, own.norm2, own.linear1, own.linear2)
        ours = ("attention.object.output", "attention.norm", "feed_forward.norm", "feed_forward.object.inner",
                "feed_forward.object.outer")  # fmt: skip
        for target, source in zip(theirs, map(plain.get_submodule, ours), strict=True):
            target.load_state_dict(source.state_dict())

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """The whole block, `[B, T, M]`."""
        return (self.layer(x, src_mask=self.mask, is_causal=True),)

    def attention(self, x: Tensor) -> tuple[Tensor]:
        """The attention sublayer alone, `[B, T, M]`."""
        y = self.layer.norm1(x)
        return (x + self.layer.self_attn(y, y, y, need_weights=False, attn_mask=self.mask, is_causal=True)[0],)


class XAttention(nn.Module):
    """The attention of x-transformers with the weights of ours, without biases, which it does not have.

    Args:
        ours: plain causal attention.
        talking: talking heads before and after the softmax, on materialised maps.
    """

    def __init__(self, ours: MultiHeadAttention, *, talking: bool = False) -> None:
        super().__init__()
        try:
            from x_transformers.x_transformers import Attention
        except ImportError as error:
            raise ImportError(
                "Expected x-transformers to compare with (got none). Do pip install 'gohgraph[benchmark]', or choose "
                "other forms with --only."
            ) from error
        settings = {"pre_talking_heads": True, "post_talking_heads": True} if talking else {"flash": True}
        heads, width = ours.num_heads, ours.head_dim
        self.attention = Attention(ours.d_model, dim_head=width, heads=heads, causal=True, **settings)
        theirs = (self.attention.to_q, self.attention.to_k, self.attention.to_v, self.attention.to_out)
        for target, source in zip(theirs, (ours.query, ours.key, ours.value, ours.output), strict=True):
            target.load_state_dict({"weight": source.weight})

    def forward(self, x: Tensor) -> tuple[Tensor, tuple]:
        """Attends, `[B, T, M]`."""
        return self.attention(x), ()


class XLayer(nn.Module):
    """An `EncoderLayer` around `XAttention`: norms, residuals and feed-forward are ours."""

    def __init__(self, plain: EncoderLayer, *, talking: bool = False) -> None:
        super().__init__()
        self.residual, self.feed_forward = plain.attention, plain.feed_forward
        self.residual.object = XAttention(attention_of(plain), talking=talking)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """The whole block, `[B, T, M]`."""
        return (self.feed_forward(self.attention(x)[0]),)

    def attention(self, x: Tensor) -> tuple[Tensor]:
        """The attention sublayer alone, `[B, T, M]`."""
        return (self.residual(x)[0],)


def x_transformers_layer(plain: EncoderLayer, size: Size, *, talking: bool = False) -> XLayer:
    """Returns x-transformers' layer with the weights of the plain one."""
    return XLayer(plain, talking=talking)


def _score_ring(in_degree: int, form: str | None = None) -> Variant:
    return Variant(HeadGraphConfig(None, SiteConfig.ring(in_degree)), form=form, fewest_heads=in_degree)


def _score_complete(form: str | None = None) -> Variant:
    return Variant(HeadGraphConfig(None, SiteConfig()), form=form)


VARIANTS = {
    "plain": Variant(),
    "torch": Variant(foreign=TorchLayer),
    "x-transformers": Variant(foreign=x_transformers_layer),
    "output": Variant(HeadGraphConfig()),
    "output-pyg": Variant(HeadGraphConfig(SiteConfig(backend="pyg"))),
    "output-folded": Variant(HeadGraphConfig(SiteConfig(edges="static")), change=fold),
    "output-ring4": Variant(HeadGraphConfig(SiteConfig.ring(4)), fewest_heads=4),
    **{f"score-ring{k}": _score_ring(k) for k in (2, 4)},
    **{f"score-ring{k}-wide": _score_ring(k, "wide") for k in (2, 4)},
    **{f"score-ring{k}-eager": _score_ring(k, "maps") for k in (2, 4)},
    **{f"score-ring{k}-kernel": _score_ring(k, "kernel") for k in (2, 4)},
    "score-complete": _score_complete(),
    "score-complete-eager": _score_complete("maps"),
    "score-complete-kernel": _score_complete("kernel"),
    **{f"moh-{percent}": Variant(fewest_heads=4, active=percent) for percent in (75, 50, 25)},
    "talking-heads": Variant(HeadGraphConfig(None, MIXING, weights=MIXING)),
    "x-talking-heads": Variant(foreign=partial(x_transformers_layer, talking=True)),
    "moh-50-all": Variant(form="plain", fewest_heads=4, active=50),
}


def build(name: str, size: Size) -> nn.Module:
    """Returns the causal layer of a variant, in float32 on the CPU, with the same weights for all.

    Example:
        >>> build("output", Size(d_model=12, num_heads=4, length=5, batch=2)).attention.object.output_graph.num_heads
        4
    """
    variant = VARIANTS[name]
    # No rotary positions, as in torch's layer: the same cost in every form, they would flatter the ratios.
    shape: dict[str, Any] = {"d_ff": 4 * size.d_model, "positions": "learned", "qk_norm": False}
    config = TransformerConfig(1, size.d_model, size.num_heads, **shape)
    torch.manual_seed(0)
    plain = EncoderLayer(config, causal=True)
    if variant.foreign is not None:
        return variant.foreign(plain, size)
    graphs = variant.head_graph
    if variant.active is not None:
        graphs = HeadGraphConfig(outputs=None, routing=budget(size.num_heads, variant.active))
    layer = EncoderLayer(replace(config, head_graph=graphs, num_layers=1), causal=True)
    layer.load_state_dict(plain.state_dict(), strict=False)
    for key, parameter in layer.named_parameters():
        if ".edges." in key or ".router." in key:
            nn.init.normal_(parameter, std=0.02)
    attention_of(layer).form = variant.form
    variant.change(attention_of(layer))
    return layer
