"""Byte-level text corpora and the batches drawn from them."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.request
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from gohgraph.common.checks import check_int, check_number
from gohgraph.common.files import write_whole
from gohgraph.learning.data import python_text

PYTHON_DOCS, PYTHON_PACKAGES = "python-docs", "python-packages"

# Fewer bytes than this in either part measure nothing.
_MINIMUM_BYTES = 100

# By name: what gathers the documents.
_GATHERED: dict[str, Callable[[], dict[str, str]]] = {
    PYTHON_DOCS: lambda: python_text.documentation(),
    "python": lambda: python_text.library(),
    PYTHON_PACKAGES: lambda: python_text.packages(),
}

# By name: where it is, and its SHA-256.
_DOWNLOADS = {
    "tiny-shakespeare": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    )
}


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text as bytes, split once into what is trained on and what is only measured.

    Args:
        name: of a built-in or downloaded text, or the path of the file.
        train, validation: uint8 `[N]`, at least 100 bytes each when made by `load_corpus`.
    """

    name: str
    train: Tensor
    validation: Tensor


def load_corpus(
    source: str | os.PathLike[str] = PYTHON_DOCS, *, cache: str | os.PathLike[str] | None = None,
    validation_fraction: float = 0.1,
) -> Corpus:  # fmt: skip
    """Load a built-in, downloaded or local text as bytes, with a fixed split.

    - `"python-docs"`: what ships inside every CPython, offline: the text of `pydoc_data.topics` and the docstrings of
      the standard library's sources, each docstring once. About 2.1 MB (English and code), read in about 3 s; the exact
      text depends on the Python version, so losses compare only within one. Whole documents (a topic, or the docstrings
      of one source file) are held out, in the order of a fixed hash of their names.
    - `"python"`: the same topics and the sources of the standard library whole, about 9 MB, split alike; `python_text`
      says what is left out.
    - `"python-packages"`: that and the sources of torch, torch_geometric, networkx and numpy, about 63 MB. The exact
      text depends on their versions too.
    - `"tiny-shakespeare"`: 1.1 MB, downloaded once, checked by SHA-256 and cached; its end is held out.
    - anything else is the path of a file of any bytes, whose end is held out.

    Args:
        source: a name from the list above, or a path (`./name` for a file that bears one of the names).
        cache: folder for downloads; by default `$GOHGRAPH_CACHE`, or `~/.cache/gohgraph`.
        validation_fraction: share of the bytes held out, in (0, 1).

    Raises:
        TypeError: `source` is not a string or path.
        ValueError: the file cannot be read or is too short, the download fails or has another checksum, the fraction is
            out of range, or this Python came without the documentation.

    Example:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "text.txt"
        >>> _ = file.write_bytes(b"0123456789" * 100)
        >>> corpus = load_corpus(file)
        >>> len(corpus.train), len(corpus.validation), corpus.train.dtype
        (900, 100, torch.uint8)
    """
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            f"Expected the name of a corpus or the path of a text file (got {type(source).__name__}). "
            f"Do pass {_names()}, or a path."
        )
    check_number("validation_fraction", validation_fraction, above=0, below=1)
    name = os.fspath(source)
    if name in _GATHERED:
        train, validation = split_documents(_GATHERED[name](), validation_fraction)
    else:
        text = _download(name, cache) if name in _DOWNLOADS else _read_file(name)
        cut = len(text) - int(len(text) * validation_fraction)
        train, validation = text[:cut], text[cut:]
    if min(len(train), len(validation)) < _MINIMUM_BYTES:
        raise ValueError(
            f"Expected at least {_MINIMUM_BYTES} bytes for training and for validation (got {len(train)} and "
            f"{len(validation)} from {name!r}). Do choose a longer text, or another validation_fraction."
        )
    return Corpus(name, as_tensor(train), as_tensor(validation))


def sample_batch(data: Tensor, step: int, *, batch_size: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw the random windows of one training step, and the bytes that follow.

    A pure function of `(seed, step)`, with a generator of its own: a resumed run, and every model compared with it,
    sees the same data in the same order whatever else drew random numbers.

    Args:
        data: bytes `[N]`, N > T.
        step: number of the training step.
        batch_size: windows, B, at least 1.
        length: bytes a window, T, at least 1.
        seed: names the order of the data.

    Returns:
        `(inputs, targets)`, int64 `[B, T]`, on the device of `data`; `targets[:, t]` follows `inputs[:, t]`.

    Example:
        >>> data = torch.arange(100, dtype=torch.uint8)
        >>> inputs, targets = sample_batch(data, step=3, batch_size=2, length=5, seed=0)
        >>> inputs.shape, torch.equal(targets, inputs + 1)
        (torch.Size([2, 5]), True)
    """
    _check_windows(data, batch_size, length)
    # Hashed, since a generator takes one number: a sum would give seed 2 the data of seed 1, a step later.
    digest = hashlib.blake2b(f"{seed}:{step}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    starts = torch.randint(len(data) - length, (batch_size,), generator=generator)
    return _windows(data, starts, length)


def evaluation_batches(
    data: Tensor, *, batch_size: int, length: int, limit: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut the text into fixed windows that do not overlap and are spread evenly over it.

    Args:
        data: bytes `[N]`, N > T.
        batch_size: windows a batch, B, at least 1; the last batch holds what is left.
        length: bytes a window, T, at least 1.
        limit: the most windows (not batches) in all; None: as many as fit.

    Returns:
        An iterator over `(inputs, targets)`, int64 `[B, T]`, on the device of `data`. No byte is a target twice.

    Example:
        >>> data = torch.arange(100, dtype=torch.uint8)
        >>> batches = evaluation_batches(data, batch_size=2, length=10, limit=3)
        >>> [inputs[:, 0].tolist() for inputs, targets in batches]
        [[0, 30], [60]]
    """
    _check_windows(data, batch_size, length)
    if limit is not None:
        check_int("limit", limit, low=1)
    available = (len(data) - 1) // length
    count = available if limit is None else min(limit, available)
    starts = torch.arange(count) * available // count * length
    return (_windows(data, part, length) for part in starts.split(batch_size))


def _check_windows(data: Tensor, batch_size: int, length: int) -> None:
    check_int("batch_size", batch_size, low=1)
    check_int("length", length, low=1)
    if data.dim() != 1 or len(data) <= length:
        raise ValueError(
            f"Expected a text [N] longer than a window of {length} bytes (got shape {list(data.shape)}). "
            "Do choose shorter windows or a longer text."
        )


def _windows(data: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    positions = starts[:, None] + torch.arange(length + 1)  # [B, T + 1]
    window = data[positions.to(data.device)].long()  # [B, T + 1]
    return window[:, :-1], window[:, 1:]


def _names() -> str:
    return " or ".join(repr(name) for name in (*_GATHERED, *_DOWNLOADS))


def as_tensor(text: bytes) -> Tensor:
    """Returns bytes as uint8 `[N]`, in memory of its own."""
    # A bytearray: torch warns about sharing memory that Python holds to be immutable.
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _read_file(name: str) -> bytes:
    try:
        return Path(name).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"Expected {_names()}, or a text file that can be read (got {name!r}: {reason}). Do check the path."
        ) from error


def split_documents(documents: dict[str, str], validation_fraction: float) -> tuple[bytes, bytes]:
    """Returns the text to train on and the text held out: whole documents, in the order of a hash of their names.

    Example:
        >>> split_documents({"a": "first", "b": "second"}, 0.3)
        (b'first', b'second')
    """
    encoded = {name: text.encode("utf-8", "backslashreplace") for name, text in documents.items()}
    wanted = validation_fraction * sum(map(len, encoded.values()))
    held_out: set[str] = set()
    for name in sorted(encoded, key=lambda name: (zlib.crc32(name.encode()), name)):
        if wanted <= 0:
            break
        held_out.add(name)
        wanted -= len(encoded[name])
    parts = [[text for name, text in encoded.items() if (name in held_out) is side] for side in (False, True)]
    return b"\n\n\n".join(parts[0]), b"\n\n\n".join(parts[1])


def _download(name: str, cache: str | os.PathLike[str] | None) -> bytes:
    """The checked bytes of a named corpus, from the cache or, once, from the network."""
    url, sha256 = _DOWNLOADS[name]
    folder = Path(cache or os.environ.get("GOHGRAPH_CACHE") or Path.home() / ".cache" / "gohgraph")
    path = folder / f"{name}.txt"
    if os.path.exists(path):
        return _checked(_read_file(str(path)), sha256, str(path), "delete that file and start again")
    try:
        text = _fetch(name, url)
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(
            f"Expected to download {name!r} from {url} (got {error}). "
            "Do check the network, or train on a text of your own with --data FILE."
        ) from error
    _checked(text, sha256, url, "try again, or train on a text of your own with --data FILE")
    # Several processes may download the same corpus at once.
    pending = path.with_name(f".{name}.{uuid.uuid4().hex}.new")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda pending: pending.write_bytes(text), pending=pending)
    except OSError as error:
        cause = getattr(error.__cause__ or error, "strerror", None)
        raise ValueError(
            f"Expected a folder to keep {name!r} in (got {folder}: {cause}). "
            "Do set GOHGRAPH_CACHE to a folder that can be written."
        ) from error
    return text


def _fetch(name: str, url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=30) as response:
        size = int(response.headers.get("Content-Length") or 0)
        pieces = []
        with tqdm(desc=name, total=size or None, unit="B", unit_scale=True) as progress:
            while piece := response.read(1 << 16):
                pieces.append(piece)
                progress.update(len(piece))
    return b"".join(pieces)


def _checked(text: bytes, sha256: str, origin: str, remedy: str) -> bytes:
    digest = hashlib.sha256(text).hexdigest()
    if digest != sha256:
        raise ValueError(f"Expected SHA-256 {sha256} of {origin} (got {digest}). Do {remedy}.")
    return text
