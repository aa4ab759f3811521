"""What head graphs and their opponents learn: equal parameters, equal data, tuned rates, several seeds.

On every task the lighter models' feed-forward is widened to the heaviest one's parameter count (or to --parameters),
all variants start from the same base weights and see the same batches in the same order. Plain attention and each
variant search the same grid of rates, one setting after the other, on the first seed, and are trained at the best point
on all others; a * marks a rate at the border of its grid. Data has three parts: rates are chosen on one that is not
trained on, and results are reported on a third one. A second table has the loss in training and that of the part that
rates are chosen on: where the reported part is small or uneven, they tell what it does not.

Differences are taken seed by seed; +- is a 95 % interval (Student's t over the seeds), p of a paired t-test, as it is
and corrected for all comparisons of its table (Holm). Equal time is said in one of two ways: --equal-time trains each
variant again, for as many steps as fit into the time of plain attention's (a whole schedule of its own); without it,
plain attention's loss is read off at the variant's time between runs of --budgets times the steps (linear in the
logarithm). Step times are medians of interleaved rounds, measured once, when nothing else should run.

An interrupted benchmark (Ctrl-C, SIGTERM, or worse) goes on where it stopped when it is called again with the same
--run: finished runs stay, the one that was interrupted goes on from its last checkpoint. Every finished run is a line
in log.txt.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

from benchmarks.quality_report import Entry, beside_table, draw_quality, quality_table
from benchmarks.recipes import RECIPES
from benchmarks.task_runs import OF_MODELS, TaskRuns
from benchmarks.tasks import TASKS
from benchmarks.timing import machine
from gohgraph.common.checks import check_int, check_number
from gohgraph.common.command_line import fill_in
from gohgraph.common.files import make_folder, write_text_whole
from gohgraph.graphs.baselines.presets import PRESETS
from gohgraph.learning.data.corpus import PYTHON_DOCS, PYTHON_PACKAGES

# Every opponent that is not another one's smaller form, then head graphs at every site.
BASIC = ["plain", "head-gate", "element-gate", "head-norm", "norm-element-gate", "talking-heads", "dcmha"]
BASIC += ["knocking-heads", "mea", "moh-75", "static-graph", "frozen-graph"]
BASIC += ["outputs", "norm-outputs", "scores", "values", "both", "outputs-values"]
BUDGETS = (0.5, 2.0, 4.0)
# Fields of tasks that flags of the same name give; a task that lacks one does not take it.
OF_SHAPE = ("d_model", "num_heads", "num_kv_heads", "num_layers", "d_ff")
NUMBERS = (*OF_SHAPE, "steps", "batch_size", "length", "windows", "final_windows")
FIELDS = (*NUMBERS, "pairs")
TIMED_ROUNDS = 20
# What may be searched: settings of `TrainConfig`, and of `TransformerConfig` those that change no parameter's shape.
SEARCHED = (
    "learning_rate", "matrix_learning_rate", "graph_lr_factor", "graph_matrix_lr_factor", "weight_decay", "warmdown",
    *OF_MODELS,
)  # fmt: skip
# Of flags that the command line does not give: in full, and to see that it runs.
FULL = {"seeds": [0, 1, 2, 3, 4], "budgets": list(BUDGETS), "tasks": list(TASKS), "rounds": TIMED_ROUNDS}
# Of many documents: held-out text of a few tells no small differences.
FULL |= {"variants": BASIC, "grid": [], "data": PYTHON_PACKAGES}
SMOKE = {"steps": 4, "seeds": [0, 1], "rates": [4e-3], "budgets": [2.0], "tasks": ["two-cues"], "rounds": 2}
SMOKE |= {"variants": ["plain", "outputs"], "grid": [("matrix_learning_rate", (0.02,)), ("graph_lr_factor", (1.0,))]}
SMOKE |= {"windows": 8, "final_windows": 8, "data": PYTHON_DOCS}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    add = parser.add_argument
    add("--run", type=Path, default=Path("runs/quality"), help="folder, continued if it is there (%(default)s)")
    add("--tasks", nargs="+", choices=TASKS, help="(default: all)")
    add("--variants", nargs="+", choices=PRESETS, metavar="NAME", help=f"of {' '.join(PRESETS)}")
    add("--seeds", nargs="+", type=int, help="(default: 0 1 2 3 4)")
    add("--recipe", choices=RECIPES, default="modern", help="how models are built and trained (default: %(default)s)")
    add("--rates", nargs="+", type=float, help="the grid of learning rates (default: each task's own)")
    add("--grid", nargs="+", type=_setting, metavar="SETTING=V,V", help=_setting.__doc__)
    add("--graph-lr-factor", type=float, default=1.0, help="learning rate of head graphs, times the rate (%(default)s)")
    for field in NUMBERS:
        add(f"--{field.replace('_', '-')}", type=int, help="(default: each task's own)")
    add("--parameters", type=int, help="of all models (default: the heaviest variant's)")
    add("--pairs", help="folder of sentence pairs of the task 'translation', such as Multi30k")
    add("--budgets", nargs="*", type=float, help=f"of plain attention, times the steps (default: {BUDGETS})")
    add("--data", help=f"text of the task 'text': a corpus by name, or a file (default: {PYTHON_PACKAGES})")
    add("--equal-time", action="store_true", help="also train each variant for the time of plain attention")
    add("--rounds", type=int, help=f"of timing (default: {TIMED_ROUNDS})")
    add("--jobs", type=int, default=1, help="processes (default: %(default)s)")
    add("--threads", type=int, default=1, help="of each process (default: %(default)s)")
    add("--smoke", action="store_true", help="a tiny benchmark, to see that it runs, where no flag says otherwise")


def run(flags: argparse.Namespace) -> None:
    """Trains what is missing, then times, writes and prints the tables."""
    fill_in(flags, {**FULL, **SMOKE} if flags.smoke else FULL)
    _check(flags)
    make_folder(flags.run)
    print(machine("cpu", "float32", flags.threads, flags.rounds))
    texts, entries = [], {}
    for name in flags.tasks:
        runs = TaskRuns(name, _options(name, flags), flags)
        entries[name] = runs.entries()
        texts.append(quality_table(name, runs.task, flags.seeds, entries[name], runs.plain_curve()))
        texts.append(beside_table(runs.task, entries[name]))
        print("\n" + "\n\n".join(texts[-2:]))
    _write(flags, texts, entries)


def _options(name: str, flags: argparse.Namespace) -> dict[str, Any]:
    known = {field.name for field in dataclasses.fields(TASKS[name])}
    options = {field: getattr(flags, field) for field in FIELDS if field in known}
    options = {field: value for field, value in options.items() if value is not None}
    if flags.rates is not None:
        options["learning_rates"] = list(flags.rates)
    if name == "text" and flags.data is not None:
        options["data"] = flags.data
    return options


def _setting(text: str) -> tuple[str, tuple[float, ...]]:
    """further settings to search, such as matrix_learning_rate=0.01,0.02 or graph_lr_factor=0.25,1"""
    name, _, values = text.partition("=")
    if name not in SEARCHED:
        raise argparse.ArgumentTypeError(f"Expected one of {list(SEARCHED)} before '=' (got {text!r})")
    try:
        return name, tuple(map(float, values.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"Expected numbers after '=' (got {text!r})") from error


def _write(flags: argparse.Namespace, texts: list[str], entries: dict[str, dict[str, Entry]]) -> None:
    write_text_whole(flags.run / "tables.md", "\n\n".join(texts) + "\n")
    measures = {name: TASKS[name].measure for name in entries}
    with open(flags.run / "results.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        about = ["parameters", "d_ff", "rates", "time_ratio", "tokens_per_second"]
        writer.writerow(["task", "variant", *about, "seed", "measure", "value"])
        for name, found in entries.items():
            for variant, entry in found.items():
                for seed, value in zip(flags.seeds, entry.ends(measures[name]), strict=True):
                    sizes = (entry.parameters, entry.d_ff, entry.rates)
                    times = (round(entry.time_ratio, 4), round(entry.tokens_per_second, 1))
                    writer.writerow([name, variant, *sizes, *times, seed, measures[name], value])
    saved = {name: {v: dataclasses.asdict(entry) for v, entry in found.items()} for name, found in entries.items()}
    write_text_whole(flags.run / "results.json", json.dumps(saved, indent=1))
    draw_quality(entries, measures, flags.run / "quality.png")
    print(f"\npicture: {flags.run / 'quality.png'}; every run: {flags.run / 'results.csv'}")


def _check(flags: argparse.Namespace) -> None:
    flags.grid = dict(flags.grid)
    for name, low in (("jobs", 1), ("threads", 1), ("rounds", 2)):
        check_int(f"--{name}", getattr(flags, name), low=low)
    for name, low in (("steps", 2), ("parameters", 1), *((size, 1) for size in NUMBERS if size != "steps")):
        if getattr(flags, name) is not None:
            check_int("--" + name.replace("_", "-"), getattr(flags, name), low=low)
    for name in ("seeds", "variants", "tasks"):
        values = getattr(flags, name)
        if len(set(values)) < len(values):
            raise ValueError(f"Expected different --{name} (got {values}). Do name each once.")
    positive = {"rates": flags.rates or (), "budgets": flags.budgets, "graph-lr-factor": [flags.graph_lr_factor]}
    for name, values in positive.items():
        for value in values:
            check_number(f"--{name}", value, above=0)
