"""The tables and the picture of the quality benchmark."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.statistics import at_budget, holm, interval, needed_budget, paired_p
from benchmarks.tasks import Task
from gohgraph.common.tables import markdown_table
from gohgraph.drawing.figures import INK, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of the batches of all steps since the last line of a run's log.
TRAINING_LOSS = "loss"
COLOURS = {"better": "#0072B2", "worse": "#D55E00", "unclear": "#999999"}


@dataclass(frozen=True)
class Entry:
    """What was found of one variant on one task.

    Args:
        parameters, d_ff: of the model.
        point: the learning rate, and what else was searched, that was chosen.
        logs: of each seed, rows with `step` and what the task's `evaluate` returns.
        times: seconds of a training step as ratios to plain attention: lower quartile, median, upper quartile.
        tokens_per_second: of training.
        tokens: trained on.
        border: the settings of the point that lie at the border of the grid.
        equal_time_logs: of runs of as much time as plain attention's, where there are such.
    """

    parameters: int
    d_ff: int
    point: dict[str, float]
    logs: list[list[dict[str, Any]]]
    times: list[float]
    tokens_per_second: float = math.nan
    tokens: int = 0
    border: list[str] = field(default_factory=list)
    equal_time_logs: list[list[dict[str, Any]]] | None = None

    @property
    def rates(self) -> str:
        """The point, as text; a * marks the border of the grid."""
        return " / ".join(f"{value:g}" + "*" * (name in self.border) for name, value in self.point.items())

    @property
    def time_ratio(self) -> float:
        """The median ratio."""
        return self.times[1]

    def ends(self, measure: str) -> list[float]:
        """Returns the last value of a measure, of each seed."""
        return _ends(self.logs, measure)

    def minus(self, other: Entry, measure: str) -> list[float]:
        """Returns the difference to another variant, seed by seed."""
        return [own - its for own, its in zip(self.ends(measure), other.ends(measure), strict=True)]


def quality_table(
    name: str, task: Task, seeds: list[int], entries: dict[str, Entry], plain_curve: dict[float, float]
) -> str:
    """Returns the Markdown table of a task; the first entry is plain attention."""
    (plain_name, plain), *others = entries.items()
    measure, settings = task.measure, max((entry.point for entry in entries.values()), key=len)
    p_values = [paired_p(entry.minus(plain, measure)) for _, entry in others]
    p_of = {variant: pair for (variant, _), *pair in zip(others, p_values, holm(p_values), strict=True)}
    head = ["attention", "rate", measure.replace("_", " "), "minus plain", "p (corrected)", "step time", "tokens/s"]
    # Of the same seeds: what more or fewer steps change, beside what a variant changes.
    gains = {budget: value - plain_curve[1.0] for budget, value in plain_curve.items()}
    has_curve, has_time = len(gains) > 1, any(entry.equal_time_logs is not None for _, entry in others)
    head += ["steps plain needs"] * has_curve + ["minus plain at equal time"] * (has_curve or has_time)
    extra = [name for name in ("bleu",) if name in plain.logs[0][-1]]
    lines = [[*head, *extra]]
    for variant, entry in entries.items():
        ends, own, difference = entry.ends(measure), variant == plain_name, interval(entry.minus(plain, measure))
        line = [variant, entry.rates, _spread(*interval(ends)), "" if own else _spread(*difference, signed=True)]
        line.append("" if own or len(ends) < 2 else "{:.3g} ({:.3g})".format(*p_of[variant]))
        line += [f"{entry.time_ratio:.2f}", f"{entry.tokens_per_second:,.0f}"]
        if has_curve:
            line.append("1" if own else needed_budget(gains, difference[0]))
        if has_curve or has_time:
            line.append("" if own else _at_equal_time(entry, plain, measure, gains))
        lines.append([*line, *(_spread(*interval(entry.ends(name)), digits=2) for name in extra)])
    compared = f"{len(others)} comparisons; rates: {' / '.join(settings)}, * at the border of their grid."
    curve = ", ".join(f"{budget:g}: {value:.4f}" for budget, value in plain_curve.items())
    by_steps = f"Plain attention by steps, as multiples of {task.steps:,}, on the first three seeds: {curve}."
    table = markdown_table(lines, _title(name, task, seeds, plain))
    return "\n\n".join([table, compared, *[by_steps] * has_curve, *load_lines(entries)])


def beside_table(task: Task, entries: dict[str, Entry]) -> str:
    """Returns the Markdown table of what the reported part does not say; the first entry is plain attention.

    The loss in training is the mean over the last tenth of the steps, of the same batches for all variants: it tells
    small differences, and where it alone falls a variant only learns its training data by heart. The part that rates
    were chosen on served for that with the first seed only. Its intervals are of single comparisons, not corrected.
    """
    plain = next(iter(entries.values()))
    head = ["attention"]
    for measure in (TRAINING_LOSS, task.choosing):
        head += [measure.replace("_", " "), "minus plain"]
    lines = [head]
    for variant, entry in entries.items():
        line = [variant]
        for measure in (TRAINING_LOSS, task.choosing):
            difference = "" if entry is plain else _spread(*interval(entry.minus(plain, measure)), signed=True)
            line += [_spread(*interval(entry.ends(measure))), difference]
        lines.append(line)
    about = "Beside it: in training, over the last tenth of the steps, and on the part that rates were chosen on"
    return markdown_table(lines, about)


def _title(name: str, task: Task, seeds: list[int], plain: Entry) -> str:
    epochs = task.epochs(task.steps)
    steps = f"{task.steps:,} steps of batch {task.batch_size}" + (f" ({epochs:.2f} epochs)" if epochs else "")
    shape = f"{task.num_layers} layers of d_model {task.d_model}, {task.num_heads} heads"
    return f"**{name}**: {task.summary}; {shape}, {plain.parameters:,} parameters, {steps}, {len(seeds)} seeds"


def _at_equal_time(entry: Entry, plain: Entry, measure: str, gains: dict[float, float]) -> str:
    """The difference to plain attention after its time: of runs that took it, or with what more steps gain plain."""
    if entry.equal_time_logs is not None:
        ends = _ends(entry.equal_time_logs, measure)
        differences = [own - its for own, its in zip(ends, plain.ends(measure), strict=True)]
        return _spread(*interval(differences), signed=True)
    beside = at_budget(gains, entry.time_ratio)
    return "-" if beside is None else f"{interval(entry.minus(plain, measure))[0] - beside:+.4f}"


def _ends(logs: list[list[dict[str, Any]]], measure: str) -> list[float]:
    return [log[-1][measure] for log in logs]


def load_lines(entries: dict[str, Entry]) -> list[str]:
    """Returns a line on how uneven the load of routed heads is at the end, none where no heads are routed.

    Example:
        >>> logs = [[{"worst_load_cv": 0.25}], [{"worst_load_cv": 0.125}]]
        >>> load_lines({"moh-75": Entry(7, 5, {"learning_rate": 0.1}, logs, [1, 1, 1])})
        ["Coefficient of variation of routed heads' load, worst layer of the worst seed: moh-75 0.25."]
    """
    routed = {name: entry for name, entry in entries.items() if "worst_load_cv" in entry.logs[0][-1]}
    worst = ", ".join(f"{name} {max(entry.ends('worst_load_cv')):.2f}" for name, entry in routed.items())
    return [f"Coefficient of variation of routed heads' load, worst layer of the worst seed: {worst}."] if worst else []


def draw_quality(
    entries: dict[str, dict[str, Entry]], measures: dict[str, str], path: Path | None = None
) -> Figure:
    """Draws the difference of every variant to plain attention with its 95 % interval, a panel for each task.

    Returns:
        The `matplotlib.figure.Figure`.
    """
    names = [list(found)[1:] for found in entries.values()]
    height = 0.28 * max(map(len, names), default=1) + 1.1
    figure = new_figure(3.6 * len(entries) + 1.2, height)
    axes = figure.subplots(1, len(entries), squeeze=False)[0]
    for axis, (task, found) in zip(axes, entries.items(), strict=True):
        plain, *others = found.items()
        for place, (_, entry) in enumerate(others):
            centre, half = interval(entry.minus(plain[1], measures[task]))
            half = 0.0 if math.isnan(half) else half
            kind = "better" if centre + half < 0 else "worse" if centre - half > 0 else "unclear"
            axis.errorbar(centre, place, xerr=half, fmt="o", color=COLOURS[kind], markersize=4, linewidth=1.4)
        axis.axvline(0, color=INK, linewidth=0.8)
        axis.set_yticks(range(len(others)), [variant for variant, _ in others], fontsize=8)
        axis.set_ylim(max(len(others), 1) - 0.5, -0.5)
        axis.set_title(task, fontsize=10, color=INK)
        axis.set_xlabel(f"{measures[task].replace('_', ' ')}, minus plain", fontsize=9, color=INK)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8, colors=INK)
    save_figure(figure, path)
    return figure


def _spread(centre: float, half: float, *, signed: bool = False, digits: int = 4) -> str:
    shown = f"{centre:+.{digits}f}" if signed else f"{centre:.{digits}f}"
    return shown if math.isnan(half) else f"{shown} ± {half:.{digits}f}"
