"""What keeps a round alive: replies that would stop or poison it are refused, whatever averages the others."""

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import cast

import numpy as np

from gohgraph.common.checks import check_int
from gohgraph.learning.federated.apps import ARRAYS, BY_EXAMPLES, METRICS, SENDER, UNIFORM
from gohgraph.learning.federated.flower import Array, ArrayRecord, ConfigRecord, Grid, Message, MetricRecord, Strategy

logger = logging.getLogger(__name__)
WEIGHTS = (BY_EXAMPLES, UNIFORM)


@dataclasses.dataclass
class RoundReport:
    """What happened in a round.

    Args:
        round: its number, from 1.
        bytes_down, bytes_up: of the weights in all messages of training, to clients and back.
        bytes_evaluate: of the weights sent out to be evaluated.
        refused: why, for each client whose update was not used, by its name.
        train, evaluate: metrics of each client whose reply was used, by its name.
        aggregated: means of the metrics, as the strategy weighs them; those of evaluation only where there was one.
    """

    round: int
    bytes_down: int = 0
    bytes_up: int = 0
    bytes_evaluate: int = 0
    refused: dict[str, str] = dataclasses.field(default_factory=dict)
    train: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    evaluate: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    aggregated: dict[str, float] = dataclasses.field(default_factory=dict)


class Guarded(Strategy):
    """Wraps any Flower strategy: counts bytes, and passes on only replies that can be averaged.

    A client that raised an error or did not answer in time, or whose weights have other names, shapes or types or are
    not finite, or whose metrics are not, is left out of the round and named in the log; the others go on. Where none is
    left, the shared weights stay as they were. It stands outside of all other wrappers, such as Flower's differential
    privacy, which skip a round with one error and clip what is not finite to NaN. Weights that are finite and wrong
    pass: against those choose a robust strategy, e.g. `flwr.serverapp.strategy.FedMedian` or `Krum`.

    Args:
        strategy: averages, e.g. `flwr.serverapp.strategy.FedAvg`.
        done: rounds that went before, of a run that is resumed.
        last: number of the last round.
        evaluate_every: rounds between evaluations; the last round has one.

    Attributes:
        report: of the round that runs or ran last.
    """

    def __init__(self, strategy: Strategy, *, done: int = 0, last: int | None = None, evaluate_every: int = 1) -> None:
        check_int("evaluate_every", evaluate_every, low=1)
        self.strategy, self.done, self.last, self.evaluate_every = strategy, done, last, evaluate_every
        self.report = RoundReport(done)
        self._reference: dict[str, np.ndarray] = {}
        self._asked: set[int] = set()
        self._silent: set[int] = set()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Returns the messages that ask clients to train."""
        self.report = RoundReport(server_round + self.done)
        self._reference = {name: array.numpy() for name, array in arrays.items()}
        messages = list(self.strategy.configure_train(self.report.round, arrays, config, grid))
        self.report.bytes_down = sum(map(count_bytes, messages))
        self._asked = {message.metadata.dst_node_id for message in messages}
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Returns the new shared weights and the means of metrics; `None` for the weights leaves the old ones."""
        # Of a node that is gone the link says so in its own name: that is no answer, and the node is named below.
        replies = [reply for reply in replies if reply.metadata.src_node_id in self._asked]
        self.report.bytes_up = sum(map(count_bytes, replies))
        self._silent = self._asked - {reply.metadata.src_node_id for reply in replies}
        for node in sorted(self._silent):
            self._refuse(f"node {node}", "no answer in time")
        accepted = self._accepted(replies, self._reference)
        self.report.train = {sender(reply): _measures(reply.content.metric_records[METRICS]) for reply in accepted}
        if not accepted:
            logger.error("round %d: no update could be used; the shared weights stay as they were", self.report.round)
            return None, None
        arrays, metrics = self.strategy.aggregate_train(self.report.round, accepted)
        self.report.aggregated |= _measures(metrics)
        return arrays, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Returns the messages that ask clients to evaluate, but not those that have just been silent."""
        number = server_round + self.done
        if number % self.evaluate_every and number != self.last:
            return []
        messages = list(self.strategy.configure_evaluate(number, arrays, config, grid))
        messages = [message for message in messages if message.metadata.dst_node_id not in self._silent]
        self.report.bytes_evaluate = sum(map(count_bytes, messages))
        return messages

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Returns the means of clients' measures."""
        accepted = self._accepted(list(replies), None)
        self.report.evaluate = {sender(reply): _measures(reply.content.metric_records[METRICS]) for reply in accepted}
        if not accepted:
            return None
        metrics = self.strategy.aggregate_evaluate(self.report.round, accepted)
        self.report.aggregated |= _measures(metrics)
        return metrics

    def summary(self) -> None:
        """Logs the settings of the strategy."""
        self.strategy.summary()

    def _accepted(self, replies: list[Message], reference: Mapping[str, np.ndarray] | None) -> list[Message]:
        """Keeps what can be averaged, in an order that does not depend on who was first: sums round differently."""
        usable = []
        for reply in sorted(replies, key=_place):
            reason = refusal(reply, reference)
            if reason is None:
                usable.append(reply)
            else:
                self._refuse(sender(reply), reason)
        # Strategies give up a round whose metrics have different names; the majority's are right.
        named = [frozenset(reply.content.metric_records[METRICS]) for reply in usable]
        usual = Counter(named).most_common(1)[0][0] if named else None
        accepted = [reply for reply, names in zip(usable, named, strict=True) if names == usual]
        for reply, names in zip(usable, named, strict=True):
            if names != usual:
                self._refuse(sender(reply), f"metrics {sorted(names)} are not those of the others")
        if reference is not None:
            for reply in accepted:
                arrays = reply.content.array_records[ARRAYS]
                # Wrappers pair arrays by their place.
                reply.content[ARRAYS] = ArrayRecord({name: arrays[name] for name in reference})
        return accepted

    def _refuse(self, name: str, reason: str) -> None:
        self.report.refused[name] = reason
        logger.warning("round %d: %s refused: %s", self.report.round, name, reason)


def refusal(reply: Message, reference: Mapping[str, np.ndarray] | None) -> str | None:
    """Returns why a client's reply to the weights `reference` (`None`: to be evaluated) is no use, or `None`."""
    if reply.has_error():
        return f"error on the client: {' '.join((reply.error.reason or '').split())[-300:]}"
    metrics = reply.content.metric_records
    if list(metrics) != [METRICS]:
        return f"expected one record of metrics, {METRICS!r} (got {sorted(metrics)})"
    for name, value in metrics[METRICS].items():
        if isinstance(value, list) or not math.isfinite(value):
            return f"metric {name} is not a finite number: {value}"
    weights = [metrics[METRICS].get(name, 0) for name in WEIGHTS]
    if any(isinstance(weight, list) or not weight > 0 for weight in weights):
        return f"expected {list(WEIGHTS)} above 0 (got {dict(metrics[METRICS])})"
    if reference is None:
        return None
    if list(reply.content.array_records) != [ARRAYS]:
        return f"expected one record of weights, {ARRAYS!r} (got {sorted(reply.content.array_records)})"
    return wrong_weights(reply.content.array_records[ARRAYS], reference)


def wrong_weights(arrays: Mapping[str, Array], reference: Mapping[str, np.ndarray]) -> str | None:
    """Returns why weights cannot be averaged with others like `reference`, or `None`.

    Example:
        >>> reference = {"a": np.zeros((2, 3), np.float32)}
        >>> wrong_weights({"a": Array(np.zeros((3, 2), np.float32))}, reference)
        'a has shape (3, 2), expected (2, 3)'
        >>> wrong_weights({"a": Array(np.full((2, 3), np.nan, np.float32))}, reference)
        'a is not finite'
    """
    odd = sorted(arrays.keys() ^ reference.keys())
    if odd:
        return f"weights of other names: {odd[:3]}"
    for name, expected in reference.items():
        try:
            given = arrays[name].numpy()
        # Whatever bytes a client sends, numpy has an error of its own for them.
        except Exception as error:
            return f"{name} cannot be read: {error}"
        if given.shape != expected.shape:
            return f"{name} has shape {given.shape}, expected {expected.shape}"
        if given.dtype != expected.dtype:
            return f"{name} has type {given.dtype}, expected {expected.dtype}"
        if not np.isfinite(given).all():
            return f"{name} is not finite"
    return None


def count_bytes(message: Message) -> int:
    """Returns the bytes of the weights a message carries, with their names and numpy's headers."""
    records = message.content.array_records.values() if message.has_content() else ()
    return sum(record.count_bytes() for record in records)


def sender(reply: Message) -> str:
    """Returns the name of a client: its number where it tells it, or that of its node."""
    number = _number(reply)
    return f"node {reply.metadata.src_node_id}" if number is None else f"client {number}"


def _measures(metrics: MetricRecord | None) -> dict[str, float]:
    # `refusal` lets no lists pass.
    values = {} if metrics is None else dict(metrics.items())
    return {name: cast(float, value) for name, value in values.items() if name not in WEIGHTS}


def _number(reply: Message) -> int | None:
    records = reply.content.config_records if reply.has_content() else {}
    number = records[SENDER].get("partition-id", -1) if SENDER in records else -1
    return number if isinstance(number, int) and number >= 0 else None


def _place(reply: Message) -> tuple[float, int]:
    number = _number(reply)
    return (math.inf if number is None else number, reply.metadata.src_node_id)
