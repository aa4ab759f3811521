"""Save and load a model: `config.json` beside `model.safetensors`; a crash leaves a whole checkpoint.

The weights file carries the configuration in its safetensors metadata, so the two files can always be compared.
Replacing the weights is the one commit point of a save:

1. `.config.json.new` and `.model.safetensors.new` are written and flushed to disk,
2. `.model.safetensors.new` replaces `model.safetensors` (before: the old checkpoint, after: the new one),
3. `.config.json.new` replaces `config.json`.

A reader that comes between 2 and 3, or after a crash there, finds the configuration of the weights in
`.config.json.new`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_model
from torch import nn

from gohgraph.common.files import move_whole, parse_json, write_text_whole, write_whole

if TYPE_CHECKING:
    from typing_extensions import Self

FORMAT = 1
METADATA_KEY = "gohgraph.checkpoint"
MODEL_TYPE = "model_type"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
PENDING_CONFIG, PENDING_WEIGHTS = ".config.json.new", ".model.safetensors.new"


class PretrainedMixin:
    """Gives a model class `save_pretrained` and `from_pretrained`.

    The class names its configuration in `config_class` (with `to_dict` and `from_dict`), is built by `cls(config)` and
    keeps that configuration in `self.config`.
    """

    config_class: type[Any]
    # By which transformers' Auto classes know the folder; `None` where they are not to load it.
    model_type: str | None = None

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the model's configuration and weights to `folder`; see `save_pretrained`."""
        save_pretrained(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """Build the model that was saved in `folder`; see `load_pretrained`."""
        return load_pretrained(cls, folder)


def save_pretrained(model: Any, folder: str | os.PathLike[str]) -> None:
    """Write `config.json` and `model.safetensors` to `folder`, atomically.

    Whatever interrupts the save (an exception, a kill, a power cut), `folder` afterwards holds either the checkpoint
    it held before or the new one, whole. Tied tensors are stored once. One process writes to a folder at a time.

    Args:
        model: a module with `model.config.to_dict()`, which returns what JSON can hold.
        folder: where to write, made if it is missing; `OSError` where that is impossible.

    Raises:
        ValueError: a model that its configuration does not build, which could not be loaded again.
    """
    folder = Path(folder)
    text = json.dumps(_document(model), indent=2, allow_nan=False)
    _check_rebuilds(model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _finish_interrupted_save(folder)
    except OSError as error:
        raise OSError(
            f"Expected a folder that can be written (got {folder}: {error.strerror}). Do choose another folder."
        ) from error
    write_text_whole(folder / PENDING_CONFIG, text, flush=True)
    save = partial(save_model, model, metadata={METADATA_KEY: text})
    write_whole(folder / WEIGHTS, lambda path: save(str(path)), flush=True, pending=folder / PENDING_WEIGHTS)
    move_whole(folder / PENDING_CONFIG, folder / CONFIG, flush=True)


def load_pretrained(model_class: type[Any], folder: str | os.PathLike[str]) -> Any:
    """Build the model saved in `folder`, on the CPU, in training mode and in the dtypes it was saved with.

    Nothing is written, and the global random state is left as it was.

    Args:
        model_class: the class that was saved; built by `model_class(config_class.from_dict(...))`.
        folder: a folder written by `save_pretrained`.

    Raises:
        FileNotFoundError: `folder` or one of its two files is missing.
        ValueError: a file is damaged or foreign, the two files do not belong together, or another class was saved.
    """
    folder = Path(folder)
    tensors, saved_with, aliases = _read_weights(folder)
    document = _read_config(folder, saved_with)
    if document["model"] != model_class.__name__:
        raise ValueError(
            f"Expected a checkpoint of {model_class.__name__} in {folder} (got one of {document['model']}). "
            f"Do load it with {document['model']}.from_pretrained."
        )
    try:
        config = model_class.config_class.from_dict(document["config"])
        with torch.random.fork_rng(devices=[]):
            model = model_class(config)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Expected a configuration of {model_class.__name__} in {folder / CONFIG} (got one that is refused: "
            f"{error}). Do load it with gohgraph {document['gohgraph']}, which wrote it, or save the model again."
        ) from error
    for alias, name in aliases.items():
        if name in tensors:
            tensors[alias] = tensors[name]
    _fill(model, tensors, folder)
    return model


def _document(model: Any) -> dict[str, Any]:
    try:
        version = metadata.version("gohgraph")
    except metadata.PackageNotFoundError:
        version = "from source"
    document = {"model": type(model).__name__, "format": FORMAT, "gohgraph": version, "config": model.config.to_dict()}
    model_type = getattr(model, "model_type", None)
    return document if model_type is None else {MODEL_TYPE: model_type, **document}


def _check_rebuilds(model: nn.Module) -> None:
    """Raise `ValueError` where a model built of the configuration would have other tensors; it may have lost edges."""
    with torch.device("meta"):
        twin = type(model)(model.config)
    wanted, given = ({name: tensor.shape for name, tensor in m.state_dict().items()} for m in (twin, model))
    prunable = tuple(f"{name}." for name, module in model.named_modules() if hasattr(module, "prune_to_saved"))
    changed = [name for name in wanted.keys() & given.keys() if wanted[name] != given[name]]
    changed = sorted(wanted.keys() ^ given.keys()) + sorted(name for name in changed if not name.startswith(prunable))
    if changed:
        raise ValueError(
            f"Expected the tensors that the configuration of this {type(model).__name__} builds (got others: "
            f"{changed[:4]}). Do merge adapters first, or save the state dict yourself."
        )


def _finish_interrupted_save(folder: Path) -> None:
    """Do step 3 of a save that stopped after step 2, before a new save overwrites its configuration."""
    pending = folder / PENDING_CONFIG
    if not pending.is_file() or not (folder / WEIGHTS).is_file():
        return
    try:
        with _open_weights(folder / WEIGHTS) as file:
            saved_with = (file.metadata() or {}).get(METADATA_KEY)
    except ValueError:
        return
    if saved_with is not None and _same_json(pending, saved_with):
        move_whole(pending, folder / CONFIG, flush=True)


def _same_json(path: Path, text: str) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8")) == json.loads(text)
    except ValueError:
        return False


@contextmanager
def _open_weights(path: Path) -> Iterator[Any]:
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"Expected a whole safetensors file (got {path}, which is truncated or damaged: {error}). "
            "Do copy it again or load another checkpoint."
        ) from error


def _read_weights(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, str]]:
    """Return the tensors, the document they were saved with, and {alias: stored name} of tied tensors."""
    path = folder / WEIGHTS
    if not folder.is_dir():
        raise FileNotFoundError(
            f"Expected a checkpoint folder (got {folder}, which is not there). Do check the path, or train a model."
        )
    _check_present(path)
    with _open_weights(path) as file:
        aliases = dict(file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    text = aliases.pop(METADATA_KEY, None)
    if text is None:
        raise ValueError(
            f"Expected weights written by gohgraph (got {path}, which carries no gohgraph configuration). "
            "Do pass a folder written by save_pretrained; one that transformers wrote, its Auto classes load."
        )
    return tensors, _parse(text, f"the metadata of {path}"), aliases


def _check_present(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected {path.name} in {path.parent} (got a folder without it). Do pass one written by save_pretrained."
        )


def _read_config(folder: Path, saved_with: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration document after holding it against the one in the weights."""
    path, pending = folder / CONFIG, folder / PENDING_CONFIG
    # Pending first: a save that ends meanwhile moves it to config.json, which is read after it.
    if pending.is_file() and _same_json(pending, json.dumps(saved_with)):
        return saved_with
    _check_present(path)
    document = _parse(path.read_text(encoding="utf-8", errors="replace"), str(path))
    if document != saved_with:
        raise ValueError(
            f"Expected {CONFIG} and {WEIGHTS} of one checkpoint in {folder} (got weights saved with another "
            f"configuration: {_difference(document, saved_with)}). Do restore the file that was changed."
        )
    return document


def _parse(text: str, where: str) -> dict[str, Any]:
    document = parse_json(text, where, remedy="copy the file again or load another checkpoint")
    keys = {"model", "format", "gohgraph", "config"}
    given = set(document) - {MODEL_TYPE} if isinstance(document, dict) else set()
    if given != keys or not isinstance(document["config"], dict):
        got = sorted(document) if isinstance(document, dict) else type(document).__name__
        raise ValueError(
            f"Expected a gohgraph checkpoint with the keys {sorted(keys)} in {where} (got {got}). "
            "Do pass a folder written by save_pretrained."
        )
    if document["format"] != FORMAT:
        raise ValueError(
            f"Expected checkpoint format {FORMAT} in {where} (got {document['format']!r}). "
            f"Do load it with gohgraph {document['gohgraph']}, which wrote it."
        )
    return document


def _difference(document: dict[str, Any], saved_with: dict[str, Any]) -> str:
    """Name the first entry in which two documents differ, innermost key last."""
    for key in sorted(document.keys() | saved_with.keys()):
        here, there = document.get(key), saved_with.get(key)
        if here != there:
            if isinstance(here, dict) and isinstance(there, dict):
                return f"{key}.{_difference(here, there)}"
            return f"{key} is {here!r}, the weights have {there!r}"
    return "none"


def _fill(model: nn.Module, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Copy the tensors into the model, names and shapes checked, in the dtypes of the file."""
    # Inner modules first: a graph that was pruned, then the attention that runs on it.
    for name, module in reversed(list(model.named_modules())):
        if hasattr(module, "prune_to_saved"):
            module.prune_to_saved(tensors, f"{name}." if name else "")
    expected_tensors = model.state_dict(keep_vars=True)
    for name in sorted(expected_tensors.keys() | tensors.keys()):
        want, have = expected_tensors.get(name), tensors.get(name)
        if want is None or have is None or want.shape != have.shape:
            expected = "no such tensor" if want is None else f"shape {list(want.shape)}"
            got = "none" if have is None else f"shape {list(have.shape)}"
            raise ValueError(
                f"Expected {expected} for {name!r} in {folder / WEIGHTS} (got {got}). "
                "Do load it with the version of gohgraph that wrote it, or save the model again."
            )
        if want.dtype != have.dtype:
            want.data = want.data.to(have.dtype)
    model.load_state_dict(tensors)
