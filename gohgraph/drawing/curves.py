"""Figures of the loss curves of runs."""

import os
from collections.abc import Mapping, Sequence

import numpy as np

from gohgraph.common.files import checked_path
from gohgraph.drawing.figures import INK, WIDTH, finish, frame_axis, new_figure

# Okabe and Ito's palette, without its yellow, which is too pale for a line on white.
CURVES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


def draw_curves(
    histories: Mapping[str, Sequence[Mapping[str, float]]],
    path: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
):
    """Draw the loss curves of runs: training loss faint and smoothed, validation loss with markers.

    The left side shows all steps, the right one the validation loss of the second half, where runs are close.

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
    figure = new_figure(WIDTH if close else 0.62 * WIDTH, 3.7)
    axes = figure.subplots(1, 2 if close else 1, squeeze=False, width_ratios=[1.5, 1] if close else None)[0]
    for number, (name, (training, validation)) in enumerate(runs.items()):
        colour = CURVES[number % len(CURVES)]
        _draw_run(axes[0], name, training, validation, colour)
        if close:
            late = validation[validation[:, 0] >= last / 2]
            axes[1].plot(*late.T, "o-", color=colour, markersize=4, linewidth=1.6)
    _frame_curves(axes, list(runs.values()))
    return finish(figure, title, path)


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


def _draw_run(axis, name: str, training: np.ndarray, validation: np.ndarray, colour: str) -> None:
    if len(training):
        axis.plot(*training.T, color=colour, alpha=0.13, linewidth=0.6)
        axis.plot(training[:, 0], _smooth(training[:, 1]), color=colour, alpha=0.45, linewidth=1.2)
    if len(validation):
        axis.plot(*validation.T, "o-", color=colour, markersize=3.5, linewidth=1.6)
    # The legend names the run once: its validation style where there is one.
    axis.plot([], [], "o-" if len(validation) else "-", color=colour, markersize=4, linewidth=1.8, label=name)


def _frame_curves(axes, runs: list[tuple[np.ndarray, np.ndarray]]) -> None:
    values = np.concatenate([_smooth(training[:, 1]) for training, _ in runs] + [points[:, 1] for _, points in runs])
    values = values[np.isfinite(values)]
    if len(values):
        # The first steps fall from log(vocabulary): cut them off, or nothing else is seen.
        top = np.quantile(values, 0.97)
        room = 0.05 * max(top - values.min(), 1e-3)
        axes[0].set_ylim(values.min() - room, top + room)
    axes[0].set_ylabel("loss [nats]", color=INK)
    axes[0].legend(frameon=False, fontsize=9, labelcolor=INK)
    if len(axes) > 1:
        axes[1].set_title("validation loss, second half", fontsize=10, color=INK)
        axes[0].set_title("validation (markers) and training (faint) loss", fontsize=10, color=INK)
    for axis in axes:
        axis.set_xlabel("step", color=INK)
        frame_axis(axis, labelsize=8.5)
