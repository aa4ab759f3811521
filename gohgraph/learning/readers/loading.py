"""Loads models as they read text: own runs, converted models, and those of transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from gohgraph.common.files import read_json
from gohgraph.common.packages import needs
from gohgraph.convert import load_converted
from gohgraph.convert.saving import BACKBONE, is_converted
from gohgraph.learning.checkpoints import find_model, load_own_model
from gohgraph.learning.data.classification import load_digits, load_text_classes
from gohgraph.learning.data.parallel_text import BOS, EOS, Subwords, load_parallel_text
from gohgraph.learning.readers.embedding import Embedding
from gohgraph.learning.readers.labelled import Classes, Images, Translation
from gohgraph.learning.readers.reader import Causal, Masked, Reader
from gohgraph.learning.readers.tokens import BYTES, load_tokenizer, of_subwords
from gohgraph.models.models import Classifier, LanguageModel, Transformer

# What types of models of our own begin with.
OWN, CONFIG = "gohgraph", "config.json"
# What the names of transformers' classes end in, for models that predict something of a text.
KINDS: dict[str, type[Reader]] = {
    "MaskedLM": Masked,
    "CausalLM": Causal,
    "LMHeadModel": Causal,
    "SequenceClassification": Classes,
    "ForConditionalGeneration": Translation,
    "Seq2SeqLM": Translation,
    "MTModel": Translation,
    # Of all that end so, the last.
    "Model": Embedding,
}


def is_stock(folder: str | os.PathLike[str]) -> bool:
    """Returns whether a folder holds a model of transformers that was not converted."""
    path = Path(folder)
    if not (path / CONFIG).is_file() or is_converted(path):
        return False
    try:
        kind = json.loads((path / CONFIG).read_text(encoding="utf-8")).get("model_type", OWN)
    # What is damaged is for the loader to name.
    except (ValueError, AttributeError):
        return False
    return not str(kind).startswith(OWN)


def kind_of(name: str) -> type[Reader] | None:
    """Returns how a class of transformers reads text, by its name; `None` where it is given none.

    Example:
        >>> kind_of("LlamaForCausalLM").what, kind_of("BertModel").what, kind_of("ViTForImageClassification")
        ('a causal language model', 'an encoder without a task', None)
    """
    return next((kind for end, kind in KINDS.items() if name.endswith(end)), None)


def stock_class(folder: str | os.PathLike[str]) -> str:
    """Returns the name of the class that wrote a folder of transformers, "" where it is not said."""
    values = read_json(Path(folder) / CONFIG, remedy="copy the folder again")
    return next(iter(values.get("architectures") or [""]))


def kind_in(folder: str | os.PathLike[str]) -> type[Reader] | None:
    """Returns how the model in a folder of transformers reads text, `None` where it is given none, or more than one."""
    kind = kind_of(name := stock_class(folder))
    if kind is not Embedding:
        return kind
    with needs("transformers", "hf"):
        import transformers
    values = read_json(Path(folder) / CONFIG, remedy="copy the folder again")
    is_of_one_text = getattr(getattr(transformers, name, None), "main_input_name", None) == "input_ids"
    return kind if is_of_one_text and not {"is_encoder_decoder", "vision_config"} & _true(values) else None


def load_stock(folder: str | os.PathLike[str]) -> nn.Module:
    """Returns the model of a folder of transformers, of the class that wrote it, in eval mode."""
    with needs("transformers", "hf"):
        import transformers
    kind = getattr(transformers, stock_class(folder) or "AutoModel", transformers.AutoModel)
    return kind.from_pretrained(folder).eval()


def load_reader(folder: str | os.PathLike[str], tokenizer: str | os.PathLike[str] | None = None) -> Reader:
    """Loads a model and how it reads text.

    Args:
        folder: of a run of our own or a model in it, of a converted model, or of one of transformers.
        tokenizer: a folder or hub name; `None` for the model's own: in the folder, in its `backbone/`, then where the
            backbone came from.

    Raises:
        ValueError: a model that is given no text, no tokenizer, or another model's; a damaged file.
        FileNotFoundError: no such folder or file.
    """
    folder = Path(folder)
    if is_converted(folder):
        return _of_transformers(load_converted(folder).eval(), folder, tokenizer)
    if is_stock(folder):
        check_readable(kind_in(folder), stock_class(folder))
        return _of_transformers(load_stock(folder), folder, tokenizer)
    model, place = load_own_model(folder), find_model(folder)
    return OWN_MODELS[type(model)](model, place)


def check_readable(kind: type[Reader] | None, name: str) -> type[Reader]:
    """Returns `kind_of` a class; `ValueError` where it is given no text."""
    if kind is None:
        raise ValueError(
            f"Expected a model that is given one text (got {name or 'one without a name'}). Do use --from weights."
        )
    return kind


def of_bytes(model: LanguageModel) -> Causal:
    """Returns one of gohgraph's own language models, which reads bytes, of a vocabulary that holds them.

    Example:
        >>> import torch
        >>> from gohgraph.models.config import TransformerConfig
        >>> reader = of_bytes(LanguageModel(TransformerConfig(256, d_model=8, num_heads=2, num_layers=1, d_ff=8)))
        >>> reader.tokens.strings(reader.tokens.words(b"hi"))
        ['h', 'i']
    """
    config = model.config
    if config.vocab_size < 256:
        raise ValueError(
            f"Expected a byte-level model (got a vocabulary of {config.vocab_size}). Do pass one of at least 256."
        )
    return Causal(model, BYTES, config.max_length if config.positions == "learned" else None)


def _of_transformers(model: Any, folder: Path, tokenizer: str | os.PathLike[str] | None) -> Reader:
    config, name = model.config, type(model).__name__
    kind = check_readable(kind_of(name), name)
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise ValueError(f"Expected a model of text (got {name}, of {model.main_input_name}). Do use --from weights.")
    places: list[str | os.PathLike[str]]
    # What is no folder would be looked for on the hub.
    folders = [folder, *(part for part in [folder / BACKBONE] if part.is_dir())]
    places = [*folders, getattr(config, "_name_or_path", "")] if tokenizer is None else [tokenizer]
    tokens = load_tokenizer(places, getattr(config, "vocab_size", 1 << 62))
    longest = getattr(config, "max_position_embeddings", None)
    if kind is Masked and tokens.mask is None:
        raise ValueError(f"Expected a tokenizer with a mask for {name} (got none). Do pass its own by --tokenizer.")
    if kind is Classes:
        names = [config.id2label[number] for number in range(config.num_labels)]
        return Classes(model, tokens, longest, names)
    if kind is Translation:
        end = config.eos_token_id
        return Translation(model, tokens, longest, config.decoder_start_token_id, end[0] if _is_list(end) else end)
    return kind(model, tokens, longest)


def _true(values: dict[str, Any]) -> set[str]:
    return {name for name, value in values.items() if value}


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _classifier(model: Classifier, folder: Path) -> Reader:
    """A classifier with the data of its run, by the flags it was trained with; without those, classes are numbers."""
    config, flags = model.config, _flags(folder)
    names = list(map(str, range(config.num_classes)))
    if config.patch_size is not None:
        data = load_digits()
        if data.validation[0].shape[1] != config.channels or len(data.classes) != config.num_classes:
            raise ValueError(
                f"Expected a classifier of digits, whose images are at hand (got one of {config.num_classes} classes). "
                "Do use goh.record(model) on images of your own."
            )
        return Images(model, data.classes, data.validation)
    if config.transformer.vocab_size < 256:
        raise ValueError(
            f"Expected a byte-level model (got a vocabulary of {config.transformer.vocab_size}). Do pass one of at "
            "least 256."
        )
    texts = None
    if flags.get("task") == "text":
        texts = load_text_classes(flags.get("data"), length=flags["length"], per_class=400)
        names = list(texts.classes)
    longest = config.transformer.max_length if config.transformer.positions == "learned" else None
    return Classes(model, BYTES, longest, names, None if texts is None else texts.validation)


def _translation(model: Transformer, folder: Path) -> Reader:
    files = [place / "tokenizer.json" for place in (folder, folder.parent)]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ValueError(
            f"Expected the run's tokenizer.json beside {folder} (got none). Do name the folder of the run, finished."
        )
    with needs("the package tokenizers for subwords", "translation"):
        from tokenizers import Tokenizer
    subwords, flags, pairs = Subwords(Tokenizer.from_file(str(file))), _flags(folder), None
    if "data" in flags:
        text = load_parallel_text(flags["data"], source=flags["source"], target=flags["target"])
        pairs = text.validation
    longest = model.config.max_length if model.config.positions == "learned" else None
    return Translation(model, of_subwords(subwords.tokenizer), longest, BOS, EOS, pairs)


def _flags(folder: Path) -> dict[str, Any]:
    """The flags a model was trained with, from its run's folder; empty where there are none."""
    for place in (folder.parent, folder.parent.parent):
        if (place / CONFIG).is_file():
            found = read_json(place / CONFIG, remedy="restore the file").get("flags")
            return found if isinstance(found, dict) else {}
    return {}


OWN_MODELS: dict[type[nn.Module], Callable[[Any, Path], Reader]] = {
    LanguageModel: lambda model, folder: of_bytes(model),
    Classifier: _classifier,
    Transformer: _translation,
}
