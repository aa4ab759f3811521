"""Models by their name on the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from gohgraph.common.packages import needs

# What a model is made of; other formats of the same weights stay where they are.
FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


def local_folder(name: str | os.PathLike[str], options: dict[str, Any]) -> Path:
    """Returns a folder on this machine, after downloading it where `name` is one of the hub and no folder.

    Args:
        name: a folder, or `owner/model`.
        options: of `from_pretrained`; those about the hub are taken out.

    Raises:
        FileNotFoundError: neither a folder, nor on the hub, nor in its cache.
    """
    hub = {option: options.pop(option) for option in OPTIONS if option in options}
    folder = Path(name)
    if folder.is_dir():
        return folder
    if not isinstance(name, str) or len(name.split("/")) != 2 or name.startswith((".", "/")):
        raise FileNotFoundError(
            f"Expected a folder or a name on the hub, owner/model (got {name}, which is neither). Do check the path."
        )
    with needs("huggingface_hub", "hf"):
        from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES), **hub))
    # The hub's client has errors of many kinds: no connection, no such model, no access.
    except Exception as error:
        raise FileNotFoundError(
            f"Expected a folder or a model of the hub (got {name}: {' '.join(str(error).split())[:200]}). Do check the "
            "name and the connection."
        ) from error
