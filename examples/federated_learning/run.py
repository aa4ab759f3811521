"""Trains a language model on clients whose texts differ: all weights shared, head graphs, LoRA, or personal graphs.

    python examples/federated_learning/run.py
    python examples/federated_learning/run.py --methods full personal-graph --alpha 0.1 --seeds 0 1 2
    python examples/federated_learning/run.py --methods lora --faults            # two clients fail, six go on
    python examples/federated_learning/run.py --methods lora --dp-noise 0.3 --dp-clip 1.0
    python examples/federated_learning/run.py --methods graph --backend ray      # Flower's simulation

A small language model is trained on Python's documentation. Eight clients hold Python sources, C++ headers, Unicode
names and licences, each kind dealt out by a Dirichlet distribution, so that their texts differ in kind and size. In
every round each client trains some steps on its own text, and the server averages what it is sent, weighted by bytes
of text. "full" shares the whole model; "personal-graph" all but the head graph, which stays on the client; "graph" and
"lora" share only a head graph, or low-rank updates of as many parameters, over the frozen base; "lora-personal-graph"
has half of each; "local-graph" and "local" share nothing. The table shows loss and accuracy against bytes. A method
takes about half a minute on one thread. Expected (docs/results.md): personal graphs do as well as sharing all; adapters
cost a 20th of the bytes and learn less, LoRA more than a head graph; without federation the worst client is far behind.

The run folder holds the base, a folder for every method with its log and checkpoints, curves.png and table.md. Ctrl-C
stops it after the round; the same command with --resume goes on.

As separate processes, on one machine or several, each line in a terminal of its own; `flwr` finds the server by
~/.flwr/config.toml:

    [superlink.local]
    address = "127.0.0.1:9500"
    insecure = true

    flower-superlink --insecure --port 9500 --disable-runtime-dependency-installation
    flower-supernode --insecure --superlink 127.0.0.1:9500 --port 9600 --node-config "partition-id=0 num-partitions=2"
    flower-supernode --insecure --superlink 127.0.0.1:9500 --port 9601 --node-config "partition-id=1 num-partitions=2"
    flwr run examples/federated_learning local --stream --run-config "folder='$PWD/runs/processes' clients=2"

More --run-config: base='...' (a folder like runs/federated/base/model; the same on every machine), method='lora',
rounds=20, resume=true, timeout=60.0 (seconds that a round waits for a client). Settings and defaults: pyproject.toml.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from federation import BASE, KINDS, Settings, make_client, make_shared, measure, parameters_of, split

from gohgraph import LanguageModel, TransformerConfig
from gohgraph.common.command_line import ArgumentParser, run
from gohgraph.common.tables import markdown_table, mean_and_deviation
from gohgraph.drawing import draw_curves
from gohgraph.learning.cli.experiment import (
    add_run_flags,
    add_size_flags,
    add_training_flags,
    can_resume,
    fill_sizes,
    open_folder,
    resumable,
    train_config,
)
from gohgraph.learning.data.corpus import sample_batch
from gohgraph.learning.data.domains import load_domain
from gohgraph.learning.federated.sharing import SHARINGS
from gohgraph.learning.interrupts import interrupts
from gohgraph.learning.loop import train
from gohgraph.learning.regimes.language import VOCAB_SIZE, next_token_output
from gohgraph.learning.run_folder import write_text

SIZES = ("d_model", "num_heads", "num_layers", "d_ff", "length", "batch_size", "base_steps", "rounds", "local_steps")
SIZES += ("windows", "limit")
FULL = dict(zip(SIZES, (64, 8, 3, 256, 64, 8, 600, 20, 6, 64, 500_000), strict=True))
SMOKE = dict(zip(SIZES, (16, 4, 1, 8, 16, 4, 6, 3, 2, 4, 20_000), strict=True))
METHODS, UNTOUCHED = tuple(SHARINGS), "base, untouched"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    return run(_parser(), partial(_main, argv), argv)


def _main(argv: list[str], flags: argparse.Namespace) -> None:
    fill_sizes(flags, FULL, SMOKE)
    if flags.in_degree < 2 or flags.in_degree > flags.num_heads or flags.in_degree % 2:
        raise ValueError(f"Expected an even --in-degree of 2..{flags.num_heads} (got {flags.in_degree}). Do change it.")
    if (flags.dp_noise is None) != (flags.dp_clip is None):
        raise ValueError("Expected --dp-noise and --dp-clip together (got one). Do pass both.")
    if flags.dp_noise is not None and not (flags.dp_noise >= 0 and flags.dp_clip > 0):
        raise ValueError(f"Expected noise >= 0 and a clip > 0 (got {flags.dp_noise}, {flags.dp_clip}). Do change it.")
    folder = open_folder(flags, "federated")
    results = {}
    with resumable("federated_learning/run", argv, folder):
        for seed in flags.seeds:
            place = (folder / f"seed-{seed}" if len(flags.seeds) > 1 else folder).resolve()
            _train_base(flags, seed, place / "base")
            results[seed, UNTOUCHED] = _measure_base(_settings(flags, seed, place, flags.methods[0]))
            for method in flags.methods:
                results[seed, method] = _federate(_settings(flags, seed, place, method), flags)
    _report(results, folder, flags)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add_run_flags(parser, "federated")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    add("--clients", type=int, default=8, help="default %(default)s")
    add("--alpha", type=float, default=0.3, help="of the Dirichlet split; small: clients differ (default %(default)s)")
    add("--in-degree", type=int, default=4, help="of the head graph, a ring (default %(default)s)")
    add("--base-learning-rate", type=float, default=2e-3, help="of the model they begin with (default %(default)s)")
    add("--client-learning-rate", type=float, default=0.0, help="default: the method's own")
    add("--evaluate-every", type=int, default=5, help="rounds between evaluations (default %(default)s)")
    add("--backend", choices=("inline", "ray"), default="inline", help="in this process, or Flower's simulation")
    add("--faults", action="store_true", help="client 0 fails and client 1 sends NaN in every round")
    add("--dp-noise", type=float, help="noise multiplier of differential privacy (with --dp-clip)")
    add("--dp-clip", type=float, help="largest norm of a client's update")
    add_size_flags(parser, FULL)
    add_training_flags(parser)
    return parser


def _settings(flags: argparse.Namespace, seed: int, place: Path, method: str) -> Settings:
    given = {field.name: getattr(flags, field.name, None) for field in dataclasses.fields(Settings)}
    own = {"folder": str(place / method), "base": str(place / "base" / "model"), "method": method, "seed": seed}
    return Settings(**{**given, **own, "learning_rate": flags.client_learning_rate})


def _train_base(flags: argparse.Namespace, seed: int, folder: Path) -> None:
    """Trains and saves the model that all methods begin with."""
    text = load_domain(BASE, limit=flags.limit)
    torch.manual_seed(seed)
    shape = {name: getattr(flags, name) for name in ("d_model", "num_heads", "num_layers", "d_ff")}
    model = LanguageModel(TransformerConfig(VOCAB_SIZE, **shape))
    train(
        model,
        partial(sample_batch, text.train, seed=seed, batch_size=flags.batch_size, length=flags.length),
        next_token_output,
        train_config(flags, seed, flags.base_learning_rate, steps=flags.base_steps, device="cpu"),
        folder,
        evaluate=lambda model: measure(model, text.validation, flags),
        resume=can_resume(folder, flags),
        settings={"model": model.config.to_dict(), "flags": vars(flags)},
        description=f"base: {BASE}",
    )
    model.save_pretrained(folder / "model")


def _measure_base(settings: Settings) -> dict[str, Any]:
    """Shows what text each client has, and measures what all begin with there."""
    shares, shared = split(settings)[1], make_shared(settings)
    rows = [[str(number), *(f"{int(count):,}" for count in row)] for number, row in enumerate(shares)]
    print("bytes of text on each client\n\n" + markdown_table([["client", *KINDS], *rows]) + "\n")
    clients = [make_client(settings, number) for number in range(settings.clients)]
    measured, total = [client.measure(shared, 0) for client in clients], sum(client.num_examples for client in clients)
    row: dict[str, float] = {"bytes_down": 0, "bytes_up": 0, "worst": max(one["validation_loss"] for one in measured)}
    for client, one in zip(clients, measured, strict=True):
        for name, value in one.items():
            row[name] = row.get(name, 0.0) + value * client.num_examples / total
    return {"parameters": 0, "rows": [row]}


def _federate(settings: Settings, flags: argparse.Namespace) -> dict[str, Any]:
    """Runs a method; returns its log and sizes."""
    from gohgraph.learning.federated.apps import client_app
    from gohgraph.learning.federated.server import federate
    from gohgraph.learning.federated.simulation import simulate

    # Flower tells every round at length, from its import on.
    logging.getLogger("flwr").setLevel(logging.WARNING)
    folder = Path(settings.folder)
    client = client_app(partial(_build, settings), mods=[_faulty] if flags.faults else [])
    with interrupts() as interrupted:
        rows = simulate(
            lambda grid: federate(
                grid,
                make_shared(settings),
                folder,
                rounds=settings.rounds,
                strategy=_strategy(flags),
                evaluate_every=flags.evaluate_every,
                resume=can_resume(folder, flags),
                settings={**settings.to_dict(), "privacy": [flags.dp_noise, flags.dp_clip], "flags": vars(flags)},
                wait_for=settings.clients,
                interrupted=interrupted.is_set,
            ),
            client,
            settings.clients,
            backend=flags.backend,
        )
    result = {"method": settings.method, "parameters": parameters_of(settings), "rows": rows}
    write_text(folder / "result.json", json.dumps(result, indent=2))
    return result


def _build(settings: Settings, context: Any) -> Any:
    return make_client(settings, int(context.node_config["partition-id"]))


def _strategy(flags: argparse.Namespace) -> Any:
    """Returns the weighted mean, or the plain mean of clipped updates with noise."""
    from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg

    if flags.dp_noise is None:
        return None
    # Privacy is that of a client: none may weigh more than another.
    mean = FedAvg(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1, weighted_by_key="participants")
    return DifferentialPrivacyServerSideFixedClipping(mean, flags.dp_noise, flags.dp_clip, flags.clients)


def _faulty(message: Any, context: Any, call_next: Any) -> Any:
    """A Flower modifier: what can go wrong on a client."""
    from gohgraph.learning.federated.flower import Array, ArrayRecord

    number = context.node_config["partition-id"]
    if number == 0:
        raise RuntimeError("this client has died")
    reply = call_next(message, context)
    if number == 1:
        arrays = {name: Array(array.numpy() * float("nan")) for name, array in reply.content["arrays"].items()}
        reply.content["arrays"] = ArrayRecord(arrays)
    return reply


def _report(results: dict[tuple[int, str], dict[str, Any]], folder: Path, flags: argparse.Namespace) -> None:
    """Prints and writes the table: means over seeds, with their standard deviations."""

    def last(method: str, key: str, digits: int = 3) -> str:
        values = [results[seed, method]["rows"][-1].get(key) for seed in flags.seeds]
        return "" if None in values else mean_and_deviation(values, digits)

    def traffic(method: str) -> str:
        row = results[flags.seeds[0], method]["rows"][-1]
        return f"{(row['bytes_down'] + row['bytes_up']) / flags.clients / 1000:,.1f}"

    head = ["method", "trained by a client", "kB a client and round", "loss", "worst client's", "accuracy"]
    rows = [
        [
            method,
            f"{results[flags.seeds[0], method]['parameters']:,}",
            traffic(method),
            last(method, "validation_loss"),
            last(method, "worst"),
            last(method, "accuracy"),
        ]
        for method in (UNTOUCHED, *flags.methods)
    ]
    table = markdown_table([head, *rows]) + "\n"
    write_text(folder / "table.md", table)
    histories = {method: results[flags.seeds[0], method]["rows"] for method in flags.methods}
    if all(any(row["loss"] is not None for row in rows) for rows in histories.values()):
        draw_curves(histories, folder / "curves.png")
    print(f"\n{table}\nloss in nats per byte, mean over clients by bytes of text; written: {folder / 'table.md'}")


if __name__ == "__main__":
    sys.exit(main())
