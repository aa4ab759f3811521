"""Puts head graphs into a model, in place and without changing what it computes, and takes them out again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import nn

from gohgraph.convert import fused_qkv, hugging_face, own_models, torch_modules
from gohgraph.convert import projections as projected
from gohgraph.convert.blocks import (
    CONVERSION,
    Block,
    Conversion,
    Report,
    Search,
    build_slots,
    head_graph_parameters,
    head_slots,
)
from gohgraph.convert.comparison import Comparison
from gohgraph.convert.restoring import note_origins
from gohgraph.graphs.config import HeadGraphConfig

Model = TypeVar("Model", bound=nn.Module)
Where = Callable[[str], bool] | str | Sequence[str] | None
# In order: what one finds, the others leave alone.
FAMILIES = (torch_modules, hugging_face, fused_qkv, projected)
WHOLE_MODELS_ONLY = ("queries", "keys", "values", "weights")


# Whatever mode the caller is in, head graphs are to be trained.
@torch.inference_mode(False)
def convert(
    model: nn.Module,
    config: HeadGraphConfig | None = None,
    *,
    where: Where = None,
    freeze_backbone: bool = False,
    example: dict[str, Any] | None = None,
) -> Report:
    r"""Gives the attention of an existing model head graphs, in place; new ones change nothing it computes.

    It finds `torch.nn.MultiheadAttention`; all attention of Hugging Face transformers that goes by its attention
    interface (Llama, Qwen, Mistral, GPT-2, GPT-NeoX, BERT, RoBERTa, ViT, T5, Whisper, BART and most others), with
    eager, sdpa or flash attention; timm's attention with fused queries, keys and values; gohgraph's own models;
    and, for output graphs alone, attention that ends in a projection of a usual name (BLOOM, Falcon, DeBERTa, ...).
    The context of the edges is the attention module's own input.

    Args:
        model: changed in place. Parameters stay the very same objects.
        config: graphs and routing of every attention module; `None` for `HeadGraphConfig()`, a complete graph between
            head outputs. Foreign models take `outputs`, `scores` and `routing`, without `cross_layer`, `keyed` and
            `alignment`; `layers` counts the attention modules that are replaced, in model order. A router changes what
            the model computes unless it is `straight_through` and all heads work.
        where: which attention modules: a function of their names, or patterns such as `"*.layers.[0-3].*"`; `None` for
            all.
        freeze_backbone: only head graphs and routers are trained.
        example: inputs of one forward pass of a model that is neither for tokens, images nor audio of transformers.

    One short forward pass before and after is compared, without gradients and layer by layer: on token ids of which
    windows and choices of keys up to 155 leave some out, or on `example`. What cannot be compared, a model on meta or
    one that needs an example, stands in `Report.unchecked`; offloaded weights are brought in for it.

    Returns:
        A `Report`: the model, the names replaced, and those skipped with the reason.

    Raises:
        ValueError: nothing was found that could be converted, a model that is converted already, a configuration its
            attention cannot have, attention that would compute something else: the model is then left as it was.
        ImportError: transformers is older than 5.0.

    Example:
        >>> import torch
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, batch_first=True), 2)
        >>> x = torch.randn(2, 5, 32)
        >>> before = model.eval()(x)
        >>> report = convert(model)
        >>> report.replaced, torch.allclose(model(x), before, atol=1e-6)
        (['layers.0.self_attn', 'layers.1.self_attn'], True)
    """
    config = HeadGraphConfig() if config is None else config
    model = _uncompiled(model)
    _check(model, config)
    if own_models.is_own(model):
        if where is not None:
            raise ValueError(f"Expected where=None for a model of gohgraph (got {where!r}). Do leave it out.")
        report = Report(model, own_models.give(model, config), {})
    else:
        report = _convert(model, config, _chooser(where), example)
    if freeze_backbone:
        model.requires_grad_(False)
        for _, parameter in head_graph_parameters(model):
            parameter.requires_grad_(True)
    return report


def unconvert(model: Model) -> Model:
    """Takes all head graphs and routers out of a model that `convert` changed; the backbone keeps its weights.

    Args:
        model: changed in place; one without head graphs stays as it is.

    Returns:
        The model.

    Example:
        >>> model = nn.TransformerEncoderLayer(32, 4)
        >>> _ = convert(model)
        >>> type(unconvert(model).self_attn).__name__
        'MultiheadAttention'
    """
    inner = _uncompiled(model)
    if own_models.is_own(inner):
        own_models.give(inner, None)
        return model
    for family in FAMILIES:
        family.undo(inner)
    for module in inner.modules():
        vars(module).pop(CONVERSION, None)
    return model


def _uncompiled(model: nn.Module) -> nn.Module:
    """The model inside a compiled one. What was compiled is compiled anew: torch does not look for new hooks."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    return getattr(model, "_orig_mod", model)


def find_blocks(model: nn.Module, example: dict[str, Any] | None = None) -> Search:
    """Returns all attention blocks of a foreign model that can take head graphs."""
    search = Search()
    for family in FAMILIES:
        family.find(model, search, example)
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    search.blocks = dict(sorted(search.blocks.items(), key=lambda item: order[item[0]]))
    search.skipped = {name: reason for name, reason in search.skipped.items() if not search.contains_or_is_inside(name)}
    return search


def _convert(
    model: nn.Module, config: HeadGraphConfig, chosen: Callable[[str], bool], example: dict[str, Any] | None
) -> Report:
    search = find_blocks(model, example)
    skipped = dict(search.skipped)
    blocks: list[Block] = []
    for name, block in search.blocks.items():
        if not chosen(name):
            skipped[name] = "where leaves it out"
        elif config.scores is not None and block.no_scores:
            skipped[name] = block.no_scores
        else:
            blocks.append(block)
    if not blocks:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:4]) or "no attention at all"
        raise ValueError(
            f"Expected attention that can be given head graphs (got none in {type(model).__name__}: {reasons}). Do see "
            "the families that convert names, or use GraphMultiheadAttention."
        )
    if config.routing is not None:
        for block in blocks:
            config.routing.check_heads(block.num_heads, len(blocks))
    names = {id(module): name for name, module in model.named_modules()}
    projections = {block.name: names[id(block.projection)] for block in blocks if block.projection is not None}
    sizes = {block.name: (block.num_heads, block.head_dim, block.d_model) for block in blocks}
    # All are built before any is attached: what cannot be built leaves the model as it was.
    slots = [build_slots(config.at_layer(layer, len(blocks)), block, layer) for layer, block in enumerate(blocks)]
    comparison = Comparison(model, blocks, dict(hugging_face.transformers_models(model)), example)
    try:
        for block, slots_of_block in zip(blocks, slots, strict=True):
            block.attach(**slots_of_block)
        conversion = model.__dict__[CONVERSION] = Conversion(config, sizes, projections)
        note_origins(model, conversion)
        comparison.check()
    except BaseException:
        unconvert(model)
        raise
    return Report(model, list(sizes), skipped, comparison.unchecked)


def _chooser(where: Where) -> Callable[[str], bool]:
    if where is None:
        return lambda name: True
    if callable(where):
        return where
    patterns = (where,) if isinstance(where, str) else tuple(where)
    return lambda name: any(fnmatchcase(name, pattern) for pattern in patterns)


def _check(model: nn.Module, config: HeadGraphConfig) -> None:
    if not isinstance(config, HeadGraphConfig):
        raise TypeError(f"Expected a HeadGraphConfig or None (got {config!r}). Do pass HeadGraphConfig().")
    is_own = own_models.is_own(model)
    if is_own and (graphs := own_models.transformer_of(model).head_graph) is not None:
        raise ValueError(f"Expected a model without head graphs (got head_graph={graphs}). Do unconvert it first.")
    if is_own:
        return
    if sites := list(head_slots(model)):
        raise ValueError(f"Expected a model without head graphs (got some at {sites[:4]}). Do unconvert it first.")
    sites = [name for name in WHOLE_MODELS_ONLY if getattr(config, name) is not None]
    sites += ["alignment"] if config.alignment else []
    if sites:
        raise ValueError(
            f"Expected outputs, scores and routing alone for a {type(model).__name__} (got {', '.join(sites)}). Do "
            "leave them out: gohgraph's own models have them."
        )
