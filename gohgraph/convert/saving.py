"""Converted models on disk: `save_converted` writes them, `load_converted` reads them whoever wrote them.

- `save_pretrained` of a converted transformers model, and so Trainer, `push_to_hub`, `save_converted`: files of
  transformers, whose `config.json` is of the type `gohgraph-converted` and describes the head graphs;
- `SentenceTransformer.save`, and `save_converted` of one: sentence-transformers' files, with such a `config.json`;
- `save_converted` of other modules: the head graphs as a checkpoint of gohgraph's own, and `backbone/`;
- `save_converted(backbone=False)`: the checkpoint of head graphs alone.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_model, save_model
from torch import nn

from gohgraph.common.checks import there
from gohgraph.common.files import read_json, write_whole
from gohgraph.common.hub import local_folder
from gohgraph.convert import own_models
from gohgraph.convert.blocks import SLOTS, converted, head_slots, slots_at
from gohgraph.convert.conversion import find_blocks
from gohgraph.convert.description import Described, describe, origins
from gohgraph.convert.head_graphs_only import ConversionConfig, HeadGraphsOnly, copy_weights
from gohgraph.convert.restoring import names_in, restore

HEAD_GRAPHS = "head_graphs"
BACKBONE, CONFIG, WEIGHTS, MODULES = "backbone", "config.json", "model.safetensors", "modules.json"


def save_converted(model: nn.Module, folder: str | os.PathLike[str], *, backbone: bool = True) -> None:
    """Writes a converted model to a folder, for `load_converted`.

    A model of transformers is written by its own `save_pretrained`: its Auto classes read the folder too, once gohgraph
    is imported.

    Args:
        model: that `convert` changed, or one that contains it; gohgraph's own have `save_pretrained`.
        folder: where to write, made if it is missing.
        backbone: writes the whole model; False its head graphs alone, which belong to the backbone they were trained
            on: `load_converted` then needs it as `model`, or finds it by the name it was loaded by.

    Raises:
        ValueError: a model without head graphs, or one of gohgraph's own; head graphs that could not be loaded again.

    Example:
        >>> import tempfile, gohgraph as goh
        >>> def encoder():
        ...     return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 1)
        >>> model = encoder()
        >>> _ = goh.convert(model)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_converted(model, folder)
        ...     loaded = load_converted(folder, encoder())
        >>> sorted(loaded.state_dict()) == sorted(model.state_dict())
        True
    """
    if own_models.is_own(model):
        raise ValueError(
            f"Expected a foreign model (got {type(model).__name__} of gohgraph). Do call its save_pretrained."
        )
    inner, _ = converted(model)
    if not backbone and _has_backbone(Path(folder)):
        raise ValueError(f"Expected a folder without a backbone (got {folder}, which has one). Do choose another.")
    if backbone and (_is_transformers(inner) or _is_sentence_transformer(model)):
        cast(Any, inner if _is_transformers(inner) else model).save_pretrained(os.fspath(folder))
        return
    base = getattr(getattr(inner, "config", None), "_name_or_path", "") or ""
    base_class = f"{type(inner).__module__}.{type(inner).__name__}"
    saved = HeadGraphsOnly(ConversionConfig(base, base_class, there(describe(inner))))
    saved.take_from(inner)
    if backbone:
        _save_backbone(inner, Path(folder) / BACKBONE)
    saved.save_pretrained(folder)


def load_converted(name: str | os.PathLike[str], model: nn.Module | None = None, **options: Any) -> nn.Module:
    """Loads a converted model in one call: the backbone, and the head graphs in it.

    Args:
        name: a folder, whoever wrote it: `save_converted`, a converted model's own `save_pretrained`, Trainer (one of
            its checkpoints), `SentenceTransformer.save`; or the name of such a model on the Hugging Face hub.
        model: the backbone, without head graphs; given them in place. `None` loads it too: from the folder where it is
            in it, else from the name or path it was loaded from before.
        **options: of transformers' `from_pretrained`, e.g. `dtype`, `attn_implementation`, `device_map`, `revision`.

    Returns:
        The model with its head graphs, in eval mode when it was loaded here.

    Raises:
        FileNotFoundError: the folder or a file is missing.
        ValueError: a damaged folder, one of a model without head graphs, a model whose attention is not the one that
            was saved, or none given and no transformers model to load.

    Example:
        >>> import tempfile
        >>> import gohgraph as goh
        >>> encoder = nn.TransformerEncoderLayer(8, 2)
        >>> _ = goh.convert(encoder)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     goh.save_converted(encoder, folder, backbone=False)
        ...     loaded = load_converted(folder, nn.TransformerEncoderLayer(8, 2))
        >>> type(loaded.self_attn).__name__
        'GraphMultiheadAttention'
    """
    folder = local_folder(name, options)
    values = read_json(folder / CONFIG, remedy="copy the folder again") if (folder / CONFIG).is_file() else {}
    if (folder / MODULES).is_file():
        return _of_whole(model, _load_sentences(folder, options))
    if isinstance(values.get("config"), dict) and "base_class" in values["config"] or not values:
        return _load_graphs(folder, model, options)
    return _of_whole(model, _load_whole(folder, values, options))


def is_converted(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder on this machine is one that `load_converted` reads, by its `config.json`."""
    try:
        values = read_json(Path(folder) / CONFIG, remedy="copy the folder again")
        return HEAD_GRAPHS in values or "base_class" in values["config"]
    # What is no such folder, or damaged, is for another loader to name.
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _load_graphs(folder: Path, model: nn.Module | None, options: dict[str, Any]) -> nn.Module:
    """Loads a checkpoint of head graphs, and the backbone beside it or from elsewhere."""
    saved = HeadGraphsOnly.from_pretrained(folder)
    backbone = folder / BACKBONE
    if model is None:
        model = _load_backbone(saved.config, backbone, options)
    elif (backbone / WEIGHTS).is_file() and not hasattr(model, "save_pretrained"):
        load_model(model, str(backbone / WEIGHTS))
    names = _give(model, saved.described)
    saved.put_into(model, names)
    return model


def _of_whole(model: nn.Module | None, whole: nn.Module) -> nn.Module:
    """Returns the model that was loaded; where there is one already, this with the head graphs of that."""
    if model is None:
        return whole
    described = {
        slots.origin.attention_of(place): Described(slots.origin, slots.head_order, {})
        for place, slots in origins(whole).items()
    }
    names = _give(model, described)
    for name, other in names.items():
        copy_weights(slots_at(whole, name), slots_at(model, other))
    return model


def _give(model: nn.Module, described: dict[str, Described]) -> dict[str, str]:
    """Puts new head graphs into a model, after a search; returns its names of the attention modules, by those given."""
    placed = names_in(model, described)
    ours = {id(block): name for name, block in described.items()}
    restore(model, placed, find_blocks(model).blocks)
    return {ours[id(block)]: name for name, block in placed.items()}


def _load_whole(folder: Path, values: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    try:
        from gohgraph.convert.converted_config import MODEL_TYPE
        from gohgraph.convert.converted_models import load
    except ImportError as error:
        raise ImportError(f"Expected transformers (got: {error}). Do pip install 'gohgraph[hf]'.") from error
    if values.get("model_type") != MODEL_TYPE:
        raise ValueError(
            f"Expected a converted model in {folder} (got a model of type {values.get('model_type')!r}). Do load it "
            "with the library that wrote it."
        )
    return load(folder, values, options)


def _load_sentences(folder: Path, options: dict[str, Any]) -> nn.Module:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), model_kwargs=options).eval()
    if not origins(model):
        raise ValueError(f"Expected a converted model in {folder} (got one without head graphs). Do load it as ever.")
    return model


def _load_backbone(config: ConversionConfig, backbone: Path, options: dict[str, Any]) -> nn.Module:
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


def _save_backbone(model: nn.Module, folder: Path) -> None:
    prefixes = [f"{name}.{slot}." if name else f"{slot}." for name in head_slots(model) for slot in SLOTS]
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(tuple(prefixes))}
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / WEIGHTS, lambda pending: save_model(_Holder(state), str(pending)), flush=True)


class _Holder(nn.Module):
    """A module of a given state dict, as safetensors' handling of tied tensors wants one."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.state = state

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.state


def _has_backbone(folder: Path) -> bool:
    file = folder / CONFIG
    return (folder / BACKBONE).exists() or file.is_file() and "backbone" in read_json(file, remedy="delete the file")


def _is_transformers(model: nn.Module) -> bool:
    library = sys.modules.get("transformers.modeling_utils")
    return library is not None and isinstance(model, library.PreTrainedModel)


def _is_sentence_transformer(model: nn.Module) -> bool:
    library = sys.modules.get("sentence_transformers")
    return library is not None and isinstance(model, library.SentenceTransformer)
