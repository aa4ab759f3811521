"""Attention patterns of stock models, whatever computes their attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gohgraph.analysis.architectures import AttentionUnit, Wiring
from gohgraph.analysis.architectures.layouts import has
from gohgraph.analysis.learned_edges import HOLDER
from gohgraph.analysis.traces import Hooks, evaluating, run, trace


def attention_patterns(model: nn.Module, wiring: Wiring, inputs: Any) -> Iterator[tuple[AttentionUnit, Tensor]]:
    r"""Yields what every head attends to: units, in order, with `[B, H, T, S]`.

    The model's own attention is asked, which may never make a map: with values that are unit vectors of their tokens,

    .. math:: z_i(t) = \sum_s a_i(t, s)\, e_s = a_i(t, \cdot)

    is the pattern, D keys a pass. What is read out stays that of the plain run, so later layers see no difference.
    Where head graphs stand at outputs or values, the pattern is that of the heads before, or after, their messages.

    Raises:
        ValueError: what heads give is no average of values: messages between weights or gates stand between.
    """
    with evaluating(model):
        seen, _ = trace(model, wiring, inputs)
        for unit in wiring.attentions:
            keys = seen.read[unit.source.stream, unit.source.time].shape[1]
            parts = [_part(model, unit, inputs, start) for start in range(0, keys, unit.values.size)]
            pattern = torch.cat(parts, dim=-1)[..., :keys]  # [B, H, T, S]
            total = pattern.sum(dim=-1)
            if not bool(((total - 1).abs().lt(1e-2) | total.abs().lt(1e-2)).all()):
                raise ValueError(
                    f"Expected heads whose outputs are averages of values in {unit.name} (got weights that add up to "
                    f"{total.min():.3g} to {total.max():.3g}). Do leave out graphs at weights, and routers."
                )
            yield unit, pattern


class _Seen(Exception):
    """Nothing behind the layer that is looked at is needed."""


def _part(model: nn.Module, unit: AttentionUnit, inputs: Any, start: int) -> Tensor:
    """The pattern over D keys from `start`, `[B, H, T, D]`."""
    patterns: list[Tensor] = []

    def put(out: Tensor) -> Tensor:
        size, tokens = unit.values.size, out.shape[1]
        unit_vectors = torch.zeros(tokens, size, dtype=out.dtype, device=out.device)  # [S, D]
        count = max(0, min(size, tokens - start))
        unit_vectors[start : start + count, :count] = torch.eye(count, dtype=out.dtype, device=out.device)
        if out.dim() == 4:
            # What a graph between the values returns.
            return unit_vectors[:, None].expand_as(out)
        out, features = out.clone(), unit.values.of(torch.arange(out.shape[-1], device=out.device))  # [G, D]
        out[..., features.flatten()] = unit_vectors.repeat(1, unit.values.heads)
        return out

    def take(z: Tensor) -> None:
        heads = z.detach() if z.dim() == 4 else z.detach().unflatten(-1, (unit.queries.heads, -1))  # [B, T, H, D]
        patterns.append(heads.transpose(1, 2))  # [B, H, T, D]
        raise _Seen

    with Hooks(model) as hooks, torch.no_grad():
        hooks.on_output(_graph_of(model, unit, "inner_graphs.value") or unit.values.module, put)
        hooks.on_input(_graph_of(model, unit, "output_graph") or unit.output, take)
        try:
            run(model, inputs)
        except _Seen:
            pass
    return patterns[0]


def _graph_of(model: nn.Module, unit: AttentionUnit, slot: str) -> str | None:
    """The name of what stands at a site of our own attention, or of a converted one; `None` where nothing does."""
    names = (f"{unit.name}.{slot}", f"{unit.name}{HOLDER}.{slot}")
    return next((name for name in names if has(model, name)), None)
