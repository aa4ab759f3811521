"""Real text of several kinds that every installation holds: the tasks of continual and multi-task learning."""

import sysconfig
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path

import torch

from gohgraph.common.checks import check_choice
from gohgraph.learning.data.corpus import Corpus, as_tensor, split_documents

# Characters of the pieces that are held out or trained on whole.
_BLOCK = 4000


def load_domain(name: str, *, limit: int = 500_000, validation_fraction: float = 0.1) -> Corpus:
    """Loads one kind of text as bytes, from what Python and the packages gohgraph needs bring along.

    - `"documentation"`: English prose about Python, the topics of `pydoc`.
    - `"python"`: sources of the standard library.
    - `"cpp"`: the C++ headers of torch.
    - `"names"`: the names of Unicode's characters.
    - `"licences"`: the licences of torch, numpy and matplotlib, every paragraph once.

    Pieces of at most 4,000 characters, cut between lines, are held out in the order of a hash of their names. The exact
    text depends on the versions installed, so losses compare only within one environment.

    Args:
        name: one of the above.
        limit: characters to read; the first files in order of their names.
        validation_fraction: share of the bytes held out, in (0, 1).

    Example:
        >>> corpus = load_domain("names", limit=20_000)
        >>> corpus.name, len(corpus.validation) > 1000
        ('names', True)
    """
    check_choice("domain", name, DOMAINS)
    blocks: dict[str, str] = {}
    read = 0
    for block in _blocks(DOMAINS[name]()):
        blocks[f"{name}/{len(blocks)}"] = block
        read += len(block)
        if read >= limit:
            break
    if len(blocks) < 2:
        raise ValueError(
            f"Expected two blocks of {name!r} in this installation (got {len(blocks)}). Do choose another domain."
        )
    train, validation = split_documents(blocks, validation_fraction)
    return Corpus(name, as_tensor(train), as_tensor(validation))


def _documentation() -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from (text for _, text in sorted(topics.items()))


def _names() -> Iterator[str]:
    yield "\n".join(name for number in range(0x20000) if (name := unicodedata.name(chr(number), "")))


def _licences() -> Iterator[str]:
    # One set for all files: a licence repeated elsewhere must not leak into validation.
    seen: set[str] = set()
    for package in ("torch", "numpy", "matplotlib"):
        files = [file for file in metadata.files(package) or () if "licen" in str(file).lower()]
        for text in _read(Path(str(file.locate())) for file in files if file.suffix in ("", ".txt", ".md")):
            fresh = [paragraph for paragraph in text.split("\n\n") if paragraph not in seen]
            seen.update(fresh)
            yield "\n\n".join(dict.fromkeys(fresh))


DOMAINS: dict[str, Callable[[], Iterator[str]]] = {
    "documentation": _documentation,
    "python": lambda: _read(Path(sysconfig.get_path("stdlib")).glob("*.py")),
    "cpp": lambda: _read((Path(torch.__file__).parent / "include" / "ATen").glob("*.h")),
    "names": _names,
    "licences": _licences,
}


def _read(paths: Iterable[Path]) -> Iterator[str]:
    yield from (path.read_text(encoding="utf-8", errors="replace") for path in sorted(paths))


def _blocks(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        block: list[str] = []
        size = 0
        for line in text.splitlines(keepends=True):
            if block and size + len(line) > _BLOCK:
                yield "".join(block)
                block, size = [], 0
            block.append(line)
            size += len(line)
        if size:
            yield "".join(block)
