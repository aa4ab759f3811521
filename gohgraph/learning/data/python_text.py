"""Text that comes with every Python: its documentation, its sources, and those of packages gohgraph needs."""

from __future__ import annotations

import ast
import importlib.util
import os
import sysconfig
import warnings
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from gohgraph.common.checks import there

PACKAGES = ("torch", "torch_geometric", "networkx", "numpy")

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

# Not documentation of the library, or not present in every installation of the same Python version.
_SKIPPED_FOLDERS = frozenset(
    ["site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"]
)
# Tables of characters, of which one is much like another, and the topics, which are read as text.
_TABLES = frozenset(["encodings", "pydoc_data"])
# Larger files are tables too.
_LARGEST_BYTES = 300_000


def documentation() -> dict[str, str]:
    """Returns name and text of every topic of Python's help and of every source file's docstrings, in a fixed order."""
    root = _library()
    sources = _sources(root)
    documents = _topics(root, sources)
    # One set for all files: a docstring repeated elsewhere must not leak into what is held out.
    seen: set[str] = set()
    for path in sources:
        fresh = [text for text in dict.fromkeys(_docstrings(path)) if text not in seen]
        seen.update(fresh)
        if fresh:
            documents[path.relative_to(root).as_posix()] = "\n\n".join(fresh)
    return documents


def library() -> dict[str, str]:
    """Returns name and text of every topic of Python's help and of every source file of the standard library.

    Sources hold their docstrings. Left out are tests, packages that are installed, IDLE, 2to3, demos of turtles, the
    tables of encodings, and files above 300 kB, which are tables as well; of equal files the first is taken.
    """
    root = _library()
    sources = _sources(root)
    return _topics(root, sources) | _contents(root, sources, "")


def packages() -> dict[str, str]:
    """Returns what `library` does, and the source files of torch, torch_geometric, networkx and numpy alike."""
    documents = library()
    for name in PACKAGES:
        spec = there(importlib.util.find_spec(name))
        folder = Path(there(spec.submodule_search_locations)[0])
        documents |= _contents(folder, _sources(folder), f"{name}/")
    return documents


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _topics(root: Path, paths: list[Path]) -> dict[str, str]:
    topics: dict[str, str] = {}
    try:
        from pydoc_data.topics import topics as documented
    except ImportError:
        pass
    else:
        topics = documented
    if not topics or not paths:
        raise ValueError(
            "Expected a Python with its documentation and the sources of its standard library "
            f"(got {len(topics)} topics, and {len(paths)} source files in {root}). "
            "Do install them, or train on a text of your own with --data FILE."
        )
    return {f"topics/{topic}": text for topic, text in sorted(topics.items())}


def _sources(root: Path) -> list[Path]:
    paths = []
    for folder, folders, files in os.walk(root):
        # Packages that are installed are most of the tree: they are not entered.
        folders[:] = set(folders) - _SKIPPED_FOLDERS
        paths += [Path(folder, file) for file in files if file.endswith(".py")]
    return sorted(paths)


def _contents(root: Path, paths: list[Path], prefix: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in paths:
        name = path.relative_to(root)
        if not _TABLES & set(name.parts) and 0 < path.stat().st_size <= _LARGEST_BYTES:
            found.setdefault(path.read_text(encoding="utf-8", errors="replace"), prefix + name.as_posix())
    return {name: text for text, name in found.items()}


def _docstrings(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        # Some modules still hold invalid escapes, which is no concern of ours.
        warnings.simplefilter("ignore")
        tree = ast.parse(path.read_bytes(), filename=str(path))
    for node in _blocks(tree):
        if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
            yield text


def _blocks(tree: ast.AST) -> Iterator[ast.AST]:
    """Yields what `ast.walk` does, in its order, but expressions: most of a tree, and without docstrings."""
    queue = deque([tree])
    while queue:
        node = queue.popleft()
        yield node
        for field in ("body", "handlers", "orelse", "finalbody", "cases"):
            queue.extend(getattr(node, field, ()))
