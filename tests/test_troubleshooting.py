"""The page of errors shows every message, and docs/troubleshooting.md explains none but those."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from website.errors import BEGINS, PACKAGE, messages, tables, template

EXPLAINED = PACKAGE.parent / "docs/troubleshooting.md"
# They are caught by whoever called, or are no fault.
INNER = {
    "analysis/network_files.py": "a row of ... is cut off",
    "convert/description.py": "format ..., written by gohgraph ...",
    "graphs/graph.py": "an edge must be a (sender, receiver) pair of ints, not ...",
    "__init__.py": "module ... has no attribute ...",
}
INNER_KINDS = {"KeyboardInterrupt", "TrainingInterrupted"}


def sources():
    return sorted(PACKAGE.rglob("*.py"))


def raised(path: Path):
    """The messages that stand at a `raise`, with the kinds of the errors."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            if text := template(node.exc.args[0]):
                yield ast.unparse(node.exc.func), text


def test_every_error_says_what_was_expected():
    others = {}
    for path in sources():
        for kind, text in raised(path):
            # What begins with a value has the rest from elsewhere: the helpers that check numbers.
            if kind not in INNER_KINDS and not text.startswith((BEGINS, "...")):
                others[path.relative_to(PACKAGE).as_posix()] = text
    assert others == INNER


def test_the_page_of_errors_shows_every_message_and_where_it_comes_from():
    page = tables()
    found = [message for path in sources() for message in messages(path)]
    assert len(found) > 400
    at_raises = {text for path in sources() for _, text in raised(path) if text.startswith(BEGINS)}
    assert at_raises <= {text for text, _ in found}
    for text, place in found:
        shown = text.replace("\n", " ").replace("|", "\\|")
        assert any(shown in line and f"`{place}`" in line for line in page.splitlines()), text


def test_the_explained_messages_exist():
    rows = re.findall(r"^\| (`.+?) \| ", EXPLAINED.read_text(), flags=re.MULTILINE)
    shown = [message for row in rows for message in re.findall(r"`([^`]+)`", row) if message.startswith("Expected")]
    known = "\n".join(text for path in sources() for text, _ in messages(path))
    unknown = []
    for message in shown:
        parts = [re.escape(part.strip()) for part in message.split("...") if part.strip()]
        if re.search("[^\n]*".join(parts), known) is None:
            unknown.append(message)
    assert len(shown) > 50 and not unknown
