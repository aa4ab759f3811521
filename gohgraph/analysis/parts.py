"""The parts of a residual stream: what every node has written, carried through the norms that stand on it."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from gohgraph.analysis.architectures.norms import Gain, gain_of, pulled_back, scale_of
from gohgraph.analysis.architectures.weights import linear_weight
from gohgraph.analysis.architectures.wiring import AttentionUnit, Rows, Wiring
from gohgraph.analysis.traces import Trace
from gohgraph.analysis.unit_network import Writer


class Weights:
    """Weights and gains of a model's units, asked for once."""

    def __init__(self, model: nn.Module, wiring: Wiring, width: int) -> None:
        self.model, self.wiring, self.width = model, wiring, width
        self._gains: dict[str, Gain] = {}
        # By norm, whether its derivative has the form that is computed fast.
        self._is_usual: dict[str, bool] = {}
        self._modules: dict[str, nn.Module] = {}
        self.attentions = {unit.name: unit for unit in wiring.attentions}
        self.feed_forwards = {unit.name: unit for unit in wiring.feed_forwards}

    def module(self, name: str) -> nn.Module:
        """The model's own."""
        if name not in self._modules:
            self._modules[name] = self.model.get_submodule(name)
        return self._modules[name]

    def rows(self, rows: Rows) -> Tensor:
        """The weights of a unit's queries, keys or values by head, `[R, D, M]`."""
        return rows.of(linear_weight(self.module(rows.module)))

    def output(self, unit: AttentionUnit) -> Tensor:
        """W_O by head, `[H, D, M]`."""
        weight = linear_weight(self.module(unit.output)).t()  # [H*D, M]
        return weight.unflatten(0, (unit.queries.heads, unit.values.size))

    def gain(self, norm: str) -> Gain:
        if norm not in self._gains:
            self._gains[norm] = gain_of(self.module(norm), self.width)
        return self._gains[norm]

    def carried(self, norm: str, parts: Tensor, x: Tensor) -> Tensor:
        """Parts `[W, N, M]` of `x [N, M]` behind a norm whose scale is that of x."""
        gain = self.gain(norm)
        return gain(parts) * scale_of(self.module(norm), x, gain)

    def pulled_back(self, norm: str, x: Tensor, slopes: Tensor) -> Tensor:
        """The transposed derivative of a norm at `x [N, M]`, times slopes `[R, N, M]`, which are overwritten."""
        gain, scale = self.gain(norm), scale_of(self.module(norm), x, self.gain(norm))
        if norm not in self._is_usual:
            exact = self._by_autograd(norm, x, slopes[:1])
            limit = torch.finfo(exact.dtype).eps ** 0.5 * exact.abs().max()
            usual = pulled_back(gain, scale, x, slopes[:1].clone())
            self._is_usual[norm] = bool((usual - exact).abs().max() <= limit)
        return pulled_back(gain, scale, x, slopes) if self._is_usual[norm] else self._by_autograd(norm, x, slopes)

    def _by_autograd(self, norm: str, x: Tensor, slopes: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.expand_as(slopes).detach().requires_grad_()
            # Its `forward`, which no hook sees.
            return torch.autograd.grad(self.module(norm).forward(x), x, slopes)[0]


class Tokens(Protocol):
    """Some tokens of a batch."""

    def of(self, values: Tensor) -> Tensor:
        """Returns `[B, T, F]` at these tokens, `[N, F]`."""


class Where(NamedTuple):
    """Tokens of one example: its number in the batch, and their places `[N]`."""

    example: int
    tokens: Tensor

    def of(self, values: Tensor) -> Tensor:
        """Returns `[B, T, F]` at these tokens, `[N, F]`."""
        return values[self.example].index_select(0, self.tokens)


def written(writer: Writer, seen: Trace, weights: Weights, where: Tokens) -> Tensor:
    """Returns what every node of a writer added to its stream, `[W, N, M]`."""
    if writer.time < 0:
        return where.of(seen.read[writer.stream, -1]).unsqueeze(0)
    if writer.unit in weights.feed_forwards:
        return where.of(seen.wrote[writer.unit]).unsqueeze(0)
    unit = weights.attentions[writer.unit]
    parts = _read_out(unit, where.of(seen.heads[unit.name]), weights)
    if unit.post_norm is not None:
        parts = weights.carried(unit.post_norm, parts, where.of(seen.normed[unit.name]))
    return parts


def changed(writer: Writer, runs: tuple[Trace, Trace], weights: Weights, where: Where) -> Tensor:
    """Returns how two runs differ in what every node of a writer added to its stream, `[W, N, M]`."""
    unit = weights.attentions.get(writer.unit) if writer.time >= 0 else None
    if unit is not None and unit.post_norm is None:
        first, second = (where.of(run.heads[unit.name]) for run in runs)
        return _read_out(unit, first - second, weights)
    first, second = (written(writer, run, weights, where) for run in runs)
    return first - second


def _read_out(unit: AttentionUnit, heads: Tensor, weights: Weights) -> Tensor:
    """Heads' outputs `[N, H*D]` through W_O, `[H, N, M]`."""
    by_head = heads.unflatten(-1, (unit.queries.heads, -1))  # [N, H, D]
    return torch.einsum("nhd,hdm->hnm", by_head, weights.output(unit).to(heads.dtype))
