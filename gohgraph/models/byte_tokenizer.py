"""The tokenizer of models that read bytes, as transformers and `tokenizers` read one from files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from gohgraph.common.files import write_text_whole

FILES = ("tokenizer.json", "tokenizer_config.json")
# No text has it inside: it ends texts and fills batches.
END = "\0"


def save_byte_tokenizer(folder: str | os.PathLike[str]) -> None:
    r"""Writes a tokenizer whose ids are the bytes of a text in UTF-8: `tokenizer.json` and `tokenizer_config.json`.

    transformers' `AutoTokenizer.from_pretrained(folder)` reads it, without gohgraph too. The zero byte ends texts and
    pads batches.

    Args:
        folder: beside the model that reads bytes; made if it is missing.

    Example:
        >>> import tempfile
        >>> from transformers import AutoTokenizer
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_byte_tokenizer(folder)
        ...     tokenizer = AutoTokenizer.from_pretrained(folder)
        >>> tokenizer("hé")["input_ids"], tokenizer.decode([104, 195, 169])
        ([104, 195, 169], 'hé')
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in zip(FILES, (_tokenizer(), _about()), strict=True):
        write_text_whole(folder / name, json.dumps(values, ensure_ascii=True, allow_nan=False) + "\n")


def _tokenizer() -> dict[str, Any]:
    """The format of `tokenizers`: byte-pair encoding over bytes, without a single merge."""
    levels: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    end = {"id": 0, "content": END, "special": True}
    end |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    vocabulary = {character: byte for byte, character in enumerate(_characters())}
    model: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [end], "normalizer": None,
        "pre_tokenizer": levels, "post_processor": None, "decoder": levels,
        "model": {**model, "vocab": vocabulary, "merges": []},
    }  # fmt: skip


def _about() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END,
        "clean_up_tokenization_spaces": False, "model_input_names": ["input_ids", "attention_mask"],
    }  # fmt: skip


def _characters() -> list[str]:
    """What `ByteLevel` writes for each byte: the character of that number, or one from 256 on where that is no letter.

    The zero byte, a special token, is taken out of the text before.
    """
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    letters = [chr(byte) if byte in shown else chr(next(others)) for byte in range(256)]
    return [END, *letters[1:]]
