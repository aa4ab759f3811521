"""The `config.json` of converted transformers models: a model type of our own, with the backbone's configuration in it.

Whoever does not know the type refuses the folder; nobody loads the backbone without its head graphs by accident. To
transformers' Auto classes the file gives a configuration of the backbone's own class, or rather of a subclass made for
it, for which they have models that are born with head graphs (`converted_models`).
"""

from __future__ import annotations

import json
import os
import tempfile
from copy import copy
from functools import cache
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedConfig

from gohgraph.common.files import write_text_whole

MODEL_TYPE = "gohgraph-converted"
CONFIG = "config.json"
# In a configuration on its way to a model: the description of head graphs.
HEAD_GRAPHS = "head_graphs"
# A class of transformers that is asked by name to load the folder finds the backbone's configuration, whatever the
# model type is, and would load it without its head graphs; this is where it looks for the name of a file of weights.
FILE = "transformers_weights"
REFUSAL = "weights with head graphs, import gohgraph and load them with an Auto class or gohgraph.load_converted"


class ConvertedConfig(PreTrainedConfig):
    """What the Auto classes know as `gohgraph-converted`: reads the file and returns the backbone's configuration."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """Returns the backbone's configuration, with the description of head graphs in it.

        Raises:
            ValueError: a damaged file, or a backbone that this transformers does not know.
        """
        # Its module has `auto_classes` import this one, which may be the first to ask for transformers.
        from transformers import CONFIG_MAPPING

        try:
            stock, description = dict(config_dict["backbone"]), config_dict[HEAD_GRAPHS]
            model_type = stock["model_type"]
            stock.pop(FILE)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"Expected the configuration of a backbone and of its head graphs (got none: {error}). Do save the "
                "model again."
            ) from error
        if model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"Expected a backbone of a type that transformers knows (got {model_type!r}). Do register it with "
                "AutoConfig and an Auto class first, or load the backbone and pass it to gohgraph.load_converted."
            )
        kind = config_class(cast(type, CONFIG_MAPPING[model_type]))
        return kind.from_dict({**stock, HEAD_GRAPHS: description}, **options)


@cache
def config_class(stock: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """Returns the class of a backbone's configurations that come with head graphs, by which its models are told.

    It bears the name of its base: tokenizers and processors are found by it.
    """
    from gohgraph.convert.converted_models import register

    methods = {"__module__": stock.__module__, "stock_class": stock, "save_pretrained": _save}
    made = type(stock.__name__, (stock,), methods)
    register(made, stock)
    return made


def as_stock(config: PreTrainedConfig) -> Any:
    """Makes a configuration that came with head graphs the backbone's own, in place; returns their description."""
    config.__class__ = cast(Any, type(config)).stock_class
    return config.__dict__.pop(HEAD_GRAPHS)


def _save(self: Any, save_directory: str | os.PathLike[str], **options: Any) -> None:
    """Writes a configuration that came with head graphs as it was read."""
    stock = copy(self)
    description = as_stock(stock)
    os.makedirs(save_directory, exist_ok=True)
    WrittenWithGraphs(stock, description).save_pretrained(save_directory, **options)


class WrittenWithGraphs:
    """A model's configuration as its `save_pretrained` sees it: all its own, but for what is written to the file.

    Args:
        config: of the backbone; what is set here is set there.
        description: of the head graphs.
    """

    def __init__(self, config: PreTrainedConfig, description: dict[str, Any]) -> None:
        self.__dict__.update(_config=config, _description=description)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_config"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._config, name, value)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Writes `config.json`; the backbone's own goes to another folder and is read from there."""
        with tempfile.TemporaryDirectory() as folder:
            self._config.save_pretrained(folder)
            stock = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
        text = json.dumps(document(stock, self._description), indent=2, allow_nan=False)
        write_text_whole(Path(save_directory) / CONFIG, text + "\n")


def document(stock: dict[str, Any], description: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of `config.json`."""
    names: tuple[str, ...] = ("architectures", "dtype", "transformers_version")
    shown = {name: stock[name] for name in names if name in stock}
    backbone = {**stock, FILE: REFUSAL}
    return {"model_type": MODEL_TYPE, FILE: REFUSAL, **shown, "backbone": backbone, HEAD_GRAPHS: description}
