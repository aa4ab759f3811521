"""Figures of the loss curves of runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gohgraph.common.files import checked_path
from gohgraph.drawing.figures import INK, WIDTH, finish, frame_axis, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, without its yellow, which is too pale for a line on white; then other strokes and markers.
CURVES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STROKES, MARKERS = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1, 1.5))), "osD^vPX*"
# So many runs have their names at their ends; of more, numbers stand there and names beside the figure.
MOST_NAMES = 10


def draw_curves(
    histories: Mapping[str, Sequence[Mapping[str, float]]],
    path: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
) -> Figure:
    """Draw the loss curves of runs: training loss faint and smoothed, validation loss with markers.

    The left side shows all steps, the right one the validation loss of the second half, where runs are close. Runs
    are told apart by colour, stroke and marker, and named at the ends of their curves.

    Args:
        histories: {name of the run: its log}, each entry with `step` and with `loss`, `validation_loss` or both, in
            nats; a run without either is an error.
        path, title, and what is returned: as in `draw`.

    Example:
        >>> log = [{"step": 1, "loss": 5.5}, {"step": 2, "loss": 4.5, "validation_loss": 4.6}]
        >>> figure = draw_curves({"plain": log})
        >>> figure.axes[0].get_xlabel()
        'step'
    """
    path = checked_path(path)
    runs = {name: (_series(log, "loss"), _series(log, "validation_loss")) for name, log in histories.items()}
    empty = [name for name, (training, validation) in runs.items() if not len(training) + len(validation)]
    if empty or not runs:
        raise ValueError(
            f"Expected losses in every run (got none in {empty or 'an empty mapping'}). "
            "Do pass entries with step and loss or validation_loss."
        )
    last = max(points[-1, 0] for run in runs.values() for points in run if len(points))
    close = any((validation[:, 0] >= last / 2).sum() > 1 for _, validation in runs.values())
    names = list(runs) if len(runs) <= MOST_NAMES else [str(number + 1) for number in range(len(runs))]
    many = len(runs) > MOST_NAMES
    height = max(3.9, 0.19 * len(runs) + 0.6) if many else 3.9
    figure = new_figure((WIDTH if close else 0.62 * WIDTH + 1) + 2 * many, height)
    axes = figure.subplots(1, 2 if close else 1, squeeze=False, width_ratios=[1.5, 1] if close else None)[0]
    ends: list[dict[str, Any]] = []
    for number, (training, validation) in enumerate(runs.values()):
        style = _style(number)
        _draw_run(axes[0], training, validation, style, len(runs))
        late = validation[validation[:, 0] >= last / 2]
        if close:
            axes[1].plot(*late.T, markersize=4, linewidth=1.6, **style)
        shown = late if close else validation if len(validation) else _smoothed(training)
        ends.append({"end": shown[-1] if len(shown) else None, "name": names[number], **style})
    _frame_curves(axes, list(runs.values()))
    _name_ends(axes[-1], ends)
    _add_legend(figure, list(runs), numbered=len(runs) > MOST_NAMES)
    return finish(figure, title, path)


def _style(number: int) -> dict[str, Any]:
    """How the curve of a run is drawn: no two of the first 28 alike."""
    turn, colour = divmod(number, len(CURVES))
    style = {"color": CURVES[colour], "linestyle": STROKES[turn % len(STROKES)]}
    return style | {"marker": MARKERS[(colour + turn) % len(MARKERS)]}


def _series(log: Sequence[Mapping[str, float]], key: str) -> np.ndarray:
    points = [(entry["step"], entry[key]) for entry in log if entry.get(key) is not None]
    return np.array(points, dtype=float).reshape(-1, 2)  # [N, 2]


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a centred fiftieth of the run; narrow at the steep start, one-sided at the end."""
    at = np.arange(len(values))
    before = np.minimum(at, min(len(values) // 100, 200))
    after = np.minimum(before, len(values) - 1 - at)
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[at + after + 1] - total[at - before]) / (before + after + 1)


def _smoothed(training: np.ndarray) -> np.ndarray:
    return np.stack([training[:, 0], _smooth(training[:, 1])], axis=1)  # [N, 2]


def _draw_run(axis: Axes, training: np.ndarray, validation: np.ndarray, style: dict[str, Any], runs: int) -> None:
    if len(training):
        faint = {"color": style["color"], "linestyle": style["linestyle"]}
        if not len(validation) and len(training) <= 30:
            faint |= {"marker": style["marker"], "markersize": 3.5}
        axis.plot(*training.T, color=style["color"], alpha=0.13 if runs <= 4 else 0.0, linewidth=0.6)
        # Of many runs with validation, training is only hinted at.
        alpha = 1.0 if not len(validation) else 0.45 if runs <= 4 else 0.18
        axis.plot(*_smoothed(training).T, alpha=alpha, linewidth=1.2, **faint)
    if len(validation):
        axis.plot(*validation.T, markersize=3.5, linewidth=1.6, **style)


def _name_ends(axis: Axes, ends: list[dict[str, Any]]) -> None:
    """Writes names to the right of the curves' ends, moved apart where they would lie on each other."""
    named = sorted((one for one in ends if one["end"] is not None), key=lambda one: one["end"][1])
    if not named:
        return
    low, high = axis.get_ylim()
    places = np.clip([(one["end"][1] - low) / (high - low) for one in named], 0, 1)
    need = min(0.062, 1.0 / len(named))
    for n in range(1, len(places)):
        places[n] = max(places[n], places[n - 1] + need)
    places -= max(0.0, places[-1] - 1.0)
    for n in range(len(places) - 2, -1, -1):
        places[n] = min(places[n], places[n + 1] - need)
    leader = {"arrowstyle": "-", "linewidth": 0.6, "alpha": 0.6, "shrinkB": 2, "relpos": (0, 0.5)}
    for place, one in zip(places, named, strict=True):
        axis.annotate(
            one["name"], xy=(one["end"][0], np.clip(one["end"][1], low, high)), xytext=(1.04, place),
            xycoords="data", textcoords="axes fraction", fontsize=8, va="center", color=one["color"],
            annotation_clip=False, parse_math=False,
            arrowprops={"color": one["color"], **leader},
        )  # fmt: skip


def _add_legend(figure: Figure, names: list[str], *, numbered: bool) -> None:
    """Puts what every stroke stands for below the figure, or where numbers stand for names, beside it."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], markersize=4, linewidth=1.6, **_style(number)) for number in range(len(names))]
    labels = [f"{number + 1}  {name}" for number, name in enumerate(names)] if numbered else names
    longest = max(map(len, labels))
    columns = 1 if numbered else max(1, min(len(names), int(figure.get_figwidth() * 11 / (longest + 6))))
    place: Literal["outside right upper", "outside lower center"]
    place = "outside right upper" if numbered else "outside lower center"
    style: dict[str, Any] = {"frameon": False, "fontsize": 8, "labelcolor": INK, "handlelength": 3}
    figure.legend(lines, labels, loc=place, ncols=columns, **style)


def _frame_curves(axes: np.ndarray, runs: list[tuple[np.ndarray, np.ndarray]]) -> None:
    from matplotlib.ticker import MaxNLocator

    values = np.concatenate([_smooth(training[:, 1]) for training, _ in runs] + [points[:, 1] for _, points in runs])
    values = values[np.isfinite(values)]
    if len(values):
        # The first steps fall from log(vocabulary): cut them off, or nothing else is seen.
        top = np.quantile(values, 0.97)
        room = 0.05 * max(top - values.min(), 1e-3)
        axes[0].set_ylim(values.min() - room, top + room)
    axes[0].set_ylabel("loss [nats]", color=INK)
    if len(axes) > 1:
        axes[1].set_title("validation loss, second half", fontsize=10, color=INK)
        axes[0].set_title("validation (markers) and training (faint) loss", fontsize=10, color=INK)
    for axis in axes:
        axis.set_xlabel("step", color=INK)
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        frame_axis(axis, labelsize=8.5)
