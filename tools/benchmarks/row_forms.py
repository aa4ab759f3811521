"""The forms of every row of `rows`: what they compute, and what ours cannot do without beyond the first."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import added_work, convert, decoding, generate
from benchmarks.backbones import BACKBONES, Case
from benchmarks.forms import VARIANTS, Size, build
from benchmarks.limits import Work
from benchmarks.minimal import MinimalModel
from benchmarks.speed import Step
from benchmarks.timing import Call
from gohgraph.convert.dropin import GraphMultiheadAttention
from gohgraph.graphs.config import HeadGraphConfig
from gohgraph.graphs.conv import HeadGraphConv
from gohgraph.graphs.site_config import SiteConfig

NOTHING = Work(0.0, 0.0)
LAYERS = 4


class Form(NamedTuple):
    """What is called, and its work beyond that of the first form."""

    call: Call
    added: Work = NOTHING


Forms = dict[str, Form]


class LoopStep(Call):
    """One token of the minimal loop after `past` others."""

    def __init__(self, model: MinimalModel, past: int) -> None:
        super().__init__(torch.device("cpu"))
        self.model, self.past, self.token = model, past, torch.zeros(1, 1, dtype=torch.long)
        self.caches = model.new_caches(1).normal_()

    @torch.no_grad()
    def work(self) -> None:
        """Decodes the token."""
        self.model(self.token, self.caches, self.past)


class Padded(Call):
    """A training step of torch's encoder layer in a batch whose last sequence has a quarter of padding."""

    def __init__(self, layer: nn.TransformerEncoderLayer, x: Tensor, grad: Tensor) -> None:
        super().__init__(x.device)
        self.layer, self.x = layer, x
        self.padding = torch.zeros(x.shape[:2], dtype=torch.bool)  # [B, T]
        self.padding[-1, x.shape[1] - x.shape[1] // 4 :] = True
        self.grad = grad.masked_fill(self.padding.unsqueeze(-1), 0.0)  # [B, T, M]

    def prepare(self) -> None:
        """Forgets the gradients of the call before."""
        self.x.grad = None
        self.layer.zero_grad(set_to_none=True)

    def work(self) -> None:
        """Runs the layer and its backward pass."""
        self.layer(self.x, src_key_padding_mask=self.padding).backward(self.grad)


class HalfStep(Step):
    """A training step whose products run in bfloat16, by autocast."""

    def work(self) -> None:
        """Runs the block and its backward pass."""
        with torch.autocast("cpu", torch.bfloat16):
            y = self.function(self.x)[0]
        y.backward(self.grad.to(y.dtype))


def blocks(names: Sequence[str], *size: int) -> Forms:
    """Training steps of a causal block, plain attention first."""
    of = Size(*size)
    x, grad = torch.randn(2, of.batch, of.length, of.d_model)  # [B, T, M] each
    x.requires_grad_()
    return {name: Form(Step(layer, "block", "forward+backward", x, grad), _of_block(name, layer, of))
            for name in ("plain", *names) for layer in [build(name, of)]}  # fmt: skip


def half_blocks(*size: int) -> Forms:
    """Training steps of a causal block in float32, and of all in bfloat16."""
    forms = blocks(("output", "score-complete"), *size)
    for name, (step, added) in list(forms.items()):
        assert isinstance(step, Step)
        forms[f"{name}, bf16"] = Form(HalfStep(step.layer, "block", "forward+backward", step.x, step.grad), added)
    return forms


def compiled_blocks(*size: int) -> Forms:
    """The same under `torch.compile`, after something else has made the compiler ready."""
    torch.compile(nn.Linear(3, 3))(torch.randn(5, 3)).sum().backward()
    torch._inductor.config.force_disable_caches = True
    forms = blocks(("score-ring2", "score-complete"), *size)
    for step, _ in forms.values():
        assert isinstance(step, Step)
        step.function = torch.compile(step.function)
    return forms


def converted_training(heads: int, tokens: int) -> Forms:
    """Training steps of a Llama of transformers, and with complete score graphs in it."""
    ids = torch.randint(convert.VOCABULARY, (1, tokens))  # [B, T]
    models = _llamas(heads, tokens, 1, ("plain", "score graph"))
    per_edge = (tokens / 2,)
    return {name: Form(convert.Step(BACKBONES["Llama"], model, ids, 1), added_work.trained(model, tokens, *per_edge))
            for name, model in models.items()}  # fmt: skip


def converted_decode(heads: int, past: int) -> Forms:
    """One token more of that Llama after `past` cached ones."""
    token = torch.zeros(1, 1, dtype=torch.long)
    models = _llamas(heads, 1, past, ("plain", "score graph", "score graph, ring of 2"))
    return {name: Form(convert.Decode(BACKBONES["Llama"], model, token, past), added_work.decoded(model))
            for name, model in models.items()}  # fmt: skip


def dropin(d_model: int, heads: int, tokens: int, batch: int) -> Forms:
    """Torch's encoder layer under a padding mask, and with a complete score graph in its place of attention."""
    layer = nn.TransformerEncoderLayer(d_model, heads, 4 * d_model, 0.0, "gelu", batch_first=True, norm_first=True)
    ours = copy.deepcopy(layer)
    graph = HeadGraphConv.from_config(SiteConfig(), heads, d_model // heads, d_model)
    ours.register_module("self_attn", GraphMultiheadAttention.from_torch(layer.self_attn, score_graph=_moved(graph)))
    x, grad = torch.randn(2, batch, tokens, d_model)  # [B, T, M] each
    x.requires_grad_()
    added = added_work.trained(ours, batch * tokens, tokens)
    return {"torch": Form(Padded(layer, x, grad)), "score graph": Form(Padded(ours, x, grad), added)}


def routed(d_model: int, heads: int, context: int) -> Forms:
    """One token through four attention sublayers, with all heads, and with those that a router leaves active."""
    case = decoding.Case(d_model, heads, context, 1)
    tokens = torch.randn(64, 1, 1, d_model)  # [N, B, 1, M]
    keys, values = torch.randn(2, 1, context - 1, heads, d_model // heads)  # [B, S-1, H, D] each
    caches = [decoding.filled_cache(keys, values) for _ in range(LAYERS)]
    forms = {}
    for percent in (100, 75, 50):
        variant = None if percent == 100 else decoding.Variant(percent, "auto")
        stack = [decoding.build(variant, case, seed) for seed in range(LAYERS)]
        unread = (percent / 100 - 1) * LAYERS * 4.0 * (2 * context * d_model + 2 * d_model**2)
        forms[variant.name if variant else "plain"] = Form(
            decoding.Decode(stack, caches, tokens), Work(0.0, unread)
        )
    return forms


def loop(d_model: int, heads: int, layers: int, d_ff: int, prompt: int) -> Forms:
    """One token of a minimal loop, and of our models and transformers' of the same size."""
    case = generate.Case(d_model, heads, layers, d_ff, prompt, 1)
    minimal = generate.build("minimal", case, 1)
    assert isinstance(minimal, MinimalModel)
    forms = {"minimal": Form(LoopStep(minimal, prompt))}
    for name in (*generate.OURS, "Llama"):
        model = generate.build(name, case, 1)
        backbone = BACKBONES["Llama" if name == "Llama" else "own"]
        step = convert.Decode(backbone, model, torch.zeros(1, 1, dtype=torch.long), prompt)
        forms[name] = Form(step, added_work.decoded(model))
    return forms


def _llamas(heads: int, tokens: int, past: int, variants: Sequence[str]) -> dict[str, nn.Module]:
    plain = BACKBONES["Llama"].build(Case(512, heads, 2, tokens, 1, past))
    return {name: convert.converted(plain, convert.VARIANTS[name]) for name in variants}


def _of_block(name: str, layer: nn.Module, size: Size) -> Work:
    graphs = VARIANTS[name].head_graph or HeadGraphConfig(outputs=None)
    numbers = size.d_model / size.num_heads if graphs.outputs else size.length / 2
    return added_work.trained(layer, size.batch * size.length, numbers)


@torch.no_grad()
def _moved(graph: HeadGraphConv) -> HeadGraphConv:
    for parameter in graph.edges.parameters():
        nn.init.normal_(parameter, std=0.02)
    return graph
