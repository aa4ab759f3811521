"""Head graphs put back into a model by their description, without looking for its attention again.

No forward pass is run, so that it works on models whose weights are not there yet, as while they are loaded.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import cast

import torch
from torch import nn

from gohgraph.attention.slots import Slots
from gohgraph.convert import fused_qkv, hugging_face, projections, torch_modules
from gohgraph.convert.attention_interface import CHILD, HeadGraphs
from gohgraph.convert.blocks import CONVERSION, Block, Conversion, move, slots_at
from gohgraph.convert.description import Described
from gohgraph.convert.dropin import GraphMultiheadAttention
from gohgraph.convert.origin import Origin, path_between

# By the kind of slots: the family that put them there.
FAMILIES = {
    HeadGraphs: "interface",
    projections.ProjectionGraphs: "projection",
    fused_qkv.GraphFusedAttention: "fused",
    GraphMultiheadAttention: "torch",
}


def note_origins(model: nn.Module, conversion: Conversion) -> None:
    """Tells the slots of a model that was just converted where they come from."""
    for layer, (name, sizes) in enumerate(conversion.sizes.items()):
        config = conversion.config.at_layer(layer, len(conversion.sizes))
        slots = slots_at(model, name)
        path = next(path for path, module in model.get_submodule(name).named_modules() if module is slots)
        family = next(family for kind, family in FAMILIES.items() if isinstance(slots, kind))
        output = conversion.projections.get(name)
        slots.origin = Origin(config, layer, sizes, family, path, output and path_between(name, output))


def restore(model: nn.Module, described: Mapping[str, Described], found: Mapping[str, Block] | None = None) -> None:
    """Puts the head graphs of a description into a model that has none, all or none.

    Args:
        model: changed in place.
        described: by the names attention has in this model; see `names_in`.
        found: blocks that a search found; `None` takes the description at its word.

    Raises:
        ValueError: attention of other sizes, or a description that is damaged.
    """
    if found is not None:
        _check_sizes(described, found)
    # All are built before any is attached: what cannot be built leaves the model as it was.
    built = {name: _build(model.get_submodule(name), block) for name, block in described.items()}
    attaching = {
        name: _attaching(model, name, block.origin) if found is None else found[name].attach
        for name, block in described.items()
    }
    for name, block in described.items():
        attaching[name](**built[name])
        slots = slots_at(model, name)
        slots.order_heads(block.head_order)
        slots.origin = block.origin
    sizes = {name: block.origin.sizes for name, block in described.items()}
    outputs = {name: block.origin.projection_of(name) for name, block in described.items()}
    known = {name: output for name, output in outputs.items() if output is not None}
    first = next(iter(described.values())).origin.config
    model.__dict__[CONVERSION] = Conversion(first, sizes, known)


def names_in(model: nn.Module, described: Mapping[str, Described]) -> dict[str, Described]:
    """Returns a description under the names attention has in a model, which may have a head more or less.

    As transformers' own loading does: a prefix that the saved model had, or this one has, is taken off or put before;
    what the class of this model leaves out of such a model's weights, it leaves out of its head graphs.

    Raises:
        ValueError: attention that is not there.
    """
    prefix = getattr(model, "base_model_prefix", "") + "."
    left_out = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    modules = dict(model.named_modules())
    placed: dict[str, Described] = {}
    lost = []
    for name, block in described.items():
        names = [each for each in (name, prefix + name, name.removeprefix(prefix)) if each in modules]
        if names:
            placed[names[0]] = block
        elif not any(pattern.search(name) for pattern in left_out):
            lost.append(name)
    if lost or not placed:
        raise ValueError(
            f"Expected a model with the modules {lost or list(described)} (got a {type(model).__name__} without). Do "
            "load the model the head graphs belong to."
        )
    return placed


def _check_sizes(described: Mapping[str, Described], blocks: Mapping[str, Block]) -> None:
    wanted = {name: block.origin.sizes for name, block in described.items()}
    there = {name: (b.num_heads, b.head_dim, b.d_model) for name, b in blocks.items() if name in wanted}
    if there != wanted:
        raise ValueError(
            f"Expected attention of sizes (heads, head_dim, d_model) {wanted} (got {there}). Do load the model the "
            "head graphs belong to."
        )


def _build(attention: nn.Module, block: Described) -> Slots:
    slots = block.build()
    like = next((p for p in attention.parameters() if p.is_floating_point()), None)
    if like is None:
        return slots
    # Weights that are not there yet have a dtype, and no device.
    device = torch.device("cpu") if like.is_meta else like.device
    return move(slots, device, like.dtype)


def _attaching(model: nn.Module, name: str, origin: Origin) -> Callable[..., None]:
    attention, num_heads = model.get_submodule(name), origin.sizes[0]
    projection = origin.path.removesuffix(CHILD).removesuffix(".")
    attach: dict[str, Callable[..., None]] = {
        "interface": partial(hugging_face.give, attention, num_heads),
        "projection": partial(projections.give, attention, projection, num_heads),
        "fused": partial(fused_qkv.GraphFusedAttention.adopt, attention),
        "torch": partial(torch_modules.give, model, cast(nn.MultiheadAttention, attention)),
    }
    if origin.family not in attach:
        raise ValueError(f"Expected a family of {sorted(attach)} (got {origin.family!r}). Do save the model again.")
    return attach[origin.family]
