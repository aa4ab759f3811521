"""Experiment trackers: the log of a run, row by row, to TensorBoard, Weights & Biases, MLflow or a function of yours.

A tracker is any function of `(values, step)`. `wandb.log`, `mlflow.log_metrics` and the `log` of accelerate's trackers
are such functions and are passed as they are, after their own `init` or `start_run`.
"""

import os
from collections.abc import Callable
from typing import Any

from gohgraph.common.packages import needs

# Called with the numbers of a row of the log by name, without those that are missing, and its step.
Tracker = Callable[[dict[str, float], int], Any]


def track(tracker: Tracker | None, row: dict[str, Any]) -> None:
    """Passes a row of the log to a tracker.

    Example:
        >>> track(print, {"step": 20, "loss": 1.5, "validation_loss": None})
        {'loss': 1.5} 20
    """
    if tracker is not None:
        tracker({name: value for name, value in row.items() if name != "step" and value is not None}, row["step"])


class TensorBoard:
    """A tracker that writes scalars to TensorBoard, and its writer for more, such as `gohgraph.log_head_graphs`.

    A resumed run takes back what an interrupted one wrote after its last checkpoint.

    Args:
        folder: of the event files, made with the first row, for which tensorboard must be installed.

    Example:
        >>> import tempfile
        >>> tracker = TensorBoard(tempfile.mkdtemp())
        >>> tracker({"loss": 1.5}, 20)
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = folder
        self._writer: Any = None

    def __call__(self, values: dict[str, float], step: int) -> None:
        """Writes values of a step."""
        writer = self.writer(step)
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    def writer(self, step: int) -> Any:
        """Returns the `SummaryWriter`; the first call takes back everything from `step` on that is there already."""
        if self._writer is None:
            with needs("the package tensorboard to write to it", "tensorboard"):
                from torch.utils.tensorboard import SummaryWriter
            self._writer = SummaryWriter(str(self.folder), purge_step=step)
        return self._writer
