"""What the units of a stock model read and wrote in one forward pass, seen by hooks that are gone afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gohgraph.analysis.architectures.wiring import SITES, AttentionUnit, FeedForwardUnit, Reading, Stream, Wiring
from gohgraph.analysis.learned_edges import LearnedGraph, Sent, on_whole_maps, sent


@dataclass
class Trace:
    """One forward pass.

    Attributes:
        read: by stream and time, what stands in the stream there, `[B, T, M]`.
        heads: by unit, the heads' outputs before W_O, `[B, T, H*D]`.
        wrote: by unit, what it added to the stream, `[B, T, M]`.
        normed: by unit with a norm behind and by module of a norm on the stream, what went in, `[B, T, M]`.
        sent: by head graph, what its edges carried.
        zeros: by module, a zero that was added to what it returned or read; `gradients` are those of a metric.
    """

    read: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    heads: dict[str, Tensor] = field(default_factory=dict)
    wrote: dict[str, Tensor] = field(default_factory=dict)
    normed: dict[str, Tensor] = field(default_factory=dict)
    sent: dict[str, Sent] = field(default_factory=dict)
    zeros: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def take_gradients(self, value: Tensor) -> None:
        """Fills `gradients` with those of a sum of numbers; the graph is freed."""
        gradients = torch.autograd.grad(value.sum(), list(self.zeros.values()), allow_unused=True)
        for (name, zero), gradient in zip(self.zeros.items(), gradients, strict=True):
            self.gradients[name] = torch.zeros_like(zero) if gradient is None else gradient
        self.zeros.clear()

    def forget(self, *, parts: bool = False, later: bool = False) -> None:
        """Lets go of what only `check_trace` needs: what attention added to the stream, which heads make again.

        Args:
            parts: of all that was written, too: what is left are slopes and where they are taken.
            later: of what stood in streams after their start, too.
        """
        for name in list(self.wrote):
            if parts or name in self.heads:
                del self.wrote[name]
        if parts:
            self.heads.clear()
            self.normed.clear()
        if later:
            self.read = {place: x for place, x in self.read.items() if place[1] < 0}


class Hooks:
    """Hooks on modules by name, of this thread's calls alone, which are gone at the end of the block."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self._stack, self._thread = model, ExitStack(), threading.get_ident()

    def __enter__(self) -> Hooks:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def on_input(self, name: str, take: Callable[[Tensor], Tensor | None]) -> None:
        """Calls `take` with a module's first input, which a result replaces."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if threading.get_ident() != self._thread:
                return None
            if args:
                changed = take(args[0])
                return None if changed is None else ((changed, *args[1:]), kwargs)
            name = next(key for key, value in kwargs.items() if isinstance(value, Tensor))
            changed = take(kwargs[name])
            return None if changed is None else (args, {**kwargs, name: changed})

        module = self.model.get_submodule(name)
        self._stack.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))

    def on_output(self, name: str, take: Callable[[Tensor], Tensor | None]) -> None:
        """Calls `take` with what a module returns, the first part of a tuple, which a result replaces."""

        def hook(module: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
            if threading.get_ident() != self._thread:
                return None
            changed = take(result[0] if isinstance(result, tuple) else result)
            if changed is None:
                return None
            return (changed, *result[1:]) if isinstance(result, tuple) else changed

        self._stack.enter_context(self.model.get_submodule(name).register_forward_hook(hook))

    def on_graph(self, name: str, take: Callable[[tuple[Any, ...], dict[str, Any], Tensor], Tensor | None]) -> None:
        """Calls `take` with all that a head graph was given and what it returns, which a result replaces."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> Tensor | None:
            return take(args, kwargs, result) if threading.get_ident() == self._thread else None

        self._stack.enter_context(self.model.get_submodule(name).register_forward_hook(hook, with_kwargs=True))


def run(model: nn.Module, inputs: Any) -> Any:
    """Returns the model's output for keyword arguments in a mapping, positional ones in a tuple, or one tensor."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into eval mode while the block runs; every module gets the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def trace(
    model: nn.Module, wiring: Wiring, inputs: Any, *, graphs: Sequence[LearnedGraph] = (), zeros: bool = False,
    starts: Mapping[str, Tensor] | None = None, has_output: bool = True,
) -> tuple[Trace, Any]:  # fmt: skip
    """Runs a model and returns what its units did, and its output.

    Args:
        graphs: head graphs whose messages are kept.
        zeros: adds the zeros whose gradients are asked for later.
        starts: by stream, what takes the place of its first layer's input.
        has_output: `False` stops at the end of the last stream, before the model's head.
    """
    seen = Trace()
    with Hooks(model) as hooks, on_whole_maps(model, graphs), torch.set_grad_enabled(zeros):
        for stream in wiring.streams:
            if starts is not None:
                hooks.on_input(stream.first, partial(_start_at, starts[stream.name]))
            hooks.on_input(stream.first, keep(seen.read, (stream.name, -1)))
            _watch_end(hooks, stream, seen, zeros and stream == wiring.streams[-1])
        for norm in wiring.norms:
            hooks.on_input(norm.module, keep(seen.normed, norm.module))
        for unit in wiring.units:
            _watch(hooks, unit, seen, zeros)
        for graph in graphs:
            hooks.on_graph(graph.name, partial(_take_messages, graph, seen, zeros))
        if not has_output:
            _at_end(hooks, wiring.streams[-1])(_stop)
        try:
            return seen, run(model, inputs)
        except _Seen:
            return seen, None


class _Seen(Exception):
    """Nothing behind the last stream is needed."""


def _stop(x: Tensor) -> None:
    raise _Seen


def _watch(hooks: Hooks, unit: AttentionUnit | FeedForwardUnit, seen: Trace, zeros: bool) -> None:
    if isinstance(unit, AttentionUnit):
        for reading in {unit.reads, unit.source}:
            _watch_reading(hooks, reading, seen)
        hooks.on_input(unit.output, keep(seen.heads, unit.name))
        if zeros:
            for module in dict.fromkeys(rows.module for rows in unit.rows):
                hooks.on_output(module, _add_zero(seen.zeros, module))
        last = unit.output
    else:
        _watch_reading(hooks, unit.reads, seen)
        if zeros:
            hooks.on_input(unit.reads.entry, _add_zero(seen.zeros, unit.name))
        last = unit.exit
    if unit.post_norm is not None:
        hooks.on_input(unit.post_norm, keep(seen.normed, unit.name))
        last = unit.post_norm
    hooks.on_output(last, keep(seen.wrote, unit.name))


def _take_messages(
    graph: LearnedGraph, seen: Trace, zeros: bool, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor
) -> Tensor | None:
    seen.sent[graph.name] = sent(graph, args, kwargs, result)
    return _add_zero(seen.zeros, graph.name)(result) if zeros else None


def _watch_reading(hooks: Hooks, reading: Reading, seen: Trace) -> None:
    hooks.on_input(reading.norm or reading.entry, keep(seen.read, (reading.stream, reading.time)))


def _watch_end(hooks: Hooks, stream: Stream, seen: Trace, zeros: bool) -> None:
    watch = _at_end(hooks, stream)
    watch(keep(seen.read, (stream.name, stream.end.time)))
    if zeros:
        watch(_add_zero(seen.zeros, stream.last))


def _at_end(hooks: Hooks, stream: Stream) -> Callable[[Callable[[Tensor], Tensor | None]], None]:
    """What watches the end of a stream: before its last norm, or behind its last layer."""
    if stream.end.norm is None:
        return partial(hooks.on_output, stream.last)
    return partial(hooks.on_input, stream.end.norm)


def _start_at(start: Tensor, x: Tensor) -> Tensor:
    return start.to(x.dtype)


def keep(into: dict[Any, Tensor], key: Any) -> Callable[[Tensor], None]:
    """Returns what puts a value under a key."""

    def put(value: Tensor) -> None:
        into[key] = value.detach()

    return put


def _add_zero(into: dict[str, Tensor], key: str) -> Callable[[Tensor], Tensor]:
    def add(value: Tensor) -> Tensor:
        into[key] = torch.zeros_like(value).requires_grad_()
        return value + into[key]

    return add


def check_trace(seen: Trace, model: nn.Module, wiring: Wiring) -> None:
    """Raises `ValueError` where a stream is not the sum of what was written: residual connections of another kind."""
    for stream in wiring.streams:
        events: list[tuple[int, int, Any]] = [(t, 1, x) for (name, t), x in seen.read.items() if name == stream.name]
        events += [(u.writes_at, 0, seen.wrote[u.name]) for u in wiring.units if u.reads.stream == stream.name]
        events += [(norm.time, 2, norm) for norm in wiring.norms if norm.stream == stream.name]
        x = torch.zeros(())
        for time, kind, value in sorted(events, key=lambda event: event[:2]):
            if kind == 0:
                x = x + value
                continue
            is_norm = kind == 2
            there = seen.normed[value.module] if is_norm else value
            if time >= 0:
                _check_same(x, there, stream, time)
            with torch.no_grad():
                x = model.get_submodule(value.module).forward(there) if is_norm else there


def _check_same(x: Tensor, there: Tensor, stream: Stream, time: int) -> None:
    limit = 3e-2 if there.dtype in (torch.float16, torch.bfloat16) else 1e-3
    # Where keys of padding alone are attended to there may be no number.
    off, size = (x - there).nan_to_num().abs().max(), there.nan_to_num().abs().max()
    if x.shape != there.shape or off > limit * size:
        raise ValueError(
            f"Expected a {stream.name or 'residual'} stream that is the sum of what its layers write (got one that is "
            f"off by {off / size:.1g} at layer {time // 10}). Do not use this model: its residual connections are "
            "scaled or of another kind."
        )


def sites_of(unit: AttentionUnit) -> list[tuple[str, Any, Reading]]:
    """Returns site, rows and reading of each kind of readers of a unit."""
    return list(zip(SITES, unit.rows, unit.readings, strict=True))
