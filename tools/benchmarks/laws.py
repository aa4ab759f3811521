"""Loss against compute over several sizes: what head graphs are worth as models grow, from runs of `quality`.

Each folder holds the same task, variants and seeds at another size, as `tools/benchmark.py quality --run` left it.
Compute is 6 N D of N trainable parameters and D tokens, so equal for all variants of a size. Fitted is a power law
L = a C^-b for each variant and seed. The ratio of compute at equal loss says how many times as much plain attention
needs for a variant's loss, by plain attention's exponent: above 1 the variant is ahead. Divided by the ratio of step
times it says so of time. The trend is what the ratio is multiplied by when compute grows tenfold: above 1 the lead
grows. All intervals are 95 % over the seeds (Student's t, of the logarithms where it is a ratio).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.power_laws import Curve, compute_ratios, geometric, trend
from benchmarks.quality_report import COLOURS
from benchmarks.statistics import interval
from gohgraph.common.files import read_json, write_text_whole
from gohgraph.common.tables import markdown_table
from gohgraph.drawing.figures import INK, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLAIN = "plain"
# By variant, its entry in the results of each size, the smallest first.
Sizes = dict[str, list[dict[str, Any]]]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="FOLDER", help="of quality's runs, one for each size")
    add("--task", default="text", help="of the runs (default: %(default)s)")
    add("--measure", default="validation_loss", help="that is compared (default: %(default)s)")
    add("--markdown", type=Path, help="file for the table")
    add("--picture", type=Path, help="file for the picture of losses against compute")


def run(flags: argparse.Namespace) -> None:
    """Reads the runs, prints the table and draws the picture."""
    sizes = read_sizes(flags.folders, flags.task)
    curves = {variant: curve_of(entries, flags.measure) for variant, entries in sizes.items()}
    text = laws_table(sizes, curves, flags.task)
    print(text)
    if flags.markdown:
        write_text_whole(flags.markdown, text + "\n")
    if flags.picture:
        draw_laws(curves, flags.picture, flags.measure)


def read_sizes(folders: list[Path], task: str) -> Sizes:
    """Returns what runs of several sizes have found, by variant and rising compute.

    Raises:
        ValueError: there are fewer than two sizes, a folder lacks the task's results, or variants or seeds differ.
    """
    found = []
    for folder in folders:
        saved = read_json(folder / "results.json", "run tools/benchmark.py quality to its end")
        if not saved.get(task, {}).get(PLAIN):
            raise ValueError(f"Expected results of {task!r} with {PLAIN!r} in {folder} (got {list(saved)}). Do run it.")
        found.append(saved[task])
    found.sort(key=lambda entries: _compute(entries[PLAIN]))
    if len({_compute(entries[PLAIN]) for entries in found}) < max(2, len(found)):
        raise ValueError(f"Expected two sizes or more, each once (got {len(found)} folders). Do add runs.")
    shapes = {tuple((variant, len(entry["logs"])) for variant, entry in sorted(own.items())) for own in found}
    if len(shapes) > 1:
        raise ValueError(f"Expected the same variants and seeds in all folders (got {sorted(shapes)}). Do add runs.")
    return {variant: [entries[variant] for entries in found] for variant in found[0]}


def curve_of(entries: list[dict[str, Any]], measure: str) -> Curve:
    """Returns the losses of a variant by seed and size."""
    by_size = [[log[-1][measure] for log in entry["logs"]] for entry in entries]
    return Curve([_compute(entry) for entry in entries], list(zip(*by_size, strict=True)))


def laws_table(sizes: Sizes, curves: dict[str, Curve], task: str) -> str:
    """Returns a row for every variant: losses, exponent, ratios of compute and of time at equal loss, and the trend."""
    heads = [f"{entry['parameters'] / 1e6:.2f}M" for entry in sizes[PLAIN]]
    rows = [["attention", *(f"loss, {head}" for head in heads), "exponent"]]
    rows[0] += [f"{what} ratio, {head}" for what in ("compute", "time") for head in heads] + ["per tenfold"]
    for variant, curve in curves.items():
        means = [interval(losses)[0] for losses in zip(*curve.losses, strict=True)]
        row = [variant, *(f"{mean:.4f}" for mean in means), _plus_minus(*interval(curve.exponents))]
        if variant != PLAIN:
            ratios = compute_ratios(curves[PLAIN], curve)
            by_size = [geometric(own) for own in zip(*ratios, strict=True)]
            times = [entry["times"][1] for entry in sizes[variant]]
            row += [_range(*spread) for spread in by_size]
            row += [f"{spread[0] / time:.3f}" for spread, time in zip(by_size, times, strict=True)]
            row.append(_range(*trend(curve.compute, ratios)))
        rows.append(row + [""] * (len(rows[0]) - len(row)))
    computes = ", ".join(f"{compute:.2e}" for compute in curves[PLAIN].compute)
    seeds = len(curves[PLAIN].losses)
    return markdown_table(rows, f"**{task}**: loss against compute, {computes} operations, {seeds} seeds")


def draw_laws(curves: dict[str, Curve], path: Path, measure: str) -> Figure:
    """Draws every variant's mean loss against compute, both in logarithms.

    Returns:
        The `matplotlib.figure.Figure`.
    """
    figure = new_figure(5.2, 3.6)
    axis = figure.subplots()
    for variant, curve in curves.items():
        means = [interval(losses)[0] for losses in zip(*curve.losses, strict=True)]
        style = {"color": COLOURS["unclear"], "linewidth": 2.4} if variant == PLAIN else {"linewidth": 1.2}
        axis.loglog(curve.compute, means, marker="o", markersize=3.5, label=variant, **style)
    axis.set_xlabel("compute, 6 N D", fontsize=9, color=INK)
    axis.set_ylabel(measure.replace("_", " "), fontsize=9, color=INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8, colors=INK, which="both")
    axis.legend(fontsize=8, frameon=False)
    save_figure(figure, path)
    return figure


def _compute(entry: dict[str, Any]) -> float:
    return 6.0 * entry["parameters"] * entry["tokens"]


def _plus_minus(centre: float, half: float) -> str:
    return f"{centre:.4f}" if half != half else f"{centre:.4f} ± {half:.4f}"


def _range(centre: float, low: float, high: float) -> str:
    return f"{centre:.3f}" if low != low else f"{centre:.3f} ({low:.3f} to {high:.3f})"
