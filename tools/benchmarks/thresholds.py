"""Where one form of attention under score messages overtakes another on this machine, beside what the chooser takes.

A block, forward and backward, in every form that takes it, as ratio to plain attention, and the form that
`gohgraph.attention.forms` chooses there by itself: its thresholds stand beside this command. The default sizes cross
them. Sizes are d_model/heads/length/batch; on a CPU the time is that of the processor.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.decoding import attention_of
from benchmarks.flags import add_shared_flags, check_shared_flags, numbers_of, place
from benchmarks.forms import Size, build
from benchmarks.speed import Step
from benchmarks.timing import WARM_UP, interleaved, ratios
from gohgraph.attention import forms
from gohgraph.attention.call import Call, Mask
from gohgraph.common.tables import markdown_table
from gohgraph.graphs.protocol import Messages

DEFAULT_SIZES = (
    "64/4/64/16", "128/8/64/8", "128/8/128/1", "128/8/128/2", "128/8/128/8", "128/8/512/1", "128/4/128/8",
    "256/8/192/1", "256/8/256/1", "512/8/64/8", "512/8/128/1", "512/8/128/4",
)  # fmt: skip
SMOKE_SIZES = ("24/4/7/2",)
GRAPHS = ("score-ring2", "score-ring4", "score-complete", "talking-heads")
FORMS = ("maps", "tiled", "wide")
REPEATS = 8


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    parser.add_argument("--sizes", nargs="+", metavar="SIZE", help=f"default: {' '.join(DEFAULT_SIZES)}")
    add_shared_flags(parser, REPEATS)


def cases(flags: argparse.Namespace) -> list[Size]:
    """Fills in the defaults of `flags` and returns the sizes to measure.

    Raises:
        ValueError: a flag that cannot be measured.
    """
    check_shared_flags(flags, REPEATS)
    texts = flags.sizes or (SMOKE_SIZES if flags.smoke else DEFAULT_SIZES)
    return [Size(*numbers_of(text, "d_model/heads/length/batch", DEFAULT_SIZES[0])) for text in texts]


def calls(size: Size, flags: argparse.Namespace) -> int:
    """Returns how many calls `measure` times."""
    return (1 + sum(len(forms_of(graph, size)) for graph in GRAPHS)) * (flags.repeats + WARM_UP)


def measure(size: Size, flags: argparse.Namespace, progress: tqdm) -> list[dict[str, Any]]:
    """Returns one row for every graph in every form."""
    progress.set_description(str(size._asdict()))
    x, grad = torch.randn(2, size.batch, size.length, size.d_model, **place(flags))  # [B, T, M] each
    x.requires_grad_()
    names = [("plain", "plain"), *((graph, form) for graph in GRAPHS for form in forms_of(graph, size))]
    steps = {}
    for graph, form in names:
        layer = build(graph, size).to(**place(flags))
        attention_of(layer).form = form
        steps[graph, form] = Step(layer, "block", "forward+backward", x, grad)
        if flags.device == "cpu":
            steps[graph, form].clock = time.process_time
    seconds = interleaved(steps, flags.repeats, progress)
    rows = []
    for (graph, form), own in list(seconds.items())[1:]:
        row = {"size": size._asdict(), "graph": graph, "form": form, "seconds": own}
        rows.append({**row, "ratio": ratios(own, seconds["plain", "plain"]), "taken": chosen(graph, size) == form})
    return rows


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """Returns the Markdown table of a size: for every graph its forms, and which is taken."""
    lines = [["to plain (quartiles)", *FORMS, "taken", "fastest"]]
    for graph in GRAPHS:
        found = {row["form"]: row for row in rows if row["graph"] == graph}
        ratio = {form: row["ratio"] for form, row in found.items()}
        cells = [f"{r[1]:.2f} ({r[0]:.2f}-{r[2]:.2f})" if (r := ratio.get(form)) else "-" for form in FORMS]
        taken = [form for form, row in found.items() if row["taken"]]
        lines.append([graph, *cells, *taken, min(ratio, key=lambda form: ratio[form][1])])
    return [markdown_table(lines, ", ".join(f"{name} {value}" for name, value in rows[0]["size"].items()))]


def forms_of(graph: str, size: Size) -> list[str]:
    """Returns the forms of attention that take a graph at a size.

    Example:
        >>> forms_of("talking-heads", Size(24, 4, 7, 2))
        ['maps', 'tiled']
    """
    call = _call(graph, size)
    return [form.name for name in FORMS for form in forms.FORMS if form.name == name and not form.refuses(call)]


def chosen(graph: str, size: Size) -> str:
    """Returns the form that is chosen where none is asked for.

    Example:
        >>> chosen("score-complete", Size(24, 4, 7, 2)), chosen("score-complete", Size(64, 8, 512, 1))
        ('wide', 'tiled')
    """
    return next(name for name, reason in forms.explain(_call(graph, size)).items() if reason == "taken")


def _call(graph: str, size: Size) -> Call:
    attention = attention_of(build(graph, size))
    q = torch.empty(size.batch, size.length, size.num_heads, attention.head_dim)
    x = torch.empty(size.batch, size.length, size.d_model)
    messages = {site: Messages(graph, x) for site, graph in attention.graphs.items()}
    return Call(q, q, q, Mask(causal=True), 0.0, messages.get("scores"), messages.get("weights"))
