"""Which head did read which: edge attribution between the heads of a pretrained model, as a network."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gohgraph.analysis.against import Against, other_trace, token_masks
from gohgraph.analysis.architectures import Wiring, wiring_of
from gohgraph.analysis.architectures.wiring import SITES
from gohgraph.analysis.learned_edges import LearnedGraph, learned_graphs, worth
from gohgraph.analysis.parts import Weights, Where, changed, written
from gohgraph.analysis.running_stats import Moments
from gohgraph.analysis.traces import Trace, check_trace, evaluating, trace
from gohgraph.analysis.unit_network import OTHERS, Reader, UnitNodes, network_of
from gohgraph.common.checks import check_bool, check_choice, check_int

if TYPE_CHECKING:
    from gohgraph.analysis.network import HeadNetwork

# Numbers of one block of parts or slopes, [nodes, tokens, M].
BLOCK = 1 << 25
# So many readers' slopes are multiplied at once: to read the parts takes longer than to multiply them with a few.
READERS = 32
Metric = Callable[[Any], Tensor]


def attribution_graph(
    model: nn.Module, inputs: Any, *, against: Against, metric: Metric, steps: int = 1, nodes: Collection[str] = (),
    every_token: bool = False, learned: bool = True,
) -> HeadNetwork:  # fmt: skip
    r"""Returns which head did read which in a pretrained model: what every edge is worth for a behaviour.

    .. math::
        A(u \to r) = \sum_t \Big\langle c_u(t) - c'_u(t),\;
        J_\mathrm{norm}(x_t)^T W_r^T \frac{\partial m}{\partial r(t)} \Big\rangle

    c_u(t) is what head u wrote into the stream at token t, c' the same under `against`, and r the query, key or value
    that reads it before rotary positions: the slope of the metric when u's output is replaced in that reader's input
    alone, times -1. So A > 0 is an edge the metric needs. All edges at once: two forward passes and one backward, no
    product larger than heads x tokens x M, the model's own attention, hooks that are gone afterwards.

    Source: edge attribution patching, Syed et al. 2023, arXiv 2310.10348; `steps` > 1 averages the slope along the way
    from the other input to this one: EAP-IG, Hanna et al. 2024, arXiv 2403.17806. Where a norm stands behind a block
    (Gemma, OLMo 2) or on the stream (BERT, BART), heads' parts go through it with the norm's scale of that run.

    Args:
        model: see `wiring_of` for the architectures. Head graphs of our own have edges beside those of the stream: what
            one is worth is the slope of the metric when its message, alpha_ji(t) z_j(t), is the other run's in what
            its receiver receives. What c_u is, is then the head's output after its messages.
        inputs: of one batch: a mapping of keyword arguments, a tuple, or a tensor.
        against: another batch of the same shape, `"mean"` over the batch (of real tokens at each place), or `"zero"`.
        metric: what the model returns -> one number for each example, `[B]`; see `gohgraph.analysis.metrics`.
        steps: points where the slope is taken; 1 takes it at the inputs.
        nodes: of "embedding", "mlp" and "logits", what is a node beside heads.
        every_token: also the attribution at every token, in `by_token`, `[E, T]`, mean over examples.
        learned: the edges of head graphs are edges of the network too.

    Returns:
        The network; `mean` and `std` are over examples.

    Raises:
        ValueError: a model whose layers are not known or whose residual stream is no sum of what they write; with
            `learned`, a head graph of several rounds, keyed or with norms; inputs of another shape; one example
            against the mean; a metric that is not one number an example.

    Example:
        >>> import gohgraph as goh
        >>> model = goh.LanguageModel(goh.TransformerConfig(9, d_model=8, num_heads=2, num_layers=2, d_ff=8))
        >>> clean, other = torch.tensor([[1, 2, 3, 1]]), torch.tensor([[4, 2, 3, 1]])
        >>> metric = lambda output: output.logits[:, -1, 2] - output.logits[:, -1, 5]
        >>> network = attribution_graph(model, clean, against=other, metric=metric)
        >>> network.num_edges, network.strongest(1)[0]["sender"][0]
        (12, '0')
    """
    check_int("steps", steps, low=1)
    check_bool("every_token", every_token)
    check_bool("learned", learned)
    for kind in nodes:
        check_choice("nodes", kind, OTHERS)
    wiring = wiring_of(model)
    graphs = learned_graphs(model, wiring) if learned else []
    with evaluating(model):
        clean, other, slopes = _runs(model, wiring, inputs, against, metric, steps, graphs)
    table = UnitNodes(wiring, nodes, graphs)
    masks = token_masks(inputs, wiring, clean)
    start = clean.read[wiring.streams[0].name, -1]
    length = max(mask.shape[1] for mask in masks.values()) if every_token else 0
    edges, weights = _Edges(table, length, start), Weights(model, wiring, start.shape[-1])
    for example in range(len(start)):
        for stream in wiring.streams:
            for where in _blocks(example, masks[stream.name][example], table, weights.width):
                _add_stream(edges, stream.name, where, (clean, other), slopes, weights)
        edges.end_of_example()
    of_graphs = {one.name: _messages(one, (clean, other), slopes, masks[one.stream]) for one in graphs}
    moments = {name: Moments(values.shape[1:2]) for name, values in of_graphs.items()}
    for name, values in of_graphs.items():
        moments[name].update(values.sum(dim=-1))
    network = network_of(table, edges.values(), {name: (m.mean, m.std) for name, m in moments.items()})
    if every_token:
        tokens = (values.mean(dim=0).cpu() for values in of_graphs.values())  # [E, T]
        network.by_token = torch.cat([edges.by_token(), *(F.pad(t, (0, length - t.shape[1])) for t in tokens)])
    return network


def _messages(graph: LearnedGraph, runs: tuple[Trace, Trace], slopes: list[Trace], mask: Tensor) -> Tensor:
    """What the edges of a head graph are worth, `[B, E, T]`."""
    slope = torch.as_tensor(sum(run.gradients[graph.name] for run in slopes) / len(slopes))  # [B, T, H, F]
    pair = runs[0].sent[graph.name], runs[1].sent[graph.name]
    return torch.stack([worth(graph, pair, slope, example, mask[example]) for example in range(len(mask))])


def _runs(
    model: nn.Module, wiring: Wiring, inputs: Any, against: Against, metric: Metric, steps: int,
    graphs: list[LearnedGraph],
) -> tuple[Trace, Trace, list[Trace]]:  # fmt: skip
    """The clean and the other run, and those with slopes."""
    clean, output = trace(model, wiring, inputs, graphs=graphs, zeros=steps == 1)
    check_trace(clean, model, wiring)
    examples = len(clean.read[wiring.streams[0].name, -1])
    slopes = [clean]
    if steps == 1:
        clean.take_gradients(metric_value(metric, output, examples))
    del output
    clean.forget()
    other = other_trace(model, wiring, inputs, against, clean, graphs)
    other.forget(later=True)
    if steps > 1:
        slopes = []
        for step in range(1, steps + 1):
            ends = ((run.read[stream.name, -1] for run in (other, clean)) for stream in wiring.streams)
            starts = {s.name: a.lerp(b, step / steps) for s, (a, b) in zip(wiring.streams, ends, strict=True)}
            slope, output = trace(model, wiring, inputs, graphs=graphs, zeros=True, starts=starts)
            slope.take_gradients(metric_value(metric, output, examples))
            slope.forget(parts=True)
            slopes.append(slope)
    return clean, other, slopes


def metric_value(metric: Metric, output: Any, examples: int) -> Tensor:
    """Returns a metric's numbers `[B]`; `ValueError` if they are not one an example."""
    value = metric(output)
    if isinstance(value, Tensor) and value.dim() == 0 and examples == 1:
        value = value.unsqueeze(0)
    if not isinstance(value, Tensor) or value.shape != (examples,):
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"Expected a metric of one number for each of {examples} examples (got {got}). Do leave the batch's "
            "dimension, without a mean over it."
        )
    return value


# Readers together, how many parts they read, the first ones, and their slopes `[R, N, M]`.
Waiting = tuple[list[Reader], int, Tensor]


class _Edges:
    """Attributions of all edges in one row, `[E]`: sums over tokens of an example, means over examples.

    Args:
        length: of how many tokens each has its own; 0 for the sums alone.
        like: of the stream, `[B, T, M]`.

    Sums are float64 on the CPU: not every device has float64.
    """

    def __init__(self, table: UnitNodes, length: int, like: Tensor) -> None:
        self.table, self.length = table, length
        # Of every reader with edges, where they lie and how many senders there are.
        self._places: dict[tuple[str, str], tuple[slice, int]] = {}
        start = 0
        for reader in table.readers:
            senders = sum(len(writer.nodes) for writer in table.edges_into(reader))
            end = start + senders * len(reader.nodes)
            if senders:
                self._places[reader.unit, reader.site] = slice(start, end), senders
            start = end
        self._sums = torch.zeros(start, dtype=torch.double)
        self._tokens = like.new_zeros(start, length, dtype=torch.promote_types(like.dtype, torch.float32))
        self._moments = Moments((start,))

    def add(self, waiting: list[Waiting], parts: Tensor, where: Where) -> None:
        """Takes in parts `[W, N, M]` and the slopes of several readings, each of which reads the first of the parts."""
        every = [slopes for _, _, slopes in waiting]
        slopes = every[0] if len(every) == 1 else torch.cat(every)  # [R, N, M]
        if self.length:
            values = torch.einsum("wnm,rnm->wrn", parts, slopes).to(self._tokens.dtype)  # [W, R, N]
        else:
            values = (parts.flatten(1) @ slopes.flatten(1).t()).cpu()  # [W, R]
        for (readers, senders, _), read in zip(waiting, values.split([len(one) for one in every], dim=1), strict=True):
            sizes = [len(reader.nodes) for reader in readers]
            for reader, own in zip(readers, read[:senders].split(sizes, dim=1), strict=True):
                self._add_reader(reader, own, where)

    def _add_reader(self, reader: Reader, worths: Tensor, where: Where) -> None:
        place, senders = self._places[reader.unit, reader.site]
        if self.length:
            self._tokens[place].unflatten(0, (senders, -1)).index_add_(2, where.tokens, worths)
            worths = worths.sum(dim=-1)  # [W, R]
        self._sums[place] += worths.flatten().cpu()

    def end_of_example(self) -> None:
        self._moments.update(self._sums[None])
        self._sums.zero_()

    def values(self) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
        mean, std = self._moments.mean, self._moments.std
        return {key: (mean[place].view(n, -1), std[place].view(n, -1)) for key, (place, n) in self._places.items()}

    def by_token(self) -> Tensor:
        return self._tokens.div_(self._moments.count).cpu()


def _blocks(example: int, mask: Tensor, table: UnitNodes, width: int) -> Iterator[Where]:
    """The real tokens of an example, so many at a time that their parts fit a block."""
    tokens = mask.nonzero().flatten()
    for part in tokens.split(max(1, BLOCK // (width * len(table.columns["label"])))):
        yield Where(example, part)


def _add_stream(
    edges: _Edges, stream: str, where: Where, runs: tuple[Trace, Trace], slopes: list[Trace], weights: Weights
) -> None:
    """Walks along a stream: parts are added, carried through its norms, and read."""
    table, wiring = edges.table, weights.wiring
    norms = [norm for norm in wiring.norms if norm.stream == stream]
    writers = [writer for writer in table.writers if writer.stream == stream]
    events: list[tuple[int, int, Any]] = [(writer.time, 0, writer) for writer in writers]
    events += [(norm.time, 1, norm) for norm in norms]
    events += [(readers[0].reading.time, 2, readers) for readers in _together(table, stream)]
    # Parts are kept apart where a norm of each run's own scale is still to come.
    like, count = runs[0].read[stream, -1], sum(len(writer.nodes) for writer in writers)
    parts = like.new_empty(1 + bool(norms), count, len(where.tokens), like.shape[-1])  # [2 or 1, W, N, M]
    done, waiting = 0, list[Waiting]()
    for _, kind, event in sorted(events, key=lambda event: event[:2]):
        if kind == 0:
            there = parts[:, done : done + len(event.nodes)]
            if norms:
                for one, run in zip(there, runs, strict=True):
                    one.copy_(written(event, run, weights, where))
            else:
                there[0].copy_(changed(event, runs, weights, where))
            done += len(event.nodes)
        elif kind == 1:
            for one, run in zip(parts, runs, strict=True):
                one[:done] = weights.carried(event.module, one[:done], where.of(run.normed[event.module]))
        elif done:
            waiting.append((event, done, _slope(event, slopes, weights, where)))
            # Norms change the parts that are there.
            if norms or sum(len(rows) for _, _, rows in waiting) >= READERS:
                edges.add(waiting, parts[0, :done] - parts[1, :done] if norms else parts[0, :done], where)
                waiting = []
    if waiting:
        edges.add(waiting, parts[0, :done], where)


def _together(table: UnitNodes, stream: str) -> list[list[Reader]]:
    """The readers of a stream, those that read the same through the same norm together."""
    groups: dict[tuple[int, str | None, bool], list[Reader]] = {}
    for reader in table.readers:
        if reader.reading.stream == stream:
            key = reader.reading.time, reader.reading.norm, reader.site == "logits"
            groups.setdefault(key, []).append(reader)
    return list(groups.values())


def _slope(readers: list[Reader], runs: list[Trace], weights: Weights, where: Where) -> Tensor:
    """The metric's slope in what each node of readers together reads of the stream, `[R, N, M]`: its mean over runs."""
    total = _slope_of(readers, runs[0], weights, where)
    for run in runs[1:]:
        total += _slope_of(readers, run, weights, where)
    return total if len(runs) == 1 else total.div_(len(runs))


def _slope_of(readers: list[Reader], run: Trace, weights: Weights, where: Where) -> Tensor:
    slope = torch.cat([_behind_norm(reader, run, weights, where) for reader in readers])
    reading = readers[0].reading
    # The model's head reads the end of the stream, where the slope is known before the norm.
    if reading.norm is None or readers[0].site == "logits":
        return slope
    return weights.pulled_back(reading.norm, where.of(run.read[reading.stream, reading.time]), slope)


def _behind_norm(reader: Reader, run: Trace, weights: Weights, where: Where) -> Tensor:
    if reader.site in ("logits", "mlp"):
        return where.of(run.gradients[reader.unit]).unsqueeze(0)  # [1, N, M]
    rows = weights.attentions[reader.unit].rows[SITES.index(reader.site)]
    gradient = rows.of(where.of(run.gradients[rows.module]), dim=-1)  # [N, R, D]
    return torch.einsum("nrd,rdm->rnm", gradient, weights.rows(rows).to(gradient.dtype))
