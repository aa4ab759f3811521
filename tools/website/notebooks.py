"""A hook of mkdocs: every notebook is a page, with the outputs it was saved with, and can be downloaded from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter


def page(path: Path) -> tuple[str, dict[str, bytes]]:
    """Returns a notebook as Markdown, and its pictures by their names beside it."""
    exporter = MarkdownExporter(preprocessors=["nbconvert.preprocessors.CoalesceStreamsPreprocessor"])
    body, resources = exporter.from_filename(str(path), {"unique_key": path.stem})
    title, _, rest = body.lstrip().partition("\n")
    return f"{title}\n\n[Download this notebook]({path.name}){{download}}\n{rest}", resources["outputs"]


def on_files(files: Files, config: Any) -> Files:
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        if (source := notebook.abs_src_path) is None:
            continue
        content, pictures = page(Path(source))
        folder = Path(notebook.src_uri).parent
        files.append(File.generated(config, notebook.src_uri.replace(".ipynb", ".md"), content=content))
        for name, picture in pictures.items():
            files.append(File.generated(config, str(folder / name), content=picture))
    return files
