"""Every message that docs/troubleshooting.md explains is one of gohgraph's."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def written(node):
    """The text of a string in the source, with a blank for every value."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in parts)


def messages():
    for path in (ROOT / "gohgraph").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Constant, ast.JoinedStr)):
                yield written(node)


def test_the_messages_exist():
    rows = re.findall(r"^\| (`.+?) \| ", (ROOT / "docs/troubleshooting.md").read_text(), flags=re.MULTILINE)
    shown = [message for row in rows for message in re.findall(r"`([^`]+)`", row) if message.startswith("Expected")]
    known = "\n".join(messages())
    unknown = []
    for message in shown:
        parts = [re.escape(part.strip()) for part in message.split("...") if part.strip()]
        if re.search("[^\n]*".join(parts), known) is None:
            unknown.append(message)
    assert len(shown) > 50 and not unknown
