"""Files written whole, and paths checked before the work."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

# What pictures are saved as.
PICTURES = (".png", ".svg", ".pdf")


def checked_path(path: str | os.PathLike[str] | None, suffixes: Sequence[str] = PICTURES) -> Path | None:
    """Returns where to save, once its suffix is known and its folder is there; `None` stays `None`.

    Raises:
        ValueError: the suffix is none of `suffixes`.
        FileNotFoundError: the folder is missing.
    """
    if path is None:
        return None
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        known = f"{', '.join(suffixes[:-1])} or {suffixes[-1]}" if len(suffixes) > 1 else suffixes[0]
        raise ValueError(f"Expected a file name that ends in {known} (got {path}). Do change its suffix.")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"Expected a folder for the picture (got {path.parent}, which is not there). Do make it."
        )
    return path


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` make a file beside its place and move it there whole.

    Raises:
        OSError: the file cannot be written; an older one is kept.
    """
    # The suffix stays the last: writers choose the format by it.
    pending = path.with_name(f".{path.stem}.new{path.suffix}")
    try:
        write(pending)
        os.replace(pending, path)
    except OSError as error:
        raise OSError(
            f"Expected a place where the picture can be written (got {path}: {error.strerror}). Do choose another path."
        ) from error
    finally:
        pending.unlink(missing_ok=True)
