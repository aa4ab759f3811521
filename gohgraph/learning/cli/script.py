"""A training script: its flags, its run folder, Ctrl-C and `--resume`."""

import argparse
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from gohgraph.common.command_line import ArgumentParser, given_flags, run
from gohgraph.common.files import read_json
from gohgraph.learning.cli.flags import add_run_flags, add_size_flags, add_training_flags, fill_sizes, train_config
from gohgraph.learning.contests.results import FEWEST_STEPS, too_short
from gohgraph.learning.loop import Training, TrainingInterrupted
from gohgraph.learning.recipes import RECIPES
from gohgraph.learning.run_folder import CONFIG, last_folder, new_folder, runs_in, write_text
from gohgraph.learning.train_config import TrainConfig
from gohgraph.parallel.ranks import lost_ranks, machines, on_first_rank, process_group, under_torchrun, world_size


class Script:
    """A script of `examples/`; a subclass fills the slot `train` and says what is its own.

    Its module's docstring begins with the line that `--help` shows. Bad flags and data are one line and exit code 2;
    Ctrl-C leaves a checkpoint, names the command that goes on, and exits with 130.

    Args:
        flags: as parsed.

    Attributes:
        name: of the script below `examples/`, without its suffix.
        command: what runs it, `None` for the script of that name.
        runs: the run folder is `runs/...` unless `--run` names one.
        full, smoke: sizes of a full run and of `--smoke` by name; each becomes a flag and stands in `flags`.
        weight_decay: where `--weight-decay` does not say otherwise.
        trained: what the flags of training are about, their title in `--help`.
        folder: the run folder, once `train` is called.

    Example:
        >>> class Count(Script):
        ...     name, runs, full, smoke = "count", "count", {"steps": 500}, {"steps": 2}
        ...     def train(self):
        ...         print(self.flags.steps, "steps in", self.folder)
        >>> Count.main(["--smoke", "--run", "somewhere"])
        2 steps in somewhere
        0
    """

    name: ClassVar[str]
    command: ClassVar[str | None] = None
    runs: ClassVar[str]
    full: ClassVar[Mapping[str, Any]]
    smoke: ClassVar[Mapping[str, Any]]
    weight_decay: ClassVar[float] = 0.1
    trained: ClassVar[str] = "training"
    folder: Path

    def __init__(self, flags: argparse.Namespace) -> None:
        self.flags = flags

    @classmethod
    def main(cls, argv: Sequence[str] | None = None) -> int:
        """Runs the command line and returns its exit code."""
        argv = sys.argv[1:] if argv is None else argv
        return run(cls.parser(), lambda flags: cls.run_with(flags, argv), argv)

    @classmethod
    def run_with(cls, flags: argparse.Namespace, argv: Sequence[str]) -> None:
        """Runs with the flags that were parsed of a command line; bad ones raise."""
        cls(flags)._run(argv)

    @classmethod
    def parser(cls) -> ArgumentParser:
        """Returns the parser of all flags."""
        about = sys.modules[cls.__module__].__doc__ or cls.name
        parser = ArgumentParser(description=about.splitlines()[0], allow_abbrev=False)
        cls.add_flags(parser)
        add_run_flags(parser, cls.runs)
        add_size_flags(parser, cls.full)
        add_training_flags(parser, weight_decay=cls.weight_decay, title=cls.trained)
        return parser

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser) -> None:
        """Adds the script's own flags; none by default."""

    def check(self) -> None:
        """Raises `ValueError` for flags that do not fit, before data is read and there is a run folder."""

    def run_name(self) -> str:
        """Returns the name of the run folder below `runs/`."""
        return self.runs

    def train(self) -> None:
        """The slot: trains, and leaves and prints what came of it."""
        raise NotImplementedError

    def seed_folder(self, seed: int) -> Path:
        """Returns where the runs of a seed are: in a sub-folder when there are several seeds."""
        return self.folder / f"seed-{seed}" if len(self.flags.seeds) > 1 else self.folder

    def values(self, *names: str) -> dict[str, Any]:
        """Returns the values of flags by name; by default those that give a transformer its shape, and the recipe's."""
        if names:
            return {name: getattr(self.flags, name) for name in names}
        return self.values("d_model", "num_heads", "num_layers", "d_ff") | RECIPES[self.flags.recipe].model

    def config(self, seed: int, learning_rate: float, **overrides: Any) -> TrainConfig:
        """Returns the training that the flags describe; `overrides` go over them."""
        return train_config(self.flags, seed, learning_rate, **overrides)

    def training(self, *arguments: Any, settings: dict[str, Any], **options: Any) -> Training:
        """Returns a `Training` that `--resume` goes on with; arguments, settings and options are those of `Training`.

        The flags join its settings, and it is described by the name of its folder, the last argument.
        """
        leaf = arguments[-1]
        options = {"description": leaf.name, **options, "settings": {**settings, "flags": vars(self.flags)}}
        return Training(*arguments, resume=can_resume(leaf, self.flags), **options)

    def write_table(self, table: str) -> None:
        """Prints a table, and writes it to table.md; says so where the runs are too short to tell anything."""
        write_text(self.folder / "table.md", table + "\n")
        print(f"\n{table}\n")
        full = self.full.get("steps", FEWEST_STEPS)
        if short := too_short(getattr(self.flags, "steps", full), min(full, FEWEST_STEPS)):
            print(short)

    def _run(self, argv: Sequence[str]) -> None:
        with process_group(self.flags.device):
            if self.flags.resume:
                self._take_flags_of_run(argv)
            fill_sizes(self.flags, self.full, self.smoke)
            self.flags.recipe = self.flags.recipe or "modern"
            self.check()
            self.folder = open_folder(self.flags, self.run_name())
            with resumable(self.command or f"python examples/{self.name}.py", self.folder):
                self.train()

    def _take_flags_of_run(self, argv: Sequence[str]) -> None:
        """Flags that the command line does not give are those of the run; what cannot change is checked later."""
        given = given_flags(self.parser(), argv) | {"run", "resume"}
        for name, value in on_first_rank(self._flags_of_run).items():
            if name not in given and hasattr(self.flags, name):
                setattr(self.flags, name, value)

    def _flags_of_run(self) -> dict[str, Any]:
        folder = _folder_of(self.flags, Path("runs", self.run_name()))
        for leaf in sorted(runs_in(folder)):
            flags = read_json(leaf / CONFIG, "restore it").get("flags", {})
            # Runs from before recipes had names are of the old one.
            return {"recipe": "old", **flags}
        return {}


def open_folder(flags: argparse.Namespace, name: str) -> Path:
    """Returns the run folder: `--run`, or a new `runs/name` or, to resume, the last one, which must hold a run."""
    return on_first_rank(lambda: _open_folder(flags, Path("runs", name)))


def _open_folder(flags: argparse.Namespace, default: Path) -> Path:
    folder = _folder_of(flags, default)
    is_used = folder.is_dir() and any(folder.iterdir())
    if flags.resume and not runs_in(folder):
        raise ValueError(f"Expected a run to resume (got {folder} without one). Do drop --resume, or change --run.")
    if not flags.resume and is_used:
        raise ValueError(f"Expected a new or empty run folder (got {folder}). Do choose another --run, or --resume.")
    return folder


def _folder_of(flags: argparse.Namespace, default: Path) -> Path:
    if flags.run is not None:
        return Path(flags.run)
    return (last_folder if flags.resume else new_folder)(default)


def can_resume(leaf: Path, flags: argparse.Namespace) -> bool:
    """Returns whether `--resume` is given and the run of this folder has begun."""
    return flags.resume and on_first_rank((leaf / "config.json").exists)


@contextmanager
def resumable(command: str, folder: Path) -> Iterator[None]:
    """Names, after Ctrl-C or the loss of a rank, the command that goes on: the run knows its other flags."""
    ranks = world_size()
    start = ["torchrun", "--nproc-per-node", str(ranks // machines()), "--"] if under_torchrun() else []
    program = command.removeprefix("python ") if start else command
    again = shlex.join([*start, *program.split(), "--run", str(folder), "--resume"])
    try:
        with lost_ranks(f"go on from the last checkpoint: {again}"):
            yield
    except TrainingInterrupted as stop:
        raise KeyboardInterrupt(f"{stop}; to go on: {again}") from stop
