"""Finding the wiring of a model: its stacks of layers, and in each layer what reads and writes when."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from gohgraph.analysis.architectures.attention_rows import attention_rows
from gohgraph.analysis.architectures.layouts import LAYOUTS, Layout, has, layout_of
from gohgraph.analysis.architectures.wiring import (
    AttentionUnit,
    FeedForwardUnit,
    Reading,
    Stream,
    StreamNorm,
    Wiring,
)

# What a stack calls the norm behind its last layer.
FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "layer_norm", "layernorm")
QK_NORMS = ("q_norm", "k_norm")
# Times within a layer: attention reads and writes, a norm; cross attention; the feed-forward.
ATTENTION, CROSS, FEED_FORWARD, LAYER = 0, 3, 6, 10


class _Stack(NamedTuple):
    name: str
    owner: nn.Module
    layers: str
    num_layers: int
    kind: str
    layout: Layout


def wiring_of(model: nn.Module) -> Wiring:
    """Returns where the heads of a model read and write; nothing is run, and a model on meta will do.

    Layers are known by their parts (`gohgraph.analysis.architectures.layouts.LAYOUTS`), not by the name of their class:
    Llama, Qwen 2 and 3, Mistral, Gemma 2 and 3, OLMo 2, Phi, GPT-2, GPT-NeoX, BERT, RoBERTa, ViT, DINOv2, T5, BART,
    Whisper and their kin, and our own models.

    Raises:
        ValueError: there is no stack of such layers, or a part of its attention is missing; it says which.

    Example:
        >>> import gohgraph as goh
        >>> model = goh.LanguageModel(goh.TransformerConfig(9, d_model=8, num_heads=2, num_layers=2, d_ff=8))
        >>> [(unit.title, unit.queries.heads) for unit in wiring_of(model).attentions]
        [('layer 0', 2), ('layer 1', 2)]
    """
    stacks = _stacks(model)
    if not stacks:
        raise ValueError(
            f"Expected layers of a known layout: {', '.join(LAYOUTS)} (got {_seen(model)}). Do open an issue with the "
            "names of a layer's modules."
        )
    names = _stream_names(stacks)
    streams = [_stream(stack, stream) for stack, stream in zip(stacks, names, strict=True)]
    wiring = Wiring(tuple(streams), (), (), ())
    for stack, stream in zip(stacks, streams, strict=True):
        wiring = _with_stack(wiring, model, stack, stream)
    return wiring


def _stacks(model: nn.Module) -> list[_Stack]:
    stacks = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        fitting = [layout for layer in module if (layout := layout_of(layer, owner))]
        if len(fitting) == len(module) and len({kind for kind, _ in fitting}) == 1:
            stacks.append(_Stack(name.rpartition(".")[0], owner, name, len(module), *fitting[0]))
    return stacks


def _stream_names(stacks: list[_Stack]) -> list[str]:
    if len(stacks) == 1 and not stacks[0].layout.cross:
        return [""]
    crossing = [bool(stack.layout.cross) for stack in stacks]
    if crossing == [False, True]:
        return ["encoder", "decoder"]
    raise ValueError(
        f"Expected one stack of layers, or an encoder and a decoder with cross attention (got "
        f"{', '.join(stack.layers for stack in stacks)}). Do pass one of the parts."
    )


def _stream(stack: _Stack, name: str) -> Stream:
    first, last = f"{stack.layers}.0", f"{stack.layers}.{stack.num_layers - 1}"
    norm = next((norm for norm in FINAL_NORMS if has(stack.owner, norm)), None)
    path = None if norm is None else f"{stack.name}.{norm}".removeprefix(".")
    return Stream(name, first, last, Reading(name, LAYER * stack.num_layers, path, ""))


def _with_stack(wiring: Wiring, model: nn.Module, stack: _Stack, stream: Stream) -> Wiring:
    attentions, feed_forwards, norms = list(wiring.attentions), list(wiring.feed_forwards), list(wiring.norms)
    layout = stack.layout
    for layer in range(stack.num_layers):
        place, start = f"{stack.layers}.{layer}", LAYER * layer
        title = f"{stream.name} layer {layer}".strip()
        parallel = layout.parallel
        parallel = getattr(model.get_submodule(place), parallel) if isinstance(parallel, str) else parallel
        end = start + FEED_FORWARD + 1
        unit = _attention(model, place, layout.attention, (layout.before, layout.after), stream, start, title)
        if parallel:
            unit = AttentionUnit(**{**vars(unit), "writes_at": end})
        attentions.append(unit)
        if layout.on_stream:
            norms.append(StreamNorm(stream.name, start + ATTENTION + 2, f"{place}.{layout.on_stream}"))
        if layout.cross:
            encoder = wiring.streams[0].end
            when, crossing = start + CROSS, f"{title} cross"
            norm_names = (layout.cross_before, "")
            cross = _attention(model, place, layout.cross, norm_names, stream, when, crossing, encoder)
            attentions.append(cross)
            if layout.cross_on_stream:
                norms.append(StreamNorm(stream.name, start + CROSS + 2, f"{place}.{layout.cross_on_stream}"))
        when = start if parallel else start + FEED_FORWARD
        norm = f"{place}.{layout.ff_before}" if layout.ff_before else None
        reads = Reading(stream.name, when, norm, f"{place}.{layout.entry}")
        post_norm = f"{place}.{layout.ff_after}" if layout.ff_after else None
        feed_forwards.append(FeedForwardUnit(reads.entry, title, reads, f"{place}.{layout.exit}", end, post_norm))
        if layout.ff_on_stream:
            norms.append(StreamNorm(stream.name, start + FEED_FORWARD + 2, f"{place}.{layout.ff_on_stream}"))
    return Wiring(wiring.streams, tuple(attentions), tuple(feed_forwards), tuple(norms))


def _attention(
    model: nn.Module, layer: str, path: str, norms: tuple[str, str], stream: Stream, start: int, title: str,
    encoder: Reading | None = None,
) -> AttentionUnit:  # fmt: skip
    name = f"{layer}.{path}"
    rows = attention_rows(name, model.get_submodule(name))
    if isinstance(rows, str):
        raise ValueError(
            f"Expected attention with {rows} in {name} (got {type(model.get_submodule(name)).__name__} without). "
            "Do open an issue with the names of its modules."
        )
    before, after = (f"{layer}.{norm}" if norm else None for norm in norms)
    reads = Reading(stream.name, start, before, rows.queries.module)
    source = reads._replace(entry=rows.keys.module) if encoder is None else encoder._replace(entry=rows.keys.module)
    inner = [f"{name}.{norm}" if has(model, f"{name}.{norm}") else None for norm in QK_NORMS]
    return AttentionUnit(name, title, *rows[:3], reads, source, rows.output, start + 1, after, *inner)


def _seen(model: nn.Module) -> str:
    """What a model's layers look like, for messages."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and list(module[0].children()):
            parts = ", ".join(child for child, _ in module[0].named_children())
            return f"{type(model).__name__}, whose {name}.0 has {parts}"
    return f"{type(model).__name__} without a list of layers"
