"""An extension of griffe: docstrings as mkdocstrings renders them.

Formulas of `.. math::` become blocks of ```math, drawings behind `::` blocks of text, the doctests under `Example:`
code, and arguments that share a line have one each.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

from griffe import Extension, Object

FORMULA = re.compile(r"^( *)\.\. math::(.*\n(?:\1 +\S.*\n|(?=\n\1 {4})\n)*)", flags=re.MULTILINE)
DRAWING = re.compile(r"^( *)::\n\n((?:\1 +\S.*\n|\n)+)", flags=re.MULTILINE)
# Several arguments on one line: griffe knows one name a line.
NAMES = re.compile(r"^    (\*{0,2}\w+(?:, \*{0,2}\w+)+): (.*(?:\n {8,}.*)*)", flags=re.MULTILINE)


def _fenced(language: str, found: re.Match[str]) -> str:
    lines = textwrap.dedent(found[2]).strip("\n") if language == "text" else " ".join(found[2].split())
    block = f"\n```{language}\n{lines}\n```\n"
    return textwrap.indent(block, found[1]) + ("\n" if language == "text" else "")


def as_markdown(docstring: str) -> str:
    r"""Returns a docstring of this package in Markdown.

    Example:
        >>> print(as_markdown("Squares.\n\nArgs:\n    x, y: numbers.\n\nExample:\n    It is 4."))
        Squares.
        <BLANKLINE>
        Args:
            x: numbers.
            y: numbers.
        <BLANKLINE>
        Examples:
            It is 4.
    """
    text = FORMULA.sub(lambda found: _fenced("math", found), docstring + "\n")
    text = DRAWING.sub(lambda found: _fenced("text", found), text)
    text = NAMES.sub(lambda found: "\n".join(f"    {name}: {found[2]}" for name in found[1].split(", ")), text)
    return re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE).rstrip()


class Docstrings(Extension):
    """Puts every docstring into Markdown, before it is parsed."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
