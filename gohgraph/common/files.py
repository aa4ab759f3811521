"""Files written whole or not at all, JSON read with a clear error, and paths checked before the work."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

from safetensors import SafetensorError

# What pictures are saved as.
PICTURES = (".png", ".svg", ".pdf")


@overload
def checked_path(path: str | os.PathLike[str], suffixes: Sequence[str] = PICTURES) -> Path: ...


@overload
def checked_path(path: None, suffixes: Sequence[str] = PICTURES) -> None: ...


@overload
def checked_path(path: str | os.PathLike[str] | None, suffixes: Sequence[str] = PICTURES) -> Path | None: ...


def checked_path(path: str | os.PathLike[str] | None, suffixes: Sequence[str] = PICTURES) -> Path | None:
    """Returns where to save, once its suffix is known and its folder is there; `None` stays `None`."""
    if path is None:
        return None
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        known = f"{', '.join(suffixes[:-1])} or {suffixes[-1]}" if len(suffixes) > 1 else suffixes[0]
        raise ValueError(f"Expected a file name that ends in {known} (got {path}). Do change its suffix.")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"Expected a folder for {path.name} (got {path.parent}, which is not there). Do make it."
        )
    return path


def make_folder(path: Path) -> None:
    """Makes a folder and those above it; one that is there stays as it is.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"Expected a folder that can be written (got {path}: {error.strerror}). Do choose another."
        ) from error


def write_whole(path: Path, write: Callable[[Path], Any], *, flush: bool = False, pending: Path | None = None) -> None:
    """Lets `write` make a file beside its place, then moves it there: readers see the old file or the new one, whole.

    Whatever `write` raises leaves the older file as it was, and nothing beside it. Different files of one folder may
    be written at once; for the same file, each writer needs a `pending` of its own, and the last one stays.

    Args:
        path: the place of the file, in a folder that is there; `OSError` where it cannot be written.
        write: writes to the path it is given.
        flush: forces the file and its name to disk, so that a power cut leaves a whole file too.
        pending: where `write` writes, in the folder of `path`; `None` for `.NAME.new.SUFFIX`.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "heads.txt"
        >>> write_whole(path, lambda pending: pending.write_text("0 1 2"))
        >>> path.read_text(), [file.name for file in path.parent.iterdir()]
        ('0 1 2', ['heads.txt'])
    """
    # The suffix stays the last: writers choose the format by it.
    pending = pending or path.with_name(f".{path.stem}.new{path.suffix}")
    try:
        try:
            write(pending)
            move_whole(pending, path, flush=flush)
        finally:
            pending.unlink(missing_ok=True)
    # safetensors has an error of its own for a full disk.
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(
            f"Expected a place where {path.name} can be written (got {path}: {reason}). Do choose another path."
        ) from error


def write_text_whole(path: Path, text: str, *, flush: bool = False) -> None:
    """Writes a text as UTF-8, whole or not at all; see `write_whole`."""
    write_whole(path, lambda pending: pending.write_text(text, encoding="utf-8"), flush=flush)


def move_whole(source: Path, target: Path, *, flush: bool = False) -> None:
    """Moves a file, all of it written, over another one of the same folder in one step.

    With `flush` the file is forced to disk before and its name after: a power cut leaves one of the two files.
    """
    if flush:
        _flush(source)
    os.replace(source, target)
    if flush:
        _flush(target.parent)


def parse_json(text: str, origin: str | os.PathLike[str], remedy: str) -> Any:
    """Returns the value a JSON text stands for; where it is none, a `ValueError` tells its origin and the remedy.

    Example:
        >>> parse_json("[5", "log.json", "delete it")
        Traceback (most recent call last):
        ValueError: Expected JSON in log.json (got Expecting ',' delimiter: line 1 column 3 (char 2)). Do delete it.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"Expected JSON in {origin} (got {error}). Do {remedy}.") from error


def read_json(path: Path, remedy: str) -> Any:
    """Returns what a JSON file holds; see `parse_json`."""
    return parse_json(path.read_text(encoding="utf-8", errors="replace"), path, remedy)


def _flush(path: Path) -> None:
    """Forces a file, or a folder's list of names, to disk."""
    # Windows cannot open a folder; its renames are journalled.
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
