"""A server and all its clients on one machine."""

import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from gohgraph.common.checks import check_choice, check_int
from gohgraph.learning.federated.flower import (
    ClientApp,
    Context,
    Error,
    Grid,
    Message,
    RecordDict,
    ServerApp,
    UserConfig,
)

BACKENDS = ("inline", "ray")
T = TypeVar("T")


def simulate(
    serve: Callable[[Grid], T], client: ClientApp, num_clients: int, *, backend: str = "inline", cpus: int | None = None
) -> T:
    """Runs a federation on one machine.

    - `"inline"`: clients answer one after another in this process. Nothing is started or pickled and a debugger stops
      in clients: for small models, tests and faults.
    - `"ray"`: Flower's own simulation, clients side by side in worker processes; it takes some ten seconds to start.
      Flower does not replace a worker that is killed: from then on, clients that are given to it fail as well.

    Both give the same numbers to rounding.

    Args:
        serve: the server: called with the grid, e.g. a call of `federate`.
        client: of `client_app`.
        num_clients: C >= 1; `partition-id` of a client's context is its number.
        backend: one of the above.
        cpus: clients that run at the same time on Ray; `None` for one on every core.

    Returns what `serve` returns and raises what it raises; what a client raises is a reply with an error.
    """
    check_choice("backend", backend, BACKENDS)
    check_int("num_clients", num_clients, low=1)
    if backend == "inline":
        return serve(InlineGrid(client, num_clients))
    # Flower reports every simulation to its makers unless told otherwise.
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    from flwr.simulation import run_simulation

    results: list[T] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        results.append(serve(grid))

    started = {"num_cpus": cpus or os.cpu_count(), "include_dashboard": False}
    config: dict[str, Any] = {"init_args": started, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, client, num_clients, backend_name="ray", backend_config=config)
    return results[0]


class InlineGrid(Grid):
    """A Flower grid whose clients answer at once, in this process, in the order of the messages.

    Args:
        client: answers for every node, each with a context of its own.
        num_clients: C; nodes are numbered from 1, `partition-id` from 0.
    """

    def __init__(self, client: ClientApp, num_clients: int) -> None:
        from flwr.supercore.task_identity import TaskIdentity

        # Messages carry who made them; outside of Flower's own processes nobody has said so yet.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0
        self.client = client
        self.contexts: dict[int, Context] = {}
        for number in range(num_clients):
            config = UserConfig({"partition-id": number, "num-partitions": num_clients})
            context = Context(1, number + 1, config, state=RecordDict(), run_config=UserConfig({}))
            self.contexts[number + 1] = context
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Any) -> None:
        """Does nothing: there is one run."""

    @property
    def run(self) -> Any:
        """There is no record of the run."""
        return None

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Returns a message for a client."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Returns the numbers of all nodes."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Has the messages answered and returns their numbers."""
        pushed = []
        for message in messages:
            pushed.append(str(len(self._replies)))
            self._replies[pushed[-1]] = self._answer(message)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Returns the replies to messages pushed before."""
        return [self._replies[number] for number in message_ids]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Returns the replies to messages; there is nothing to wait for."""
        return [self._answer(message) for message in messages]

    def _answer(self, message: Message) -> Message:
        try:
            return self.client(message, self.contexts[message.metadata.dst_node_id])
        # Flower answers for a client that raises, too.
        except Exception as error:
            return Message(Error(code=0, reason=f"{type(error).__name__}: {error}"), reply_to=message)
