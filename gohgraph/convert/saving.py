"""Head graphs of converted models on disk: by themselves, or beside the model they belong to.

A folder holds `config.json` (what the graphs are, where they belong, which model and which versions) and
`model.safetensors`, written as every checkpoint of gohgraph is; with the backbone also `backbone/`, in the backbone's
own format. `from_pretrained` of transformers refuses the folder: nobody loads the backbone from it without its graphs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import nn

from gohgraph.attention.slots import HeadSlots
from gohgraph.common.checkpoint import PretrainedMixin
from gohgraph.common.config_base import Config
from gohgraph.common.files import write_whole
from gohgraph.convert import own_models
from gohgraph.convert.blocks import SLOTS, converted, head_slots, slots_at, slots_of
from gohgraph.convert.conversion import convert, unconvert
from gohgraph.graphs.config import HeadGraphConfig

BACKBONE, WEIGHTS = "backbone", "model.safetensors"
SIZES = ("num_heads", "head_dim", "d_model")
VERSIONED = ("torch", "transformers")


@dataclass(frozen=True)
class ConversionConfig(Config):
    """What the head graphs of a converted model are and where they belong.

    Args:
        base: name or path of the model that was converted, empty where it has none.
        base_class: its class, as `module.Name`.
        head_graph: as given to `convert`.
        blocks: by the name of each attention module: sizes H, D, M, the layer's index, the order of heads, and edges as
            (sender, receiver) pairs by slot, for the reader.
        versions: of the libraries that wrote it.
    """

    base: str
    base_class: str
    head_graph: HeadGraphConfig
    blocks: dict[str, dict[str, Any]]
    versions: dict[str, str]

    @classmethod
    def _nested(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "head_graph": HeadGraphConfig.from_dict(values["head_graph"])}


class HeadGraphsOnly(PretrainedMixin, nn.Module):
    """The head graphs of a converted model, without the model.

    Args:
        config: what they are.
    """

    config_class = ConversionConfig

    def __init__(self, config: ConversionConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(
            HeadSlots(
                block["num_heads"],
                head_order=block["head_order"],
                **slots_of(
                    config.head_graph.at_layer(layer, len(config.blocks)),
                    (block["num_heads"], block["head_dim"], block["d_model"]),
                    layer,
                ),
            )
            for layer, block in enumerate(config.blocks.values())
        )


def save_converted(model: nn.Module, folder: str | os.PathLike[str], *, backbone: bool = True) -> None:
    """Writes the head graphs of a converted model, and its backbone unless told not to.

    Args:
        model: converted by `convert`; one of gohgraph's own has `save_pretrained`.
        folder: where to; made if it is missing.
        backbone: writes the weights of the rest too, to `folder/backbone`. Without them the folder holds a few
            kilobytes, and loading takes the model from where it was loaded before.

    Raises:
        ValueError: a model that is not converted, or one of gohgraph's own; another model's backbone in the folder.
        OSError: the folder cannot be written.
    """
    if own_models.is_own(model):
        raise ValueError(
            f"Expected a foreign model (got {type(model).__name__} of gohgraph). Do call its save_pretrained."
        )
    if not backbone and (Path(folder) / BACKBONE).exists():
        raise ValueError(f"Expected a folder without a backbone (got {folder}, which has one). Do choose another.")
    inner, conversion = converted(model)
    blocks = {name: _described(inner, name, sizes) for name, sizes in conversion.sizes.items()}
    base = getattr(getattr(inner, "config", None), "_name_or_path", "") or ""
    base_class = f"{type(inner).__module__}.{type(inner).__name__}"
    saved = HeadGraphsOnly(ConversionConfig(base, base_class, conversion.config, blocks, _versions()))
    for name, slots in zip(blocks, saved.blocks, strict=True):
        sites = slots_at(inner, name)
        slots.to(_dtype(sites))
        slots.load_state_dict(_of_slots(sites.state_dict(), sites))
    if backbone:
        _save_backbone(inner, Path(folder) / BACKBONE)
    saved.save_pretrained(folder)


def load_converted(folder: str | os.PathLike[str], model: nn.Module | None = None, **options: Any) -> nn.Module:
    """Loads a converted model in one call: the backbone, and the head graphs into it.

    Args:
        folder: written by `save_converted`.
        model: the backbone, without head graphs; changed in place. `None` loads it with transformers: from the folder
            where it is in it, else from the name or path it was loaded from before.
        **options: of transformers' `from_pretrained`, e.g. `dtype` or `attn_implementation`.

    Returns:
        The model with its head graphs, in eval mode when it was loaded here.

    Raises:
        FileNotFoundError: the folder or a file is missing.
        ValueError: a damaged folder, a model whose attention is not the one that was saved, or none and no transformers
            model to load.
    """
    saved = HeadGraphsOnly.from_pretrained(folder)
    backbone = Path(folder) / BACKBONE
    if model is None:
        model = _load_transformers(saved.config, backbone, options)
    elif (backbone / WEIGHTS).is_file() and not hasattr(model, "save_pretrained"):
        load_model(model, str(backbone / WEIGHTS))
    names = list(saved.config.blocks)
    known = dict(model.named_modules())
    if lost := [name for name in names if name not in known]:
        raise ValueError(
            f"Expected a {saved.config.base_class} with the modules {lost} (got a {type(model).__name__} without). Do "
            "load the model the head graphs belong to."
        )
    convert(model, saved.config.head_graph, where=set(names).__contains__)
    sizes = {name: tuple(block[size] for size in SIZES) for name, block in saved.config.blocks.items()}
    if (found := converted(model)[1].sizes) != sizes:
        unconvert(model)
        raise ValueError(
            f"Expected attention of sizes (heads, head_dim, d_model) {sizes} (got {found}). Do load the model the head "
            "graphs belong to."
        )
    for name, slots in zip(names, saved.blocks, strict=True):
        sites = slots_at(model, name)
        sites.order_heads(slots.head_order)
        missing, unknown = sites.load_state_dict(slots.state_dict(), strict=False)
        missing = [key for key in missing if key.split(".")[0] in SLOTS]
        if missing or unknown:
            raise ValueError(
                f"Expected the weights of the head graphs of {name!r} (got {missing} missing and {unknown} unknown). "
                "Do save them again."
            )
    return model


def _described(model: nn.Module, name: str, sizes: tuple[int, int, int]) -> dict[str, Any]:
    sites = slots_at(model, name)
    edges = {
        slot: getattr(sites, slot).edge_index.t().tolist()
        for slot in SLOTS
        if hasattr(getattr(sites, slot), "edge_index")
    }
    return {**dict(zip(SIZES, sizes, strict=True)), "head_order": sites.head_order, "edges": edges}


def _of_slots(state: dict[str, torch.Tensor], sites: HeadSlots) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if name.split(".")[0] in SLOTS}


def _dtype(sites: HeadSlots) -> torch.dtype:
    return next((p.dtype for p in sites.parameters()), torch.get_default_dtype())


def _save_backbone(model: nn.Module, folder: Path) -> None:
    prefixes = [
        f"{name}.{slot}." if name else f"{slot}." for name in head_slots(model) for slot in SLOTS
    ]
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(tuple(prefixes))}
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder, state_dict=state)
        return
    write_whole(folder / WEIGHTS, lambda pending: save_model(_Holder(state), str(pending)), flush=True)


class _Holder(nn.Module):
    """A module of a given state dict, as safetensors' handling of tied tensors wants one."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.state = state

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        return self.state


def _load_transformers(config: ConversionConfig, backbone: Path, options: dict[str, Any]) -> nn.Module:
    module, _, name = config.base_class.rpartition(".")
    source = str(backbone) if backbone.is_dir() else config.base
    if not module.startswith("transformers.") or not source:
        raise ValueError(
            f"Expected the model the head graphs belong to (got model=None, and {config.base_class} is not loaded by "
            "name). Do pass it as `model`."
        )
    import transformers

    loader: Callable[..., nn.Module] = getattr(transformers, name).from_pretrained
    return loader(source, **options)


def _versions() -> dict[str, str]:
    versions = {}
    for name in VERSIONED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
