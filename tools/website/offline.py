"""A hook of mkdocs: a built page loads nothing from another host, so that the site is read from disk."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

# What a browser fetches by itself; links that a reader follows lead where they like.
FETCHED = re.compile(r"<(?:script|img|iframe|link)\b[^>]*\s(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)")
STYLED = re.compile(r"(?:url\(|@import )[\"']?((?:https?:)?//[^\"')\s]+)")


def fetched_from_hosts(site: Path) -> dict[str, list[str]]:
    """Returns what pages and styles of a built site load from other hosts, by file."""
    patterns = {".html": FETCHED, ".css": STYLED}
    files = sorted(path for path in site.rglob("*") if path.suffix in patterns)
    found = {file: patterns[file.suffix].findall(file.read_text(encoding="utf-8")) for file in files}
    return {file.relative_to(site).as_posix(): addresses for file, addresses in found.items() if addresses}


def on_post_build(config: Any) -> None:
    """Stops the build of a site that needs a network."""
    # Only a host shows it, and its links hold at the root of a host alone.
    (Path(config["site_dir"]) / "404.html").unlink(missing_ok=True)
    if found := fetched_from_hosts(Path(config["site_dir"])):
        raise ValueError(f"Expected pages that load nothing from other hosts (got {found}). Do keep it in docs/assets.")
