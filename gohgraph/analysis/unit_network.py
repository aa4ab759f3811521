"""Edges between the units of a stock model as one head network."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gohgraph.analysis.architectures.wiring import SITES, AttentionUnit, FeedForwardUnit, Reading, Wiring
from gohgraph.analysis.learned_edges import OF_KEYS, LearnedGraph

if TYPE_CHECKING:
    from gohgraph.analysis.network import HeadNetwork

# Nodes that a network may have beside heads, by kind.
OTHERS = ("embedding", "mlp", "logits")


class Reader(NamedTuple):
    """Nodes that read one stream at one time, each on its own: the queries of a unit, or its keys, or a feed-forward.

    Args:
        unit: its module's name; `site`: of `SITES`, or "mlp" or "logits".
        reading: what they read.
        nodes: their numbers in the network, `[R]`.
    """

    unit: str
    site: str
    reading: Reading
    nodes: range


class Writer(NamedTuple):
    """Nodes that write to a stream together: the heads of a unit, a feed-forward, the embedding (at time -1)."""

    unit: str
    stream: str
    time: int
    nodes: range


class UnitNodes:
    """The nodes of a model's network, in order, who of them reads, and who writes.

    Args:
        wiring: of the model.
        others: of `OTHERS`, which nodes there are beside heads.
        learned: head graphs whose edges the network has, after those of the residual stream.

    Attributes:
        columns: of every node, as `HeadNetwork` has them.
        readers, writers: in the order they run.
    """

    def __init__(self, wiring: Wiring, others: Collection[str] = (), learned: Sequence[LearnedGraph] = ()) -> None:
        self.learned = learned
        # Of every attention unit, its query heads and its key/value heads.
        self._heads: dict[str, tuple[range, range]] = {}
        self.columns: dict[str, list] = {name: [] for name in ("label", "block", "layer", "head", "kind")}
        self.readers: list[Reader] = []
        self.writers: list[Writer] = []
        for stream in wiring.streams:
            if "embedding" in others:
                title = f"{stream.name} embedding".strip()
                self.writers.append(Writer(stream.first, stream.name, -1, self._add(title, title, "embedding")))
            for unit in (unit for unit in wiring.units if unit.reads.stream == stream.name):
                if isinstance(unit, AttentionUnit):
                    self._add_heads(unit)
                elif "mlp" in others:
                    self._add_feed_forward(unit)
            if "logits" in others and stream == wiring.streams[-1]:
                nodes = self._add("logits", "logits", "logits")
                self.readers.append(Reader(stream.last, "logits", stream.end, nodes))

    def edges_into(self, reader: Reader) -> list[Writer]:
        """Returns who has written when a reader reads."""
        stream, time = reader.reading.stream, reader.reading.time
        return [writer for writer in self.writers if writer.stream == stream and writer.time < time]

    def edges_of(self, graph: LearnedGraph) -> Tensor:
        """Returns the edges of a head graph as nodes of the network, `[2, E]`."""
        kind = graph.site in OF_KEYS
        starts = torch.tensor([self._heads[unit.name][kind].start for unit in graph.units])
        heads = graph.conv.num_heads
        return starts[graph.edges // heads] + graph.edges % heads

    def _add(self, title: str, label: str, kind: str, count: int = 1, first: int = 0) -> range:
        start = len(self.columns["label"])
        numbers = [int(part) for part in title.split() if part.isdigit()]
        for number in range(count):
            self.columns["label"].append(label.format(number))
            self.columns["block"].append(title)
            self.columns["layer"].append(numbers[-1] if numbers else -1 if kind == "embedding" else 10**6)
            self.columns["head"].append(first + number)
            self.columns["kind"].append(kind)
        return range(start, start + count)

    def _add_heads(self, unit: AttentionUnit) -> None:
        short, heads, groups = unit.title.replace("layer ", ""), unit.queries.heads, unit.keys.heads
        nodes = self._add(unit.title, f"{short}.{{}}", "head", heads)
        keys = nodes if groups == heads else self._add(unit.title, f"{short}.{{}}kv", "key/value", groups)
        self._heads[unit.name] = nodes, keys
        for site, reading, own in zip(SITES, unit.readings, (nodes, keys, keys), strict=True):
            self.readers.append(Reader(unit.name, site, reading, own))
        self.writers.append(Writer(unit.name, unit.reads.stream, unit.writes_at, nodes))

    def _add_feed_forward(self, unit: FeedForwardUnit) -> None:
        rows = zip(self.columns["head"], self.columns["block"], self.columns["kind"], strict=True)
        first = 1 + max((head for head, block, kind in rows if (block, kind) == (unit.title, "head")), default=-1)
        nodes = self._add(unit.title, f"{unit.title.replace('layer ', '')}.mlp", "mlp", first=first)
        self.readers.append(Reader(unit.name, "mlp", unit.reads, nodes))
        self.writers.append(Writer(unit.name, unit.reads.stream, unit.writes_at, nodes))


def network_of(
    nodes: UnitNodes, values: Mapping[tuple[str, str], tuple[Tensor, Tensor]],
    learned: Mapping[str, tuple[Tensor, Tensor]],
) -> HeadNetwork:  # fmt: skip
    """Returns the network of all edges.

    Args:
        nodes: of the model.
        values: for every reader that has edges, by `(unit, site)`: means and standard deviations `[W, R]`, rows in the
            order of `edges_into`.
        learned: the same `[E]` of the edges of every head graph, by its name.
    """
    from gohgraph.analysis.network import HeadNetwork

    index: list[Tensor] = []
    mean: list[Tensor] = []
    std: list[Tensor] = []
    graph: list[str] = []
    site: list[str] = []
    for reader in nodes.readers:
        if (reader.unit, reader.site) not in values:
            continue
        of_reader = values[reader.unit, reader.site]
        senders = torch.tensor([node for writer in nodes.edges_into(reader) for node in writer.nodes], dtype=torch.long)
        receivers = torch.tensor(list(reader.nodes))
        pairs = (senders.repeat_interleave(len(receivers)), receivers.repeat(len(senders)))
        index.append(torch.stack(pairs))
        for column, part in zip((mean, std), of_reader, strict=True):
            column.append(part.detach().cpu().double().flatten())  # [W*R]
        graph += [reader.unit] * index[-1].shape[1]
        site += [reader.site] * index[-1].shape[1]
    for one in nodes.learned:
        index.append(nodes.edges_of(one))
        for column, part in zip((mean, std), learned[one.name], strict=True):
            column.append(part.detach().cpu().double())  # [E]
        graph += [one.name] * index[-1].shape[1]
        site += [one.site] * index[-1].shape[1]
    if not index:
        raise ValueError("Expected a model with edges between its layers (got none). Do pass one of at least two.")
    count, columns = len(graph), dict(nodes.columns)
    layers = torch.tensor(columns.pop("layer"))
    of_layers = layers[layers < 10**6]
    layers[layers == 10**6] = int(of_layers.max()) + 1 if len(of_layers) else 0
    return HeadNetwork(
        edge_index=torch.cat(index, dim=1), num_nodes=len(layers), layer=layers,
        head=torch.tensor(columns.pop("head")), load=torch.ones(len(layers), dtype=torch.double), **columns,
        edge=torch.arange(count), graph=graph, site=site, round=torch.ones(count, dtype=torch.long),
        mean=torch.cat(mean), std=torch.cat(std), share=torch.ones(count, dtype=torch.double),
    )  # fmt: skip
