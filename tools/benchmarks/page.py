"""How long the interactive page takes in a browser: until it is ready, and to answer a slider, clicks and choices.

The page is of a recording of our own model with random weights and output graphs, with every token and its attention
patterns, opened from disk in a headless Chromium. Seconds are those of the page's clock, from the change until the
browser has drawn it (two frames are waited for, 0.02 s); CPU seconds are those of all the browser's processes, which
depend less on what else the machine does. Each change is made `--repeats` times on other tokens, heads or layers; the
median stands.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import gohgraph as goh
from benchmarks.flags import add_round_flags, check_round_flags
from benchmarks.timing import machine
from gohgraph.common.checks import check_int, there
from gohgraph.common.files import write_text_whole
from gohgraph.common.packages import needs
from gohgraph.common.tables import markdown_table

SIZES, SMOKE_SIZES, REPEATS = ("12/32", "32/64"), ("2/4",), 5
HEAD_DIM = 2
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
MODEL = "Bokeh.documents[0].get_model_by_name"
# What is done in the page before, and what is measured then; n counts the times.
NO_HEAD, NO_EDGE = (f"{MODEL}('{of}').selected.indices = []" for of in ("heads", "edges"))
A_HEAD = f"{MODEL}('heads').selected.indices = [(5 * n + 1) % {MODEL}('heads').data.x.length]"
AN_EDGE = f"{MODEL}('edges').selected.indices = [(11 * n + 1) % {MODEL}('edges').data.mean.length]"
A_TOKEN = f"{MODEL}('tokens').selected.indices = [(7 * n + 3) % {MODEL}('tokens').data.x.length]"
LAYERS, LEAST = f"{MODEL}('layers').value", f"{MODEL}('threshold').value"
CHANGES = {
    "nothing": ("", ""),
    "slider": ("", f"{LEAST} *= n % 2 ? 1 / 0.7 : 0.7"),
    "click on a token": ("", A_TOKEN),
    "click on a head": (NO_HEAD, A_HEAD),
    "click beside it": (A_HEAD, NO_HEAD),
    "click on an edge": (NO_EDGE, AN_EDGE),
    "choice of layers": (f"{NO_EDGE}; {LAYERS} = []", f"{LAYERS} = ['layer 1']"),
    "all layers again": (f"{LAYERS} = ['layer 1']", f"{LAYERS} = []"),
    "slider, to all edges": (f"{LEAST} = 0.3 * {MODEL}('threshold').end", f"{LEAST} = 0"),
    "a token, all edges": ("", A_TOKEN),
    "dark": ("", f"{MODEL}('theme').active = !{MODEL}('theme').active"),
}
SETTLED = "await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))"
TIMED = "async (n) => {{ const from = performance.now(); {change}; {settled}; return performance.now() - from }}"
READY = """
const look = () => {
  const page = window.Bokeh?.documents?.[0], said = page?.is_idle && page.get_model_by_name("status")?.text
  if (!said) return requestAnimationFrame(look)
  requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(() => { window.ready = performance.now() })))
}
look()
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    add = parser.add_argument
    add("--sizes", nargs="+", metavar="LAYERS/HEADS", help=f"default: {' '.join(SIZES)}")
    add("--tokens", type=int, default=100, help="of the text (default: %(default)s)")
    add("--pages", type=Path, metavar="FOLDER", help="keep the pages there, and take those that are there")
    add_round_flags(parser, REPEATS, threads=1)


def run(flags: argparse.Namespace) -> None:
    """Measures and prints the tables."""
    check_round_flags(flags, REPEATS, fewest=1)
    check_int("--tokens", flags.tokens, low=2)
    torch.set_num_threads(flags.threads)
    said = machine("cpu", "float32", flags.threads, flags.repeats)
    print(said)
    rows = []
    with tempfile.TemporaryDirectory() as folder, _browser() as browser:
        for size in tqdm(flags.sizes or (SMOKE_SIZES if flags.smoke else SIZES), unit="page", disable=None):
            file = (flags.pages or Path(folder)) / f"{size.replace('/', 'x')}.html"
            if not file.exists():
                write_page(file, size, flags.tokens)
            rows += [{"page": size, **row} for row in measure(browser, file, flags.repeats)]
    shown = table(rows)
    print("\n" + shown)
    if flags.json:
        write_text_whole(flags.json, json.dumps({"machine": said, "rows": rows}, indent=2) + "\n")
    if flags.markdown:
        write_text_whole(flags.markdown, f"{said}\n\n{shown}\n")


def write_page(file: Path, size: str, tokens: int) -> None:
    """Saves the page of a model of LAYERS/HEADS with random weights."""
    parts = [int(part) if part.isdecimal() else 0 for part in size.split("/")]
    if len(parts) != 2 or min(parts) < 2:
        raise ValueError(f"Expected LAYERS/HEADS, 2 or more of each (got {size!r}). Do pass e.g. 12/32.")
    layers, heads = parts
    torch.manual_seed(0)
    shape: dict[str, Any] = {"d_model": HEAD_DIM * heads, "num_heads": heads, "num_layers": layers, "d_ff": heads}
    model = goh.LanguageModel(goh.TransformerConfig(256, **shape, head_graph=goh.HeadGraphConfig())).eval()
    for module in model.modules():
        if isinstance(module, goh.HeadGraphConv):
            nn.init.normal_(module.edges.bias, std=0.4)
            nn.init.normal_(there(module.edges.weight), std=0.4 * module.edges.context_dim**-0.5)
    strings = [f"{number} " for number in range(tokens)]
    with torch.no_grad(), goh.record(model, every_token=True, token_strings=strings, attention=True) as recorded:
        model(torch.randint(256, (1, tokens)))
    goh.save_page(recorded, file)


@contextmanager
def _browser() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        raise FileNotFoundError("Expected a Chromium on the PATH (got none). Do install chromium.")
    with needs("playwright for a browser", "test"):
        from playwright.sync_api import sync_playwright
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()


def measure(browser: Any, file: Path, repeats: int) -> list[dict[str, Any]]:
    """Returns seconds and CPU seconds of a page: until it is ready, and of every change."""
    seconds, cpu = [], []
    for _ in range(repeats):
        context = browser.new_context(viewport={"width": 1400, "height": 1000}, color_scheme="light")
        page, before = context.new_page(), cpu_seconds()
        page.add_init_script(READY)
        page.goto(file.resolve().as_uri())
        page.wait_for_function("window.ready", timeout=120_000)
        seconds.append(page.evaluate("window.ready / 1000"))
        cpu.append(_settled_cpu(page) - before)
        if len(seconds) < repeats:
            context.close()
    rows = [_row("ready", seconds, cpu)]
    for name, changes in CHANGES.items():
        seconds, cpu = [], []
        prepare, code = (TIMED.format(change=change, settled=SETTLED) for change in changes)
        for number in range(repeats):
            page.evaluate(prepare, number)
            start = _settled_cpu(page)
            seconds.append(page.evaluate(code, number) / 1000)
            cpu.append(_settled_cpu(page) - start)
        rows.append(_row(name, seconds, cpu))
    context.close()
    return rows


def _row(what: str, seconds: list[float], cpu: list[float]) -> dict[str, Any]:
    return {"what": what, "seconds": seconds, "cpu_seconds": cpu}


def _settled_cpu(page: Any) -> float:
    """The CPU seconds once nothing more is drawn: two readings that hardly differ."""
    last = cpu_seconds()
    while True:
        page.wait_for_timeout(150)
        now = cpu_seconds()
        if now - last < 0.03:
            return now
        last = now


def cpu_seconds() -> float:
    """The CPU seconds of all browsers that this process has started, without what drives them."""
    parents, ticks = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().rpartition(")")
        except OSError:
            continue
        number, fields = int(stat.parent.name), rest.split()
        parents[number] = int(fields[1])
        ticks[number] = int(fields[11]) + int(fields[12]) if "chrom" in name else 0
    found, waiting = 0, [os.getpid()]
    while waiting:
        children = [number for number, parent in parents.items() if parent == waiting[-1]]
        waiting.pop()
        found += sum(ticks[child] for child in children)
        waiting += children
    return found / os.sysconf("SC_CLK_TCK")


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the Markdown table of medians."""
    head = ["layers/heads", "what", "seconds", "slowest", "CPU seconds of the browser"]
    lines = [
        [row["page"], row["what"], *(f"{number:.2f}" for number in (
            statistics.median(row["seconds"]), max(row["seconds"]), statistics.median(row["cpu_seconds"])))]
        for row in rows
    ]  # fmt: skip
    return markdown_table([head, *lines])
