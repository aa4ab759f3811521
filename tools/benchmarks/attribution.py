"""Time and memory of the head graph of a stock model: composition of weights and edge attribution, by layers x heads.

A GPT-2 of random weights is measured whole: `composition` are the Q-, K- and V-composition of all pairs of heads;
`attribution` all edges between embedding, heads, feed-forwards and logits at every token, two forward passes and one
backward pass; what these passes take without any edge stands beside it, since nobody can be faster. Every call has a
process of its own, one after the other in rounds. Time is that of the processor over all threads, after a tiny call;
memory is the peak of the process above what it held before. With `--opponent`, TransformerLens 4.3 does the same in the
same rounds, in both its forms: its own functions (`all_composition_scores`, `attribution_patch`); and, its strongest
for attribution, its hooks and caches with one matrix product a reader instead of its loop over edges. The difference is
the largest of any edge's values, to the largest value.

`--stream` measures composition of a folder that is never loaded: a Llama of random bfloat16 weights, written first and
removed afterwards.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks import rival
from benchmarks.flags import add_round_flags, check_round_flags, numbers_of
from benchmarks.statistics import interval
from benchmarks.streamed import Shape, write_folder
from benchmarks.timing import machine
from gohgraph.common.checks import check_int
from gohgraph.common.files import write_text_whole
from gohgraph.common.tables import markdown_table

SIZES, SMOKE_SIZES = ("4/4/256", "8/8/512", "12/12/768", "16/16/1024", "32/32/2048"), ("2/3/12",)
FORM, REPEATS, VOCABULARY = "layers/heads/d_model", 3, 512
KINDS = ("composition", "attribution")
OURS, PASSES = "gohgraph", "the passes alone"


class Case(NamedTuple):
    """One call: what, by whom, on which model."""

    kind: str
    who: str
    layers: int = 0
    heads: int = 0
    d_model: int = 0
    tokens: int = 0
    threads: int = 1
    folder: str = ""
    values: bool = False


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    add = parser.add_argument
    add("--sizes", nargs="+", metavar=FORM.upper(), help=f"default: {' '.join(SIZES)}")
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="(default: both)")
    add("--tokens", type=int, default=15, help="of the two inputs (default: %(default)s)")
    add("--opponent", action="store_true", help="TransformerLens beside it (pip install transformer-lens)")
    add("--stream", metavar="LAYERS/HEADS/KV_HEADS/D_MODEL/D_FF/VOCABULARY", help="composition of a folder, alone")
    add("--folder", type=Path, help="where --stream writes its folder (default: a temporary one)")
    add_round_flags(parser, REPEATS, threads=1)


def run(flags: argparse.Namespace) -> None:
    """Measures and prints the table."""
    check_round_flags(flags, REPEATS, fewest=1)
    check_int("--tokens", flags.tokens, low=2)
    if flags.opponent:
        rival.check_installed()
    said = machine("cpu", "float32", flags.threads, flags.repeats)
    print(said)
    if flags.stream:
        rows = _streamed(flags)
    else:
        rows = _measured([case for cases in _cases(flags) for case in cases], flags.repeats)
    shown = table(rows)
    print("\n" + shown)
    if flags.json:
        kept = [{name: value for name, value in row.items() if name != "values"} for row in rows]
        write_text_whole(flags.json, json.dumps({"machine": said, "rows": kept}, indent=2) + "\n")
    if flags.markdown:
        write_text_whole(flags.markdown, f"{said}\n\n{shown}\n")


def _cases(flags: argparse.Namespace) -> list[list[Case]]:
    sizes = flags.sizes or (SMOKE_SIZES if flags.smoke else SIZES)
    cases = []
    for text in sizes:
        layers, heads, d_model = _numbers(text)
        for kind in flags.kinds:
            who = [OURS, *([PASSES] if kind == "attribution" else []), *(rival.FORMS[kind] if flags.opponent else ())]
            shape = (layers, heads, d_model, flags.tokens, flags.threads)
            cases.append([Case(kind, one, *shape, values=flags.opponent and one != PASSES) for one in who])
    return cases


def _numbers(text: str) -> list[int]:
    layers, _, rest = text.partition("/")
    heads, _, d_model = rest.partition("/")
    width, number = numbers_of(f"{d_model}/{heads}", "d_model/heads", "768/12 (12/12/768)")
    check_int("layers of --sizes", int(layers) if layers.isdecimal() else 0, low=2)
    return [int(layers), number, width]


def _measured(cases: list[Case], repeats: int) -> list[dict[str, Any]]:
    """One row a case, with every round's numbers."""
    rows = {case: {**case._asdict(), "cpu_seconds": [], "seconds": [], "peak_bytes": []} for case in cases}
    with tqdm(total=len(cases) * repeats, unit="call", disable=None) as progress:
        for _ in range(repeats):
            for case, row in rows.items():
                progress.set_description(f"{case.kind} {case.layers} x {case.heads} {case.who}")
                measured = in_own_process(case)
                row["values"] = measured.pop("values")
                took = f"{measured['cpu_seconds']:.2f} s of CPU, {measured['peak_bytes'] / 2**20:,.0f} MiB"
                progress.write(f"{case.kind}, {case.layers} x {case.heads}, {case.who}: {took}")
                for name, value in measured.items():
                    row.setdefault(name, []).append(value)
                progress.update()
    for case, row in rows.items():
        first = rows.get(case._replace(who=OURS))
        if case.values and case.who != OURS and first is not None:
            row["difference"] = _difference(first["values"], row["values"])
    return list(rows.values())


def _difference(first: dict[Any, float], second: dict[Any, float]) -> float:
    if set(first) != set(second):
        raise ValueError(
            f"Expected the same edges (got {len(first)} and {len(second)}, "
            f"{sorted(map(str, set(first) ^ set(second)))[:3]}). Do compare the same nodes."
        )
    return max(abs(first[edge] - second[edge]) for edge in first) / max(map(abs, first.values()))


def in_own_process(case: Case) -> dict[str, Any]:
    """Measures a case in a process that does nothing else."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, case).result()


def measure(case: Case) -> dict[str, Any]:
    """Returns CPU seconds, seconds, peak bytes above those before, the process's own peak, and values by edge."""
    torch.set_num_threads(case.threads)
    if not case.folder:
        # What is loaded at a first call is not measured.
        _work(case._replace(layers=2, heads=2, d_model=16, tokens=5))[0]()
    work, values = _work(case)
    gc.collect()
    before, start, cpu = _reset_peak(), time.perf_counter(), time.process_time()
    result = work()
    took = {"cpu_seconds": time.process_time() - cpu, "seconds": time.perf_counter() - start}
    took |= {"peak_bytes": _peak() - before, "process_bytes": _peak()}
    return {**took, "edges": len(result.mean) if hasattr(result, "mean") else 0, "values": values(result)}


def _work(case: Case) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """What is measured, and what makes values by edge of its result."""
    import gohgraph as goh
    from gohgraph.analysis.metrics import logit_difference

    if case.folder:
        return lambda: goh.composition_graph(case.folder), lambda network: None
    model, (clean, other) = rival.gpt2(case, VOCABULARY), rival.inputs(case, VOCABULARY)
    metric = logit_difference(torch.tensor([5]), torch.tensor([7]))
    if case.who == PASSES:
        return partial(_passes, model, clean, other, metric), lambda nothing: None
    if case.who != OURS:
        return rival.work(case, model, clean, other)
    told = rival.values_of if case.values else lambda network: None
    if case.kind == "composition":
        return lambda: goh.composition_graph(model), told
    options: dict[str, Any] = {"nodes": ("embedding", "mlp", "logits"), "every_token": True}
    # Slopes at the second input, as TransformerLens has them.
    return lambda: goh.attribution_graph(model, other, against=clean, metric=metric, **options), told


def _passes(model: Any, clean: torch.Tensor, other: torch.Tensor, metric: Callable[[Any], torch.Tensor]) -> None:
    """A forward pass of each input and the slope of the metric in the embedding of one."""
    with torch.no_grad():
        model(clean)
        start = model.get_input_embeddings()(other)
    start.requires_grad_()
    torch.autograd.grad(metric(model(inputs_embeds=start)).sum(), start)


def _reset_peak() -> int:
    """Forgets the process's peak where Linux lets it, and returns the bytes it has now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return _peak()


def _peak() -> int:
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(name: str) -> int:
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def _streamed(flags: argparse.Namespace) -> list[dict[str, Any]]:
    shape = Shape.of(flags.stream)
    folder = Path(tempfile.mkdtemp(dir=flags.folder))
    try:
        total = write_folder(folder, shape)
        print(f"{total / 2**30:.1f} GiB of weights in {folder}")
        size = (shape.layers, shape.heads, shape.d_model)
        case = Case("streamed composition", OURS, *size, threads=flags.threads, folder=str(folder))
        return _measured([case], flags.repeats)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the Markdown table: mean and 95 % interval over rounds, and ratios to gohgraph's."""
    head = ["layers x heads", "what", "edges", "by", "CPU time in s", "peak in MiB", "process in MiB", "time", "memory",
            "difference"]  # fmt: skip
    lines: list[list[str]] = []
    ours: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        place = (row["layers"], row["heads"], row["d_model"], row["kind"])
        ours.setdefault(place, row)
        numbers = [interval(row[name]) for name in ("cpu_seconds", "peak_bytes")]
        base = [sum(ours[place][name]) / len(ours[place][name]) for name in ("cpu_seconds", "peak_bytes")]
        pairs = zip(numbers, base, strict=True)
        # A tiny model's peak may be too small to be seen.
        ratios = [f"{mean / own:.1f}x" if row["who"] != OURS and own else "" for (mean, _), own in pairs]
        (seconds, spread), (peak, more) = numbers
        spreads = [f" ± {spread:.2f}", f" ± {more / 2**20:,.0f}"] if len(row["cpu_seconds"]) > 1 else ["", ""]
        lines.append([
            f"{row['layers']} x {row['heads']}", row["kind"], f"{ours[place]['edges'][0]:,}", row["who"],
            f"{seconds:.2f}{spreads[0]}", f"{peak / 2**20:,.0f}{spreads[1]}",
            f"{max(row['process_bytes']) / 2**20:,.0f}", *ratios,
            f"{row['difference']:.0e}" if "difference" in row else "",
        ])  # fmt: skip
    return markdown_table([head, *lines])
