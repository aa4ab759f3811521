"""A model as analysis sees it: units that read a residual stream and write to it, each at its time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

# Sites of edges in the network, in the order of a unit's readers.
SITES = ("queries", "keys", "values")


class Rows(NamedTuple):
    """Where the weights of heads lie: rows of a linear map's weight `[out, M]`.

    Args:
        module: name of the linear map.
        heads, size: H heads of D rows each.
        part: of a map that holds queries, keys and values, which of the three these are, 0 to 2; else `None`.
        by_head: such a map holds the three of one head after those of another, not those of all heads together.
    """

    module: str
    heads: int
    size: int
    part: int | None = None
    by_head: bool = False

    def of(self, values: Tensor, dim: int = 0) -> Tensor:
        """Returns a view of a map's rows (or, with `dim=-1`, its output's features) by head: `[..., H, D, ...]`."""
        if self.part is None:
            return values.unflatten(dim, (self.heads, self.size))
        dim %= values.dim()
        split = (self.heads, 3, self.size) if self.by_head else (3, self.heads, self.size)
        return values.unflatten(dim, split).select(dim + self.by_head, self.part)


class Reading(NamedTuple):
    """A reading of a stream: what stands there at that time, through a norm.

    Args:
        stream: its name.
        time: a reader sees what was written before.
        norm: name of the norm between the stream and whoever reads; `None` where there is none.
        entry: name of a module whose input is what is read (after the norm).
    """

    stream: str
    time: int
    norm: str | None
    entry: str


@dataclass(frozen=True)
class AttentionUnit:
    """The heads of one attention module.

    Args:
        name: of the module; `title`: of its row in figures, e.g. "layer 3".
        queries, keys, values: where their weights lie.
        reads: the stream that queries are of; `source`: that keys and values are of, the encoder's in cross attention.
        output: name of the projection W_O, `[H*D] -> [M]`.
        writes_at: the time from which its output stands in the stream of `reads`.
        post_norm: name of a norm that the output passes before it is added; `None` where there is none.
        query_norm, key_norm: names of norms of queries and keys themselves (QK norm), or `None`.
    """

    name: str
    title: str
    queries: Rows
    keys: Rows
    values: Rows
    reads: Reading
    source: Reading
    output: str
    writes_at: int
    post_norm: str | None = None
    query_norm: str | None = None
    key_norm: str | None = None

    @property
    def rows(self) -> tuple[Rows, Rows, Rows]:
        return self.queries, self.keys, self.values

    @property
    def readings(self) -> tuple[Reading, Reading, Reading]:
        return self.reads, self.source, self.source


@dataclass(frozen=True)
class FeedForwardUnit:
    """A feed-forward: it reads at `reads` and writes what the module `exit` returns, as `AttentionUnit` does."""

    name: str
    title: str
    reads: Reading
    exit: str
    writes_at: int
    post_norm: str | None = None


class StreamNorm(NamedTuple):
    """A norm that all of a stream passes at a time (post-norm blocks): name of the module."""

    stream: str
    time: int
    module: str


class Stream(NamedTuple):
    """A residual stream.

    Args:
        name: "" where a model has one, else "encoder" or "decoder".
        first: name of the first layer, whose input is what the stream begins with.
        last: name of the last layer.
        end: how the model's head, or a decoder, reads it.
    """

    name: str
    first: str
    last: str
    end: Reading


@dataclass(frozen=True)
class Wiring:
    """All units of a model in the order they run, by the names of its modules."""

    streams: tuple[Stream, ...]
    attentions: tuple[AttentionUnit, ...]
    feed_forwards: tuple[FeedForwardUnit, ...]
    norms: tuple[StreamNorm, ...]

    @property
    def units(self) -> list[AttentionUnit | FeedForwardUnit]:
        """Attention and feed-forward units, stream after stream, by their time of writing; parallel ones as listed."""
        places = {stream.name: number for number, stream in enumerate(self.streams)}
        everything: list[AttentionUnit | FeedForwardUnit] = [*self.attentions, *self.feed_forwards]
        return sorted(everything, key=lambda unit: (places[unit.reads.stream], unit.writes_at))

    def norms_between(self, stream: str, after: int, before: int) -> list[StreamNorm]:
        """Returns the norms of a stream that stand between two times, in order."""
        between = [norm for norm in self.norms if norm.stream == stream and after < norm.time < before]
        return sorted(between, key=lambda norm: norm.time)
