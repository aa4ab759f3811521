"""A hook of mkdocs: docs/errors.md lists every error message of the package, read from its source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

PACKAGE = Path(__file__).parents[2] / "gohgraph"
# Every message says what was expected first.
BEGINS = "Expected "


class Message(NamedTuple):
    """A message as the source has it, with ... for every value, and where in gohgraph it stands."""

    text: str
    place: str


def messages(path: Path) -> Iterator[Message]:
    """Yields the messages of a file of the package in the order of the source."""
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    yield from _messages(ast.parse(path.read_text(encoding="utf-8")), module)


def _messages(node: ast.AST, place: str) -> Iterator[Message]:
    if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        place = f"{place}.{node.name}"
    text = template(node)
    if text.startswith(BEGINS):
        yield Message(text, place)
        return
    for child in ast.iter_child_nodes(node):
        yield from _messages(child, place)


def template(node: ast.AST) -> str:
    """Returns the text of a string in the source with ... for every value, "" for what is no string.

    Example:
        >>> template(ast.parse('f"Expected heads >= 1 (got {heads!r})."').body[0].value)
        'Expected heads >= 1 (got ...).'
    """
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    if not all(isinstance(part, ast.FormattedValue) or isinstance(_value(part), str) for part in parts):
        return ""
    return "".join("..." if isinstance(part, ast.FormattedValue) else str(_value(part)) for part in parts)


def _value(node: ast.AST) -> Any:
    return node.value if isinstance(node, ast.Constant) else None


def tables() -> str:
    """Returns a section for every part of the package: its messages, each with where it comes from."""
    by_room: dict[str, dict[str, list[str]]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for text, place in messages(path):
            by_room.setdefault(room, {}).setdefault(text, []).append(place)
    return "\n".join(_section(room, found) for room, found in by_room.items())


def _section(room: str, found: dict[str, list[str]]) -> str:
    places = {text: ", ".join(map(_code, dict.fromkeys(names))) for text, names in sorted(found.items())}
    rows = [f"| {_code(text)} | {names} |" for text, names in places.items()]
    return "\n".join([f"## {room}", "", "| message | comes from |", "| --- | --- |", *rows, ""])


def _code(text: str) -> str:
    # Two marks, for messages that show code themselves.
    text = text.replace("\n", " ").replace("|", "\\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    return f"{markdown}\n\n{tables()}" if page.file.src_uri == "errors.md" else markdown
