"""The folder of a run: its configuration, log and checkpoints."""

import csv
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gohgraph.common.checks import there
from gohgraph.common.files import make_folder, read_json, write_whole
from gohgraph.common.files import write_text_whole as write_text
from gohgraph.graphs.site_config import upgraded
from gohgraph.learning.train_config import BEFORE, FREE_ON_RESUME, TrainConfig
from gohgraph.models.config import with_settings_of_before

CONFIG, LOG, CURVES, CHECKPOINTS, STATE = "config.json", "log.csv", "curves.png", "checkpoints", "trainer.json"
# Sections that a run need not have been started with.
FOR_READERS = {"flags", "model_type"}
COLUMNS = ("step", "loss", "validation_loss", "lr", "tokens_per_second", "seconds")


class RunFolder:
    """A run on disk; whatever stops it leaves files that can be read and resumed.

    Args:
        path: the folder.
        settings: what defines the run, as JSON values: `{"training": TrainConfig.to_dict(), ...}`. The section
            `"flags"` is what `--resume` repeats, `"model_type"` by which transformers knows the folder; all others must
            be equal when the run is resumed.

    Attributes:
        rows: the log so far.
    """

    def __init__(self, path: str | os.PathLike[str], settings: dict[str, Any]) -> None:
        self.path, self.settings = Path(path), settings
        self.rows: list[dict[str, Any]] = []
        self.columns = list(COLUMNS)

    def open(self, *, resume: bool) -> None:
        """Makes the folder and writes config.json; a run that is there already must be the same and resumed."""
        file = self.path / CONFIG
        if resume:
            self._check_same(file)
        elif file.exists():
            raise ValueError(
                f"Expected a folder without a run (got {self.path}, which holds one). Do resume it, or choose another."
            )
        make_folder(self.path / CHECKPOINTS)
        write_text(file, json.dumps(self.settings, indent=2))

    def log(self, row: dict[str, Any]) -> None:
        """Appends a row to log.csv; a column not seen before is added to the header."""
        self.rows.append(row)
        new = [name for name in row if name not in self.columns]
        if new or len(self.rows) == 1:
            self.columns += new
            write_whole(self.path / LOG, self._write_log)
        else:
            with open(self.path / LOG, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns).writerow(row)

    def read_log(self, *, until: int) -> None:
        """Reads the log up to a step into `rows` and cuts off what came after it."""
        file = self.path / LOG
        if not file.exists():
            return
        with open(file, newline="", encoding="utf-8") as lines:
            reader = csv.DictReader(lines)
            self.columns = list(reader.fieldnames or COLUMNS)
            rows = [{name: _number(text) for name, text in row.items()} for row in reader]
        self.rows = [row for row in rows if there(row["step"]) <= until]
        write_whole(self.path / LOG, self._write_log)

    def checkpoints(self) -> list[Path]:
        """The finished checkpoints, oldest first."""
        return sorted(self.path.glob(f"{CHECKPOINTS}/step-*"), key=lambda path: int(path.name.split("-")[1]))

    def pending_checkpoint(self) -> Path:
        """Where the next checkpoint is written before it is moved to its place; emptied."""
        pending = self.path / CHECKPOINTS / ".new"
        shutil.rmtree(pending, ignore_errors=True)
        pending.mkdir()
        return pending

    def commit_checkpoint(self, step: int, state: dict[str, Any], *, keep: int) -> Path:
        """Moves the pending checkpoint to `checkpoints/step-000500` and deletes all but the last `keep`."""
        pending, final = self.path / CHECKPOINTS / ".new", self.path / CHECKPOINTS / f"step-{step:06d}"
        (pending / STATE).write_text(json.dumps({"step": step, **state, "settings": self.settings}, indent=2))
        # Only the same step of the same run can be there, and only if that one could not be read.
        shutil.rmtree(final, ignore_errors=True)
        os.replace(pending, final)
        for old in self.checkpoints()[:-keep]:
            shutil.rmtree(old)
        return final

    def _check_same(self, file: Path) -> None:
        if not file.is_file():
            raise ValueError(
                f"Expected a run to resume in {self.path} (got no {CONFIG} there). Do start one, or name its folder."
            )
        saved = upgraded(read_json(file, remedy="restore the file"))
        if isinstance(saved, dict) and isinstance(saved.get("training"), dict):
            # A setting that is younger than the run had the value that it was given afterwards, or its default.
            saved["training"] = {**TrainConfig(steps=1).to_dict(), **BEFORE, **saved["training"]}
            saved = with_settings_of_before(saved)
        differing = sorted(_differences(saved, json.loads(json.dumps(self.settings))))
        if differing:
            raise ValueError(
                f"Expected the configuration the run in {self.path} was started with (got "
                f"{'; '.join(differing)}). Do resume with the same values, or start a new run."
            )

    def _write_log(self, path: Path) -> None:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)


def new_folder(path: Path) -> Path:
    """Returns `path`, or the first of path-2, path-3, ... that is not there yet."""
    number = 1
    while (free := path if number == 1 else path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return free


def last_folder(path: Path) -> Path:
    """Returns the folder `new_folder` gave out last; `path` when there is none."""
    number, last = 2, path
    while (later := path.with_name(f"{path.name}-{number}")).exists():
        number, last = number + 1, later
    return last


def runs_in(folder: Path) -> set[Path]:
    """Returns the run folders at and below a folder."""
    runs = {path.parent for path in folder.rglob(CONFIG) if CHECKPOINTS not in path.parts}
    return {path for path in runs if path.name != "model"}


def step_seconds(rows: Sequence[dict[str, Any]]) -> list[float]:
    """Returns the mean time of a step, in seconds, between each row of a log and the one before.

    Example:
        >>> step_seconds([{"step": 10, "seconds": 5.0}, {"step": 20, "seconds": 9.0}])
        [0.5, 0.4]
    """
    before = [{"step": 0, "seconds": 0.0}, *rows]
    pairs = zip(before, rows, strict=False)
    return [(row["seconds"] - last["seconds"]) / (row["step"] - last["step"]) for last, row in pairs]


def _number(text: str | None) -> float | None:
    if text in ("", None):
        return None
    return int(text) if text.isdigit() else float(text)


def _differences(saved: Any, given: Any, name: str = "") -> Iterable[str]:
    if isinstance(saved, dict) and isinstance(given, dict):
        for key in saved.keys() | given.keys():
            if name or key not in FOR_READERS:
                if key not in FREE_ON_RESUME or name != "training":
                    inner = f"{name}.{key}" if name else key
                    yield from _differences(saved.get(key), given.get(key), inner)
    elif saved != given:
        yield f"{name} = {given!r} for {saved!r}"
