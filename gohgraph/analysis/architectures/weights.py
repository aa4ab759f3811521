"""Weights of a model's linear maps and norms, of a model in memory or read from its folder part by part."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from gohgraph.common.packages import needs


class Modules(Protocol):
    """Hands out modules of a model by name, with their weights."""

    def __call__(self, name: str) -> nn.Module: ...


def modules_of(model: nn.Module) -> Modules:
    """Returns the modules of a model in memory; `ValueError` for one whose weights are elsewhere."""

    def module(name: str) -> nn.Module:
        submodule = model.get_submodule(name)
        if any(parameter.is_meta for parameter in submodule.parameters()):
            raise ValueError(
                f"Expected a model with its weights (got {name} on meta). Do pass the folder of its safetensors."
            )
        return submodule

    return module


def linear_weight(module: nn.Module) -> Tensor:
    """Returns the weight `[out, M]` of a linear map, also of one that is adapted or quantised: by its answers.

    Example:
        >>> linear_weight(torch.nn.Linear(3, 5)).shape
        torch.Size([5, 3])
    """
    # The weight of a plain Linear may be a quantised tensor that says it is of floats.
    if type(module) is nn.Linear and type(module.weight.data) is Tensor:
        return module.weight.detach()
    if type(module).__name__ == "Conv1D":
        return cast(Tensor, module.weight).detach().t()
    width = next(getattr(module, name) for name in ("in_features", "nx") if hasattr(module, name))
    kept = [*module.parameters(), *module.buffers()]
    plain = [tensor for tensor in kept if type(tensor.data) is Tensor and tensor.is_floating_point()]
    weight = plain[0] if plain else torch.empty(0, device=kept[0].device if kept else "cpu")
    with torch.no_grad():
        eye = torch.eye(width, dtype=weight.dtype, device=weight.device)
        return (module.forward(eye) - module.forward(torch.zeros_like(eye[:1]))).t()  # [out, M]


class Folder:
    """A folder of transformers with safetensors: the model on meta, and its modules with their weights one at a time.

    Args:
        path: with `config.json` and `*.safetensors`.

    Attributes:
        model: on meta.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not (self.path / "config.json").is_file():
            raise FileNotFoundError(f"Expected a folder with config.json (got {path}). Do pass a saved model.")
        with needs("transformers for its folders", "hf"):
            import transformers
        config = transformers.AutoConfig.from_pretrained(self.path)
        named = (config.architectures or ["AutoModel"])[0]
        kind: Any = getattr(transformers, named, transformers.AutoModel)
        with torch.device("meta"):
            self.model = kind._from_config(config) if hasattr(kind, "_from_config") else kind.from_config(config)
        # The key and the file of every weight, by its name in the model.
        self._places = {_renamed(key, self.model): (key, file) for key, file in _index(self.path).items()}

    def __call__(self, name: str) -> nn.Module:
        """Returns a copy of a module with its weights; nothing keeps it."""
        module = copy.deepcopy(self.model.get_submodule(name)).to_empty(device="cpu")
        for parameter_name, parameter in module.named_parameters():
            parameter.data = self._read(f"{name}.{parameter_name}", parameter.shape)
        return module

    def _read(self, name: str, shape: torch.Size) -> Tensor:
        from safetensors import safe_open

        prefix = f"{self.model.base_model_prefix}."
        names = (name, name.removeprefix(prefix), prefix + name)
        place_in_file = next((self._places[known] for known in names if known in self._places), None)
        if place_in_file is None:
            raise ValueError(f"Expected the weight {name} in {self.path} (got none). Do load the model and pass it.")
        key, place = place_in_file
        with safe_open(self.path / place, framework="pt") as file:
            tensor = file.get_tensor(key)
        if tensor.shape != shape:
            raise ValueError(
                f"Expected {name} of shape {list(shape)} in {self.path} (got {list(tensor.shape)}). Do load the model "
                "and pass it."
            )
        return tensor if tensor.dtype == torch.float64 else tensor.float()


def _renamed(key: str, model: Any) -> str:
    """What a weight of an older file is called in the model today, by transformers' own table."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:
        # It has no such table: files are as models are.
        return key
    known = [rule for rule in get_model_conversion_mapping(model) or () if isinstance(rule, WeightRenaming)]
    return rename_source_key(key, known, [])[0]


def _index(path: Path) -> dict[str, str]:
    """The file of every weight."""
    from safetensors import safe_open

    listed = path / "model.safetensors.index.json"
    if listed.is_file():
        return json.loads(listed.read_text(encoding="utf-8"))["weight_map"]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"Expected *.safetensors in {path} (got none). Do save with safe_serialization=True.")
    file_of: dict[str, str] = {}
    for file in files:
        with safe_open(file, framework="pt") as weights:
            file_of |= dict.fromkeys(weights.keys(), file.name)
    return file_of
