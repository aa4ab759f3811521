"""Server and clients as Flower apps, for separate processes; `run.py` says how they are started."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from federation import Settings, make_client, make_shared

from gohgraph.learning.federated.apps import client_app
from gohgraph.learning.federated.client import Client
from gohgraph.learning.federated.flower import Context, Grid, ServerApp
from gohgraph.learning.federated.server import federate


def settings_of(context: Context) -> Settings:
    """Reads the run's configuration: the fields of `Settings` with dashes, defaults in pyproject.toml."""
    given: dict[str, Any] = {name.replace("-", "_"): value for name, value in context.run_config.items()}
    return Settings(**{field.name: given[field.name] for field in dataclasses.fields(Settings) if field.name in given})


def build(context: Context) -> Client:
    """Makes the client of a node: `partition-id` in its --node-config is its number."""
    return make_client(settings_of(context), int(context.node_config["partition-id"]))


client = client_app(build)
server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Waits until all clients have connected, and runs the rounds."""
    settings = settings_of(context)
    federate(
        grid,
        make_shared(settings),
        Path(settings.folder) / settings.method,
        rounds=settings.rounds,
        wait_for=settings.clients,
        timeout=float(context.run_config["timeout"]),
        evaluate_every=int(context.run_config["evaluate-every"]),
        resume=bool(context.run_config["resume"]),
        settings=settings.to_dict(),
    )
