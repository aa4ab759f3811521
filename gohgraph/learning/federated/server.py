"""The rounds of a federated run, with a run folder."""

import json
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from gohgraph.drawing import draw_curves
from gohgraph.learning.federated.apps import to_arrays, to_tensors
from gohgraph.learning.federated.flower import ArrayRecord, FedAvg, Grid, Strategy
from gohgraph.learning.federated.strategy import Guarded
from gohgraph.learning.interrupts import TrainingInterrupted
from gohgraph.learning.run_folder import CURVES, STATE, RunFolder
from gohgraph.learning.tracking import Tracker, track
from gohgraph.learning.training import Row

WEIGHTS = "shared.safetensors"


def federate(
    grid: Grid,
    initial: Mapping[str, Tensor],
    folder: str | os.PathLike[str],
    *,
    rounds: int,
    strategy: Strategy | None = None,
    resume: bool = False,
    settings: Mapping[str, Any] | None = None,
    wait_for: int = 1,
    evaluate_every: int = 1,
    timeout: float = 600.0,
    tracker: Tracker | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> list[Row]:
    r"""Runs rounds of federated learning on the clients of a Flower grid.

    .. math:: w_{r+1} = \sum_k \frac{n_k}{\sum_j n_j} w^k_{r+1}

    over the clients whose update could be used (McMahan et al. 2017, arXiv 1602.05629, algorithm 1); see `Guarded` for
    those whose could not. Every round leaves a checkpoint, and a resumed run has the losses of an uninterrupted one.

    Args:
        grid: Flower's, of a `ServerApp` or of `simulate`.
        initial: shared weights to begin with, of `Sharing.shared_state`.
        folder: the run folder: config.json, log.csv, curves.png and checkpoints.
        rounds: R >= 1.
        strategy: of Flower; `None` for the mean above, of all clients that are connected.
        resume: goes on after the last round in the folder.
        settings: what defines the run, as JSON values, compared on resume.
        wait_for: clients that must have connected before the first round.
        evaluate_every: rounds between evaluations.
        timeout: seconds after which a round goes on without clients that have not answered.
        tracker: as in `train`, called with every row of the log.
        interrupted: asked after every round.

    Returns:
        The log, a row for each round: step (its number), loss (mean over clients), the means of what clients measure
        and, where they measure a `validation_loss`, the `worst` client's; bytes_down, bytes_up and bytes_evaluate of
        all clients together, clients (whose update was used), refused, and seconds.

    Raises:
        ValueError: a folder in use, other settings, a damaged checkpoint.
        TrainingInterrupted: after a round for which `interrupted` was true.
    """
    run = RunFolder(folder, {"rounds": rounds, **(settings or {})})
    run.open(resume=resume)
    shared, done, seconds = _begin(run, initial)
    if strategy is None:
        strategy = FedAvg(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1)
    guard = Guarded(strategy, done=done, last=rounds, evaluate_every=evaluate_every)
    _wait(grid, wait_for)
    bar = tqdm(total=rounds, initial=done, desc=run.path.name, unit="round")
    began = time.perf_counter() - seconds

    def on_round(number: int, arrays: ArrayRecord) -> None:
        if number == 0:
            return
        _keep(run, guard, to_tensors(arrays), time.perf_counter() - began)
        track(tracker, run.rows[-1])
        bar.set_postfix_str(", ".join(f"{name} {value:.4f}" for name, value in guard.report.aggregated.items()))
        bar.update()
        if interrupted() and guard.report.round < rounds:
            raise TrainingInterrupted(f"stopped after round {guard.report.round}")

    with bar:
        if done < rounds:
            guard.start(grid, to_arrays(shared), num_rounds=rounds - done, timeout=timeout, evaluate_fn=on_round)
    if any(row["loss"] is not None for row in run.rows):
        draw_curves({run.path.name: run.rows}, run.path / CURVES)
    return run.rows


def last_weights(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Returns the shared weights after the last round in a run folder, which must hold one."""
    checkpoints = RunFolder(folder, {}).checkpoints()
    if not checkpoints:
        raise ValueError(f"Expected the run folder of a federated run (got {folder} without checkpoints). Do name one.")
    return load_file(checkpoints[-1] / WEIGHTS)


def _begin(run: RunFolder, initial: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], int, float]:
    checkpoints = run.checkpoints()
    if not checkpoints:
        run.read_log(until=0)
        return initial, 0, 0.0
    try:
        state = json.loads((checkpoints[-1] / STATE).read_text(encoding="utf-8"))
        shared, done, seconds = load_file(checkpoints[-1] / WEIGHTS), state["step"], state["seconds"]
    # safetensors and JSON each have errors of their own for a damaged file.
    except Exception as error:
        raise ValueError(
            f"Expected a whole checkpoint (got {checkpoints[-1]}, which is damaged: {error}). Do delete that folder, "
            "to resume from the one before it."
        ) from error
    run.read_log(until=done)
    return shared, done, seconds


def _wait(grid: Grid, clients: int) -> None:
    with tqdm(total=clients, desc="clients", unit="client", leave=False) as bar:
        while (connected := len(list(grid.get_node_ids()))) < clients:
            bar.update(connected - bar.n)
            time.sleep(0.5)


def _keep(run: RunFolder, guard: Guarded, shared: Mapping[str, Tensor], seconds: float) -> None:
    """Logs a round and writes its checkpoint."""
    report = guard.report
    row = {"step": report.round, "loss": None, "validation_loss": None, **report.aggregated}
    losses = [metrics["validation_loss"] for metrics in report.evaluate.values() if "validation_loss" in metrics]
    row |= {"worst": max(losses)} if losses else {}
    row |= {name: getattr(report, name) for name in ("bytes_down", "bytes_up", "bytes_evaluate")}
    row |= {"clients": len(report.train), "refused": len(report.refused), "seconds": round(seconds, 3)}
    run.log(row)
    save_file(dict(shared), run.pending_checkpoint() / WEIGHTS)
    clients = {"evaluate": report.evaluate, "train": report.train, "refused": report.refused}
    run.commit_checkpoint(report.round, {"seconds": seconds, **clients}, keep=2)
