"""A hook of mkdocs: blocks of ```math are MathML, which browsers draw by themselves, without a script."""

from __future__ import annotations

from typing import Any

from latex2mathml.converter import convert

# Letters of LaTeX that fit on a line of a page; beyond, what stands apart by \\qquad has a line of its own.
LONGEST = 110


def formula(source: str, *_: Any, **__: Any) -> str:
    """Returns the MathML of a formula in LaTeX; one that is aligned by & or broken by \\\\ needs no environment.

    Example:
        >>> formula("a^2").startswith("<math")
        True
    """
    if "&" in source or r"\\" in source:
        source = rf"\begin{{aligned}}{source}\end{{aligned}}"
    elif r"\qquad" in source and len(source) > LONGEST:
        rows = r" \\ ".join(part.strip() for part in source.split(r"\qquad"))
        source = rf"\begin{{array}}{{l}}{rows}\end{{array}}"
    return convert(source, display="block")


def on_config(config: Any) -> Any:
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "math", "format": formula})
    return config
