"""Prints the lower bounds in setup.cfg as exact versions, for pip's -c; it needs nothing but Python.

Examples:
    python tools/lowest.py > lowest.txt && python -m pip install -c lowest.txt -e '.[test]'
    python tools/lowest.py --table
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

SETTINGS = Path(__file__).parents[1] / "setup.cfg"
# A name, its extras, one lower bound, and where it applies.
REQUIREMENT = re.compile(r"([\w.-]+)(?:\[[\w,-]+\])?(?:>=([\w.]+))?(?:; *(.+))?")


def requirements(settings: Path) -> Iterator[tuple[str, str, str]]:
    """Yields (name, lower bound, marker) of every requirement in a setup.cfg, extras too.

    Args:
        settings: the file; an extra may name extras of its own package, which have no bound.

    Raises:
        ValueError: a requirement that is not a name with one lower bound.
    """
    config = ConfigParser()
    config.read_string(settings.read_text(encoding="utf-8"))
    own = config["metadata"]["name"]
    texts = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    for line in filter(None, "\n".join(texts).splitlines()):
        found = REQUIREMENT.fullmatch(line)
        if found is None or (found[2] is None) != (found[1] == own):
            raise ValueError(f"Expected one lower bound in {settings.name} (got {line!r}). Do write it as name>=1.2.")
        if found[1] != own:
            yield found[1], found[2], found[3] or ""


def lower_bounds(settings: Path) -> dict[str, tuple[str, str]]:
    """Returns (lower bound, marker) by name, in alphabetical order; a name with two of them raises `ValueError`."""
    bounds: dict[str, tuple[str, str]] = {}
    for name, low, marker in requirements(settings):
        if bounds.setdefault(name, (low, marker)) != (low, marker):
            raise ValueError(f"Expected one bound of {name} (got {bounds[name]}, {(low, marker)}). Do write it once.")
    return dict(sorted(bounds.items()))


def installed(name: str) -> str:
    """Returns the version of a package in this environment, "none" without one."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="a Markdown table of the bounds and of what is installed")
    flags = parser.parse_args(arguments)
    bounds = lower_bounds(SETTINGS)
    if flags.table:
        print("| package | lower bound | installed |\n| --- | --- | --- |")
        print("\n".join(f"| {name} | {low} | {installed(name)} |" for name, (low, _) in bounds.items()))
    else:
        print("\n".join(f"{name}=={low}" + (f"; {marker}" if marker else "") for name, (low, marker) in bounds.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
