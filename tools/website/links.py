"""A hook of mkdocs: links to files outside docs/ lead to the repository, those to notebooks to their pages."""

from __future__ import annotations

import re
from configparser import ConfigParser
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<=\]\()\.\./([^)#]+)")
NOTEBOOK = re.compile(r"(?<=\]\()(notebooks/\w+)\.ipynb(?=\))")


def source_url() -> str:
    """Returns where the files of the repository can be read, the `Source` of setup.cfg."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    urls = dict(line.split(" = ") for line in config["metadata"]["project_urls"].strip().splitlines())
    return urls["Source"]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Returns the page with links that hold in the site; a page in a folder reaches docs/ itself by `../`."""
    if "/" not in page.file.src_uri:
        markdown = LINK.sub(rf"{source_url()}/blob/main/\1", markdown)
    return NOTEBOOK.sub(r"\1.md", markdown)
