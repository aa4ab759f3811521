"""Models of transformers that are born with head graphs: what its Auto classes build for a folder of a converted one.

The stock class builds the model, on the meta device as ever; head graphs are put in by their description; then the
stock class loads everything, sharded, in any dtype and onto any device map, as if head graphs were its own. The model
that comes out is of the stock class.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from functools import cache
from pathlib import Path
from typing import Any, cast

import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from gohgraph.attention.slots import HeadSlots
from gohgraph.convert.blocks import head_slots
from gohgraph.convert.converted_config import as_stock
from gohgraph.convert.description import read_description
from gohgraph.convert.restoring import names_in, restore
from gohgraph.graphs.edge_graph import EdgeGraph


def register(config_class: type, stock: type) -> None:
    """Gives every Auto class that knows a configuration a model for its subclass with head graphs."""
    for auto in _auto_classes():
        if stock in auto._model_mapping:
            known = auto._model_mapping[stock]
            models = tuple(map(model_class, known)) if isinstance(known, (list, tuple)) else model_class(known)
            auto._model_mapping.register(config_class, models, exist_ok=True)


def _auto_classes() -> Iterator[Any]:
    for auto in vars(modeling_auto).values():
        if isinstance(auto, type) and getattr(auto, "_model_mapping", None) is not None:
            yield auto


@cache
def model_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Returns the class of a backbone whose models are born with the head graphs of their configuration."""
    methods = {"__init__": _init, "from_pretrained": classmethod(_from_pretrained), "stock_class": stock}
    return type(stock.__name__, (stock,), {"__module__": stock.__module__, "__qualname__": stock.__name__, **methods})


def _init(self: PreTrainedModel, config: Any, *args: Any, **options: Any) -> None:
    # A copy: the same configuration may make another model.
    config = copy(config)
    stock, described = cast(Any, type(self)).stock_class, read_description(as_stock(config))
    stock.__init__(self, config, *args, **options)
    restore(self, names_in(self, described))
    self.__class__ = stock


def _from_pretrained(cls: Any, name: Any, *args: Any, **options: Any) -> Any:
    if options.get("offload_buffers"):
        raise ValueError("Expected offload_buffers=False with head graphs (got True). Do keep buffers in memory.")
    wants_info = options.pop("output_loading_info", False)
    loaded = super(cls, cls).from_pretrained(name, *args, output_loading_info=True, **options)
    model, info = loaded
    _check_complete(model, info, name)
    finish(model, name)
    return loaded if wants_info else model


def finish(model: nn.Module, name: Any) -> None:
    """Makes anew what follows from edges and is in no file; transformers leaves such buffers empty.

    Raises:
        ValueError: weights of other edges than the configuration's.
    """
    for place, slots in head_slots(model).items():
        slots.order_heads(slots.head_order)
        for path, conv in slots.named_modules():
            if isinstance(conv, EdgeGraph):
                _finish(conv, f"{place}.{path}", name)


def _finish(conv: EdgeGraph, place: str, name: Any) -> None:
    expected = conv._edge_list
    conv.edges_changed()
    if conv._edge_list != expected:
        raise ValueError(
            f"Expected the weights of {place} in {name} to be of the edges its config.json names (got others). Do "
            "restore the file that was changed."
        )


def _check_complete(model: nn.Module, info: dict[str, Any], name: Any) -> None:
    """Raises `ValueError` where weights of head graphs are missing, which transformers would make up."""
    prefixes = tuple(f"{place}." for place, module in model.named_modules() if isinstance(module, HeadSlots))
    if missing := sorted(key for key in info["missing_keys"] if key.startswith(prefixes)):
        raise ValueError(
            f"Expected the weights of all head graphs in {name} (got none of {missing[:4]}). Do copy the folder again."
        )


def load(folder: Path, values: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    """Loads the converted model of a folder, of the class that was saved.

    Args:
        folder: with weights of it.
        values: its `config.json`.
        options: of `from_pretrained`.
    """
    names = values.get("architectures") or [""]
    config = AutoConfig.from_pretrained(folder)
    kind = type(config)
    for auto in _auto_classes():
        known = auto._model_mapping.get(kind, ())
        if names[0] in {model.__name__ for model in (known if isinstance(known, tuple) else (known,))}:
            return auto.from_pretrained(folder, **options)
    stock = getattr(transformers, names[0], None)
    if stock is None:
        raise ValueError(
            f"Expected a class of transformers, or of one of its Auto classes (got {names[0]!r}). Do register it, or "
            "pass the backbone as `model`."
        )
    # Left to itself, the class would read the backbone's configuration out of the file.
    return model_class(stock).from_pretrained(folder, **{"config": config, **options})
