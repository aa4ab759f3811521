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
takes about half a minute on one thread. Clients are trained by --recipe and --client-learning-rate; the other flags of
training are the base's. Expected (docs/regimes.md): personal graphs do as well as sharing all; adapters cost a 20th of
the bytes and learn less, LoRA more than a head graph; without federation the worst client is far behind.

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
from gohgraph.common.tables import markdown_table, mean_and_deviation
from gohgraph.drawing import draw_curves
from gohgraph.learning.cli.script import Script, can_resume
from gohgraph.learning.data.corpus import sample_batch
from gohgraph.learning.data.domains import load_domain
from gohgraph.learning.federated.sharing import SHARINGS
from gohgraph.learning.interrupts import interrupts
from gohgraph.learning.loop import train_together
from gohgraph.learning.regimes.language import VOCAB_SIZE, next_token_output
from gohgraph.learning.run_folder import write_text

METHODS, UNTOUCHED = tuple(SHARINGS), "base, untouched"


class FederatedLearning(Script):
    """The base, the rounds of every method, and what they reach for how many bytes."""

    name, runs = "federated_learning/run", "federated"
    trained = "training of the base (of clients: --recipe and --client-learning-rate)"
    full = dict(
        d_model=64, num_heads=8, num_layers=3, d_ff=256, length=64, batch_size=8, base_steps=600, rounds=20,
        local_steps=6, windows=64, limit=500_000,
    )  # fmt: skip
    smoke = dict(
        d_model=16, num_heads=4, num_layers=1, d_ff=8, length=16, batch_size=4, base_steps=6, rounds=3,
        local_steps=2, windows=4, limit=20_000,
    )  # fmt: skip

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
        add("--clients", type=int, default=8, help="default %(default)s")
        differ = "of the Dirichlet split; small: clients differ (default %(default)s)"
        add("--alpha", type=float, default=0.3, help=differ)
        add("--in-degree", type=int, default=4, help="of the head graph, a ring (default %(default)s)")
        add("--base-learning-rate", type=float, default=2e-3, help="of the model they begin with (default %(default)s)")
        add("--client-learning-rate", type=float, default=0.0, help="default: the method's own")
        add("--evaluate-every", type=int, default=5, help="rounds between evaluations (default %(default)s)")
        add("--backend", choices=("inline", "ray"), default="inline", help="in this process, or Flower's simulation")
        add("--faults", action="store_true", help="client 0 fails and client 1 sends NaN in every round")
        add("--dp-noise", type=float, help="noise multiplier of differential privacy (with --dp-clip)")
        add("--dp-clip", type=float, help="largest norm of a client's update")

    def check(self) -> None:
        flags = self.flags
        if flags.in_degree < 2 or flags.in_degree > flags.num_heads or flags.in_degree % 2:
            raise ValueError(
                f"Expected an even --in-degree of 2..{flags.num_heads} (got {flags.in_degree}). Do change it."
            )
        if (flags.dp_noise is None) != (flags.dp_clip is None):
            got = "--dp-clip" if flags.dp_noise is None else "--dp-noise"
            raise ValueError(f"Expected --dp-noise and --dp-clip together (got {got} alone). Do pass both.")
        if flags.dp_noise is not None and not (flags.dp_noise >= 0 and flags.dp_clip > 0):
            raise ValueError(
                f"Expected noise >= 0 and a clip > 0 (got {flags.dp_noise}, {flags.dp_clip}). Do change it."
            )

    def train(self) -> None:
        flags, results = self.flags, {}
        for seed in flags.seeds:
            place = self.seed_folder(seed).resolve()
            self.train_base(seed, place / "base")
            results[seed, UNTOUCHED] = _measure_base(self.settings(seed, place, flags.methods[0]))
            for method in flags.methods:
                results[seed, method] = self.federate(self.settings(seed, place, method))
        self.report(results)

    def settings(self, seed: int, place: Path, method: str) -> Settings:
        """What server and clients agree on."""
        names = [field.name for field in dataclasses.fields(Settings)]
        given: dict[str, Any] = {name: getattr(self.flags, name, None) for name in names}
        given |= {"folder": str(place / method), "base": str(place / "base" / "model"), "method": method, "seed": seed}
        return Settings(**given | {"learning_rate": self.flags.client_learning_rate})

    def train_base(self, seed: int, folder: Path) -> None:
        """Trains and saves the model that all methods begin with."""
        text = load_domain(BASE, limit=self.flags.limit)
        torch.manual_seed(seed)
        model = LanguageModel(TransformerConfig(VOCAB_SIZE, **self.values()))
        training = self.training(
            model,
            partial(sample_batch, text.train, seed=seed, **self.values("batch_size", "length")),
            next_token_output,
            self.config(seed, self.flags.base_learning_rate, steps=self.flags.base_steps, device="cpu"),
            folder,
            evaluate=partial(measure, text=text.validation, **self.values("length", "windows")),
            settings={"model": model.config.to_dict()},
            description=f"base: {BASE}",
        )
        train_together([training])
        model.save_pretrained(folder / "model")

    def federate(self, settings: Settings) -> dict[str, Any]:
        """Runs a method; returns its log and sizes."""
        from gohgraph.learning.federated.apps import client_app
        from gohgraph.learning.federated.server import federate
        from gohgraph.learning.federated.simulation import simulate

        # Flower tells every round at length, from its import on.
        logging.getLogger("flwr").setLevel(logging.WARNING)
        flags, folder = self.flags, Path(settings.folder)
        client = client_app(
            lambda context: make_client(settings, int(context.node_config["partition-id"])),
            mods=[_faulty] if flags.faults else [],
        )
        privacy = [flags.dp_noise, flags.dp_clip]
        with interrupts() as interrupted:
            rows = simulate(
                lambda grid: federate(
                    grid,
                    make_shared(settings),
                    folder,
                    rounds=settings.rounds,
                    strategy=self.strategy(),
                    evaluate_every=flags.evaluate_every,
                    resume=can_resume(folder, flags),
                    settings={**settings.to_dict(), "privacy": privacy, "flags": vars(flags)},
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

    def strategy(self) -> Any:
        """Returns the plain mean of clipped updates with noise; `None` for the weighted mean."""
        from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg

        flags = self.flags
        if flags.dp_noise is None:
            return None
        # Privacy is that of a client: none may weigh more than another.
        mean = FedAvg(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1, weighted_by_key="participants")
        return DifferentialPrivacyServerSideFixedClipping(mean, flags.dp_noise, flags.dp_clip, flags.clients)

    def report(self, results: dict[tuple[int, str], dict[str, Any]]) -> None:
        """Prints and writes the table: means over seeds, with their standard deviations."""
        flags = self.flags
        first = {name: result for (seed, name), result in results.items() if seed == flags.seeds[0]}

        def last(method: str, key: str) -> str:
            values = [results[seed, method]["rows"][-1].get(key) for seed in flags.seeds]
            return "" if None in values else mean_and_deviation(values)

        rows = [["method", "trained by a client", "kB a client and round", "loss", "worst client's", "accuracy"]]
        for method, result in first.items():
            row = result["rows"][-1]
            traffic = (row["bytes_down"] + row["bytes_up"]) / flags.clients / 1000
            measured = (last(method, key) for key in ("validation_loss", "worst", "accuracy"))
            rows.append([method, f"{result['parameters']:,}", f"{traffic:,.1f}", *measured])
        self.write_table(markdown_table(rows))
        histories = {method: first[method]["rows"] for method in flags.methods}
        if all(any(row["loss"] is not None for row in rows) for rows in histories.values()):
            draw_curves(histories, self.folder / "curves.png")
        place = self.folder / "table.md"
        print(f"loss in nats per byte, mean over clients by bytes of text; written: {place}")


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


main = FederatedLearning.main

if __name__ == "__main__":
    sys.exit(main())
