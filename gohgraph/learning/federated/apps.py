"""The client as a Flower app: tensors to messages and back."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor

from gohgraph.learning.federated.client import Client
from gohgraph.learning.federated.flower import (
    Array,
    ArrayRecord,
    ClientApp,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)

logger = logging.getLogger(__name__)
ARRAYS, METRICS, CONFIG, SENDER = "arrays", "metrics", "config", "client"
# Weights of a client in averages: n_k, or the same for all, as differential privacy needs.
BY_EXAMPLES, UNIFORM = "num-examples", "participants"


def client_app(build: Callable[[Context], Client], mods: Sequence[Callable] = ()) -> ClientApp:
    """Returns a Flower app of a client.

    Args:
        build: makes the client of a Flower context: its number is `context.node_config["partition-id"]`. Called for
            every message, for Flower may answer each in another process; for simulation on Ray it must pickle.
        mods: Flower's modifiers of training, e.g. `flwr.clientapp.mod.LocalDpMod` or `fixedclipping_mod` for
            differential privacy.

    Example:
        >>> import tempfile
        >>> from gohgraph.learning.federated import server, sharing, simulation
        >>> from gohgraph.learning.train_config import TrainConfig
        >>> def build(context):
        ...     model, x = torch.nn.Linear(3, 1), torch.ones(5, 3) * context.node_config["partition-id"]
        ...     loss = lambda model, x: (model(x) - 1).square().mean()
        ...     config = TrainConfig(steps=6, learning_rate=0.1, device="cpu")
        ...     return Client(
        ...         model, sharing.SHARINGS["full"], lambda step: x, loss, config, rounds=3, num_examples=len(x))
        >>> initial = {"weight": torch.zeros(1, 3), "bias": torch.zeros(1)}
        >>> rows = simulation.simulate(
        ...     lambda grid: server.federate(grid, initial, tempfile.mkdtemp(), rounds=3), client_app(build), 2)
        >>> [row["clients"] for row in rows], rows[-1]["loss"] < rows[0]["loss"]
        ([2, 2, 2], True)
    """
    app = ClientApp()

    def fit(client: Client, message: Message) -> dict[str, ArrayRecord | MetricRecord]:
        update, metrics = client.fit(to_tensors(message.content.array_records[ARRAYS]), _round(message))
        return {ARRAYS: to_arrays(update), METRICS: _metrics(client, metrics)}

    def measure(client: Client, message: Message) -> dict[str, ArrayRecord | MetricRecord]:
        shared = to_tensors(message.content.array_records[ARRAYS])
        return {METRICS: _metrics(client, client.measure(shared, _round(message)))}

    app.train(mods=list(mods))(partial(_answer, build, fit))
    app.evaluate()(partial(_answer, build, measure))
    return app


def to_arrays(state: Mapping[str, Tensor]) -> ArrayRecord:
    """Returns tensors as Flower sends them: float32, by name.

    Example:
        >>> to_arrays({"weight": torch.zeros(3, 2)})["weight"].shape
        (3, 2)
    """
    return ArrayRecord({name: Array(tensor.detach().float().cpu().numpy()) for name, tensor in state.items()})


def to_tensors(arrays: ArrayRecord) -> dict[str, Tensor]:
    """Returns what Flower sent as tensors, by name."""
    return {name: torch.from_numpy(array.numpy()) for name, array in arrays.items()}


def _round(message: Message) -> int:
    return int(cast(int, message.content.config_records[CONFIG]["server-round"]))


def _metrics(client: Client, metrics: Mapping[str, float]) -> MetricRecord:
    return MetricRecord({**metrics, BY_EXAMPLES: float(client.num_examples), UNIFORM: 1.0})


def _answer(build: Callable[[Context], Client], work: Callable, message: Message, context: Context) -> Message:
    number = int(context.node_config.get("partition-id", -1))
    try:
        records = work(build(context), message)
    # The server is told in one line what went wrong here; the rest is for this client's own log.
    except Exception as error:
        logger.exception("client %d", number)
        return Message(Error(code=0, reason=f"client {number}: {type(error).__name__}: {error}"), reply_to=message)
    return Message(RecordDict({**records, SENDER: ConfigRecord({"partition-id": number})}), reply_to=message)
