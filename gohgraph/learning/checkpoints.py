"""The models in a run folder: those saved at the end, and those of its training steps."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_model

from gohgraph.learning.run_folder import CHECKPOINTS, STATE
from gohgraph.models.models import Classifier, LanguageModel, Transformer

WEIGHTS = "model.safetensors"
OwnModel = LanguageModel | Classifier | Transformer
CLASSES: dict[str, type[OwnModel]] = {kind.__name__: kind for kind in (LanguageModel, Classifier, Transformer)}


def load_own_model(folder: str | os.PathLike[str]) -> OwnModel:
    """Returns the model of a folder as `load_language_model` does, whichever of gohgraph's own it is."""
    folder = find_model(folder)
    if (folder / STATE).is_file():
        return _load_step(folder).eval()
    return CLASSES.get(_saved_class(folder), LanguageModel).from_pretrained(folder).eval()


def load_language_model(folder: str | os.PathLike[str]) -> LanguageModel:
    """Returns the language model in a folder, in eval mode; see `LanguageModel.from_pretrained`.

    Args:
        folder: written by `save_pretrained`, a training step's (`checkpoints/step-000100`), or a run folder, of which
            the model saved last is taken, one with head graphs before one without.
    """
    folder = find_model(folder)
    model = _load_step(folder) if (folder / STATE).is_file() else LanguageModel.from_pretrained(folder)
    if not isinstance(model, LanguageModel):
        raise ValueError(
            f"Expected a checkpoint of a language model in {folder} (got a {type(model).__name__}). Do choose another."
        )
    return model.eval()


def find_model(folder: str | os.PathLike[str]) -> Path:
    """Returns the folder of the model that `load_language_model` would load; the folder itself where there is none."""
    folder = Path(folder)
    if (folder / WEIGHTS).is_file():
        return folder
    files = [path for depth in ("*", "*/*", "*/*/*") for path in folder.glob(f"{depth}/{WEIGHTS}")]
    # A comparison's folder holds plain models too: nothing is to be drawn of those.
    return max(files, key=lambda path: (_has_graph(path.parent), path.stat().st_mtime)).parent if files else folder


def training_steps(folder: str | os.PathLike[str]) -> dict[int, Path]:
    """Returns the checkpoints of a run by step, the first first; the folder must hold those of one run."""
    paths = {path for depth in ("", "*/") for path in Path(folder).glob(f"{depth}{CHECKPOINTS}/step-*/{STATE}")}
    if len({path.parent.parent for path in paths}) != 1:
        runs = sorted(str(path) for path in {path.parents[2] for path in paths})
        raise ValueError(
            f"Expected the folder of one run with checkpoints (got {runs or 'none'} in {folder}). Do name a run's own."
        )
    steps = {int(path.parent.name.split("-")[1]): path.parent for path in paths}
    return dict(sorted(steps.items()))


def _load_step(folder: Path) -> OwnModel:
    try:
        settings = json.loads((folder / STATE).read_text(encoding="utf-8"))["settings"]
        kind = _class_of(settings)
        # Every class has the configurations of its own.
        build: Any = kind
        model: OwnModel = build(kind.config_class.from_dict(settings["model"]))
        load_model(model, folder / WEIGHTS)
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"Expected a checkpoint of a model of gohgraph in {folder} (got one that does not load: "
            f"{' '.join(str(error).split())[:200]}). Do choose another step."
        ) from error
    return model


def _class_of(settings: dict) -> type[OwnModel]:
    """The class of a run's model, by its settings: its configuration, and the languages of its data."""
    if "transformer" in settings["model"]:
        return Classifier
    return Transformer if "source" in (settings.get("data") or {}) else LanguageModel


def _saved_class(folder: Path) -> str:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))["model"]
    # A missing or damaged file is the loader's to name.
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _has_graph(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]
        return bool(config.get("transformer", config)["head_graph"])
    # Checkpoints of the training state have no such file, and a damaged one is the loader's to name.
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
