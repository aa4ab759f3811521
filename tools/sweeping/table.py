"""The table of a sweep, in Markdown."""

from __future__ import annotations

from collections import Counter
from importlib.metadata import version

SILENT = ("DIFFERENT", "refused, and changed")

COLUMNS = {
    "family": "family", "class": "class", "sites": "sites", "replaced": "attention modules", "off": "off by",
    "causal": "causal", "cached": "cached", "loaded": "saved and loaded",
}  # fmt: skip
HEAD = """# Models of transformers that take head graphs

Written by `python tools/model_sweep.py --rows runs/model_sweep.jsonl --table docs/models.md`: a small random model of
every class that can be built from its configuration with small sizes, {version}.

**Off by** is the largest difference that new head graphs make to the logits, as a share of the largest of them, on 15
tokens and a padded row, windows and choices of keys being 4. The other checks are of models whose edges are far from
their start; "-": the stock model does not pass the check itself, or has no such thing. A silent difference is a class
that was converted and computes something else, or was refused and left changed. How to
convert a model: [convert](convert.md).
"""


def table(rows: list[dict[str, str]]) -> str:
    """Returns a page: counts, the classes that were converted, and those that were not, with the reason."""
    silent = sum(row["status"] in SILENT for row in rows)
    lines = [HEAD.format(version=f"transformers {version('transformers')}, torch {version('torch')}")]
    lines.append(f"{len(rows)} classes, {silent} silent differences.\n")
    for kind in dict.fromkeys(row["kind"] for row in rows):
        of_kind = [row for row in rows if row["kind"] == kind]
        counts = Counter(row["status"] for row in of_kind)
        lines.append(f"## {kind.capitalize()}\n")
        lines.append(", ".join(f"{count} {status}" for status, count in sorted(counts.items())) + "\n")
        lines.append("| " + " | ".join(COLUMNS.values()) + " |\n|" + " --- |" * len(COLUMNS))
        for row in of_kind:
            if row["status"] in ("equal", "DIFFERENT"):
                lines.append("| " + " | ".join(_cell(row.get(name, "")) for name in COLUMNS) + " |")
        others = [row for row in of_kind if row["status"] not in ("equal", "DIFFERENT")]
        lines += ["", "| class | not converted | reason |", "| --- | --- | --- |"] if others else []
        lines += [f"| {row['class']} | {row['status']} | {_cell(row.get('reason', ''))} |" for row in others]
        lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
