"""A contest of models: each at the best point of a grid of learning rates, over several seeds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gohgraph.common.files import make_folder
from gohgraph.learning.contests.grid import Grid, Point, best_points
from gohgraph.learning.contests.in_turns import VALIDATION_LOSS, InTurns
from gohgraph.learning.contests.rates import rates_table
from gohgraph.learning.contests.results import Result, by_model, results_table, verdict
from gohgraph.learning.contests.runs import Run, Runner
from gohgraph.learning.loop import Training
from gohgraph.learning.run_folder import runs_in, write_text
from gohgraph.parallel.ranks import on_first_rank

__all__ = ["Contest", "Result", "Run", "by_model", "results_table", "verdict"]

Start = Callable[[Any, int, float, Path], Training]
Finish = Callable[[Training, Path], Result]


@dataclass(frozen=True)
class Contest:
    """Models that are trained alike: the first seed searches a grid, the others train at the best point of each model.

    The best point has the lowest validation loss at the end of training; one at which the loss does not stay finite is
    the worst. `Grid` says how it is searched. Who trains them is a runner: `InTurns`, as `run` does, or `InProcesses`.

    Args:
        models: what to train by name, usually configurations.
        seeds: one run of every model each.
        grid: of the learning rate and perhaps more, one for all models or one for each by name; of one point nothing is
            chosen.
        folder: where `rates.md` is written, and of the runs that are trained in turns.

    Raises:
        ValueError: a seed is repeated, or there is none.

    Example:
        >>> import tempfile
        >>> from gohgraph.learning.contests.in_processes import InProcesses
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     runner = InProcesses(
        ...         pow, lambda run: {"base": run.rate + run.seed, "exp": 3}, folder, loss=lambda result: result)
        ...     results = Contest({"cube": None}, [0, 1], Grid.of_rates([2.0, 1.0]), Path(folder)).hold(runner)
        <BLANKLINE>
        | loss or error at a rate of |      2 |      1 |
        | -------------------------- | -----: | -----: |
        | cube                       | 8.0000 | 1.0000 |
        <BLANKLINE>
        >>> results[Run("cube", Point.of(learning_rate=1.0), 1)]
        8.0
    """

    models: Mapping[str, Any]
    seeds: Sequence[int]
    grid: Grid | Mapping[str, Grid]
    folder: Path

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"Expected different --seeds (got {list(self.seeds)}). Do name each once.")

    def hold(self, runner: Runner) -> dict[Run, Any]:
        """Has a runner train all models, writes `rates.md` when there is a choice, and returns what it returns.

        Raises:
            ValueError: a model's loss is finite at no point.
            FloatingPointError: a loss does not stay finite where nothing is chosen: at one point, or on a later seed.
        """
        losses: dict[Run, float] = {}
        while runs := self._untried(losses):
            losses |= runner.try_rates(runs)
        best = on_first_rank(partial(self._choose, losses))
        return runner.train([Run(name, best[name], seed) for seed in self.seeds for name in self.models])

    @property
    def grids(self) -> dict[str, Grid]:
        """The grid of every model."""
        return dict.fromkeys(self.models, self.grid) if isinstance(self.grid, Grid) else dict(self.grid)

    def run(
        self, start: Start, finish: Finish, *, resume: bool = False, chosen_by: str = VALIDATION_LOSS
    ) -> dict[tuple[int, str], Result]:
        """Trains all models, those of a seed in turns; raises what `hold` does.

        A run lies in `folder/seed-0/rate-0.01/name`, of which only those parts are there that there are several of.

        Args:
            start: `(model, seed, rate, leaf)` to the training in that leaf of the folder.
            finish: `(training, leaf)` to its results, called in the main process for the best point of every model.
            resume: the runs in the folder must be among these.
            chosen_by: what the training's `evaluate` returns to choose rates by, perhaps on other data than `finish`
                reports on.

        Returns:
            The results by seed and name, each with its `learning_rate` and `leaf`, its place in the folder.
        """
        if resume and not runs_in(self.folder) <= self._leaves():
            raise ValueError(
                f"Expected the --compare, --seeds and --learning-rates of the run in {self.folder} (got others). "
                "Do repeat them."
            )

        def begin(run: Run) -> Training:
            return start(self.models[run.name], run.seed, run.rate, self.folder / self._leaf(run))

        def end(training: Training, run: Run) -> Result:
            leaf = self._leaf(run)
            return {**finish(training, self.folder / leaf), "learning_rate": run.rate, "leaf": leaf}

        results = self.hold(InTurns(begin, end, chosen_by))
        return {(run.seed, run.name): result for run, result in results.items()}

    def _untried(self, losses: Mapping[Run, float]) -> list[Run]:
        """The runs that the searches of all models need next."""
        runs = []
        for name, grid in self.grids.items():
            tried = {run.point: loss for run, loss in losses.items() if run.name == name}
            runs += [Run(name, point, self.seeds[0]) for point in grid.next_points(tried)]
        return runs

    def _leaves(self) -> set[Path]:
        points = [(name, point) for name, grid in self.grids.items() for point in grid.points]
        return {self.folder / self._leaf(Run(name, point, seed)) for name, point in points for seed in self.seeds}

    def _leaf(self, run: Run) -> str:
        has_choice = len(self.grids[run.name].points) > 1
        parts = [f"seed-{run.seed}"] * (len(self.seeds) > 1) + [f"rate-{run.point}"] * has_choice
        return "/".join(parts + [run.name] * (len(self.models) > 1)) or "."

    def _choose(self, losses: Mapping[Run, float]) -> dict[str, Point]:
        """Writes what all points have led to and returns the best of every model."""
        by_point = {(run.name, run.point): loss for run, loss in losses.items()}
        if by_point:
            table = rates_table(by_point) + "\n"
            make_folder(self.folder)
            write_text(self.folder / "rates.md", table)
            print(f"\n{table}")
        return best_points(self.grids, by_point)
