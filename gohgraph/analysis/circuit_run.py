"""A run of a stock model in which chosen edges carry what another run wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gohgraph.analysis.architectures.weights import linear_weight
from gohgraph.analysis.architectures.wiring import AttentionUnit, FeedForwardUnit, Reading, Rows, StreamNorm, Wiring
from gohgraph.analysis.learned_edges import LearnedGraph, on_whole_maps, sent
from gohgraph.analysis.parts import Weights, written
from gohgraph.analysis.traces import Hooks, Trace, keep, run, sites_of
from gohgraph.analysis.unit_network import UnitNodes, Writer

# By unit and site: whether an edge carries the other run's part, bool [W, R]; of a head graph, [E, 1].
Patched = Mapping[tuple[str, str], Tensor]


class _AllTokens:
    """In the place of `Where`: the tokens of a whole batch, `[B, T, F] -> [B*T, F]`."""

    def of(self, values: Tensor) -> Tensor:
        return values.flatten(0, 1)


class _Changes:
    """What every node has written to a stream so far, now and in the other run, at the place of whoever asks."""

    def __init__(self, stream: str, table: UnitNodes, now: Trace, other: Trace, weights: Weights) -> None:
        self.now, self.other, self.weights = now, other, weights
        self.pending = sorted((w for w in table.writers if w.stream == stream), key=lambda writer: writer.time)
        self.keeps_both = any(norm.stream == stream for norm in weights.wiring.norms)
        self.order: list[Writer] = []
        self.parts: list[Tensor] = []

    def before(self, time: int) -> Tensor | None:
        """The changes now - other of all that was written before a time, `[W, N, M]`."""
        self._advance(time)
        if not self.parts:
            return None
        parts = self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts, dim=1)
        self.parts = [parts]
        return parts[0] - parts[1] if self.keeps_both else parts[0]

    def through(self, norm: str, time: int) -> None:
        """Carries all parts through a norm on the stream."""
        self._advance(time)
        at = [_AllTokens().of(seen.normed[norm]) for seen in (self.now, self.other)]
        for number, parts in enumerate(self.parts):
            carried = [self.weights.carried(norm, part, x) for part, x in zip(parts, at, strict=True)]
            self.parts[number] = torch.stack(carried)

    def _advance(self, time: int) -> None:
        while self.pending and self.pending[0].time < time:
            writer = self.pending.pop(0)
            now, other = (written(writer, seen, self.weights, _AllTokens()) for seen in (self.now, self.other))
            self.parts.append(torch.stack([now, other]) if self.keeps_both else (now - other).unsqueeze(0))


def run_patched(
    model: nn.Module, wiring: Wiring, table: UnitNodes, inputs: Any, other: Trace, patched: Patched
) -> Any:
    """Returns the model's output where every patched edge carries what its sender wrote in another run.

    Each reader has an input of its own: the stream as it is now, without the changes that come over its patched edges.
    What is no node (feed-forwards, if the table has none) reads the whole stream.
    """
    now = Trace()
    width = other.read[wiring.streams[0].name, -1].shape[-1]
    weights = Weights(model, wiring, width)
    changes = {stream.name: _Changes(stream.name, table, now, other, weights) for stream in wiring.streams}

    def moved(key: tuple[str, str], reading: Reading) -> tuple[Tensor, Tensor] | None:
        """Which readers' inputs change, and by how much: `[r]`, `[r, B, T, M]`, behind the norm."""
        drop = patched.get(key)
        if drop is None or not drop.any():
            return None
        x = now.read[reading.stream, reading.time]
        readers = drop.any(dim=0).nonzero().flatten().to(x.device)
        change = changes[reading.stream].before(reading.time)
        share = drop.to(x.device)[:, readers].to(x.dtype)
        arriving = x - torch.einsum("wr,wnm->rnm", share, change).unflatten(1, x.shape[:2])  # [r, B, T, M]
        if reading.norm is None:
            return readers, arriving - x
        norm = model.get_submodule(reading.norm)
        return readers, norm.forward(arriving) - norm.forward(x)

    with Hooks(model) as hooks, on_whole_maps(model, table.learned), torch.no_grad():
        _watch(hooks, wiring, now, changes)
        for graph in table.learned:
            drop = patched.get((graph.name, graph.site))
            if drop is not None and drop.any():
                hooks.on_graph(graph.name, partial(_other_messages, graph, other, drop.flatten()))
        for unit in wiring.units:
            if isinstance(unit, AttentionUnit):
                for module in dict.fromkeys(rows.module for rows in unit.rows):
                    here = [(site, rows, reading) for site, rows, reading in sites_of(unit) if rows.module == module]
                    edit = partial(_edit, unit, here, linear_weight(model.get_submodule(module)), moved)
                    hooks.on_output(module, edit)
            else:
                hooks.on_input(unit.reads.entry, partial(_moved_input, unit, moved))
        end = wiring.streams[-1]
        plain = end.end._replace(norm=None)
        put = (hooks.on_output, end.last) if end.end.norm is None else (hooks.on_input, end.end.norm)
        put[0](put[1], lambda x: _shift(x, moved((end.last, "logits"), plain)))
        return run(model, inputs)


def _other_messages(
    graph: LearnedGraph, other: Trace, drop: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor
) -> Tensor:
    """What a head graph returns, `[B, T, H, F]`, where some messages are the other run's."""
    receivers, heads, drop = graph.conv.edge_index[1], graph.conv.num_heads, drop.to(result.device)
    here = sent(graph, args, kwargs).received(receivers, heads, drop)
    return result - here + other.sent[graph.name].received(receivers, heads, drop)


def _watch(hooks: Hooks, wiring: Wiring, now: Trace, changes: Mapping[str, _Changes]) -> None:
    """Keeps what the changes are made of."""
    for stream in wiring.streams:
        hooks.on_input(stream.first, keep(now.read, (stream.name, -1)))
        place, end = (stream.name, stream.end.time), stream.end.norm
        watch = (hooks.on_output, stream.last) if end is None else (hooks.on_input, end)
        watch[0](watch[1], keep(now.read, place))
    for norm in wiring.norms:
        hooks.on_input(norm.module, keep(now.normed, norm.module))
        hooks.on_input(norm.module, partial(_through, changes[norm.stream], norm))
    for unit in wiring.units:
        for reading in {unit.reads, unit.source} if isinstance(unit, AttentionUnit) else {unit.reads}:
            hooks.on_input(reading.norm or reading.entry, keep(now.read, (reading.stream, reading.time)))
        if isinstance(unit, AttentionUnit):
            hooks.on_input(unit.output, keep(now.heads, unit.name))
        if unit.post_norm is not None:
            hooks.on_input(unit.post_norm, keep(now.normed, unit.name))
        hooks.on_output(unit.post_norm or _last(unit), keep(now.wrote, unit.name))


def _through(changes: _Changes, norm: StreamNorm, x: Tensor) -> None:
    changes.through(norm.module, norm.time)


def _moved_input(unit: FeedForwardUnit, moved: Callable, x: Tensor) -> Tensor | None:
    return _shift(x, moved((unit.name, "mlp"), unit.reads))


def _last(unit: Any) -> str:
    return unit.output if isinstance(unit, AttentionUnit) else unit.exit


def _edit(
    unit: AttentionUnit, here: list[tuple[str, Rows, Reading]], weight: Tensor, moved: Callable, out: Tensor
) -> Tensor:
    """What a projection returns, `[B, T, F]`, where some heads read something else."""
    for site, rows, reading in here:
        change = moved((unit.name, site), reading)
        if change is None:
            continue
        readers, difference = change
        added = torch.einsum("rbtm,rdm->btrd", difference, rows.of(weight)[readers].to(difference.dtype))
        numbers = torch.arange(out.shape[-1], device=out.device)
        features = rows.of(numbers)[readers].flatten()  # [r*D]
        out = out.index_add(-1, features, added.flatten(-2).to(out.dtype))
    return out


def _shift(x: Tensor, change: tuple[Tensor, Tensor] | None) -> Tensor | None:
    return None if change is None else x + change[1][0].to(x.dtype)
