"""The learned edges of head graphs beside those of the residual stream: what each one carried in a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gohgraph.analysis.architectures.wiring import AttentionUnit, Wiring
from gohgraph.analysis.module_names import block_of, family_of, layer_of, site_of
from gohgraph.attention.block import MultiHeadAttention
from gohgraph.common.modules import working_modules
from gohgraph.graphs.cross_layer import layers_read, reached
from gohgraph.graphs.edge_graph import EdgeGraph
from gohgraph.graphs.protocol import MAPS

# What holds the head graphs of a converted attention module, inside it.
HOLDER = ".head_graphs"
# Sites whose nodes are key/value heads, of the tokens that are attended to.
OF_KEYS = ("keys", "values")
# Numbers of one block of messages, [tokens, E, F].
BLOCK = 1 << 24


@dataclass(frozen=True)
class LearnedGraph:
    """A head graph in an attention block whose edges are edges of the network.

    Args:
        name: of its module; `site`: where it stands.
        conv: the graph.
        units: of its own attention block, then of the earlier layers whose heads send, in the order of its senders.
    """

    name: str
    site: str
    conv: EdgeGraph
    units: tuple[AttentionUnit, ...]

    @property
    def stream(self) -> str:
        """The residual stream whose tokens its messages stay with."""
        unit = self.units[0]
        return (unit.source if self.site in OF_KEYS else unit.reads).stream

    @cached_property
    def edges(self) -> Tensor:
        return self.conv.edge_index.detach().cpu()  # [2, E]


class Sent(NamedTuple):
    """What the edges of a head graph carried: m_e(t) = alpha_e(t) * node_e(t).

    Args:
        alpha: `[B, T, E]`, the weights.
        nodes: `[B, T, N, F]`, the senders, or a message for every edge.
        senders: `[E]`, of every edge its row of `nodes`.
    """

    alpha: Tensor
    nodes: Tensor
    senders: Tensor

    def messages(self, example: int, tokens: Tensor) -> Tensor:
        """Returns those of some tokens of an example, `[n, E, F]`."""
        nodes = self.nodes[example, tokens].index_select(1, self.senders)  # [n, E, F]
        return self.alpha[example, tokens].unsqueeze(-1) * nodes

    def received(self, receivers: Tensor, heads: int, chosen: Tensor | None = None) -> Tensor:
        """Returns what H heads receive over the chosen edges (bool `[E]`, `None` for all), `[B, T, H, F]`."""
        alpha = self.alpha if chosen is None else self.alpha * chosen.to(self.alpha.dtype)
        senders = self.nodes.shape[2]
        cells = alpha.new_zeros(*alpha.shape[:2], heads * senders)
        cells.index_add_(-1, receivers * senders + self.senders, alpha)
        return cells.unflatten(-1, (heads, senders)) @ self.nodes  # [B, T, H, F]


def learned_graphs(model: nn.Module, wiring: Wiring) -> list[LearnedGraph]:
    """Returns the head graphs of a model whose edges can stand in the network beside those of its residual stream.

    Raises:
        ValueError: a graph whose messages are no sum of single edges' in one round, or which stands elsewhere; it says
            why.
    """
    units = {unit.name: unit for unit in wiring.attentions}
    return [
        _learned(model, name, module, units) for name, module in working_modules(model) if isinstance(module, EdgeGraph)
    ]


def _learned(model: nn.Module, name: str, conv: EdgeGraph, units: dict[str, AttentionUnit]) -> LearnedGraph:
    holder, site = block_of(name), site_of(name)
    block = holder.removesuffix(HOLDER)
    names = [block]
    if conv.num_senders > conv.num_heads:
        before = layers_read(conv.traits.reach, layer_of(block) or 0)[: conv.num_senders // conv.num_heads - 1]
        names += [family_of(block).replace("*", str(layer)) for layer in before]
    known = [_unit(one, units) for one in names]
    missing = (
        f"{conv.rounds} rounds" if conv.rounds > 1
        else "keyed edges" if conv.traits.keyed
        else "norm=True" if conv.gain is not None
        else f"an attention block that is not known, {block}" if None in known
        else f"messages between {site} in a converted model"
        if site in MAPS and not isinstance(model.get_submodule(holder), MultiHeadAttention)
        else ""
    )  # fmt: skip
    if missing:
        raise _refusal(name, missing)
    return LearnedGraph(name, site, conv, tuple(unit for unit in known if unit is not None))


def _unit(block: str, units: dict[str, AttentionUnit]) -> AttentionUnit | None:
    """The attention unit of a block, which may be inside of it (BERT: `attention.self`)."""
    return units.get(block, units.get(block.rpartition(".")[0]))


def _refusal(name: str, missing: str) -> ValueError:
    return ValueError(
        f"Expected head graphs whose nodes receive the sum of their edges' messages in one round (got {missing} at "
        f"{name}). Do pass learned=False (`gohgraph draw`: --no-learned): their messages are then part of what heads "
        "write."
    )


@contextmanager
def on_whole_maps(model: nn.Module, graphs: Sequence[LearnedGraph]) -> Iterator[None]:
    """Makes attention hold its maps where head graphs stand between them, so that their messages can be seen."""
    blocks: dict[str, Any] = {
        graph.units[0].name: model.get_submodule(graph.units[0].name) for graph in graphs if graph.site in MAPS
    }
    before = {name: block.form for name, block in blocks.items()}
    for block in blocks.values():
        block.form = "maps"
    try:
        yield
    finally:
        for name, block in blocks.items():
            block.form = before[name]


def sent(graph: LearnedGraph, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor | None = None) -> Sent:
    """Returns what the edges of a graph carried in one call; with `out`, what it returned, checks that they make it."""
    left_out: tuple[Any, ...] = (None, None, (), None)
    nodes, context, earlier, active = (*args, *left_out[len(args) :])
    context, active = kwargs.get("context", context), kwargs.get("active", active)
    with torch.no_grad():
        conv: Any = graph.conv
        tokens = nodes.shape[:-2]
        alpha = conv.edge_weight(context, 0, active).to(nodes.dtype).expand(*tokens, -1)  # [B, T, E]
        senders = torch.cat((nodes, *reached(earlier, conv.traits.reach)), dim=-2)  # [B, T, N, F]
        found = Sent(alpha.detach(), senders.detach(), conv.edge_index[0])
        if out is not None:
            again = nodes + found.received(conv.edge_index[1], conv.num_heads)
            size = out.abs().max().clamp(min=torch.finfo(out.dtype).tiny)
            if again.shape != out.shape or (again - out).abs().max() > 1e-3 * size:
                raise _refusal(graph.name, f"{type(conv).__name__}, which does more")
    return found


def in_its_place(what: str, seen: Sent, mask: Tensor) -> Sent:
    """Returns what takes the place of messages: "zero", or their mean over the real tokens (`[B, T]`) of a batch."""
    if what == "zero":
        return seen._replace(alpha=torch.zeros_like(seen.alpha))
    count = mask.sum(dim=0).clamp(min=1)[:, None, None]
    total: Any = 0
    for example in range(len(mask)):
        messages = seen.messages(example, torch.arange(mask.shape[1], device=mask.device))
        total = total + torch.where(mask[example, :, None, None], messages, 0.0)  # [T, E, F]
    nodes = (total / count).expand(len(mask), -1, -1, -1)  # [B, T, E, F]
    return Sent(torch.ones_like(seen.alpha), nodes, torch.arange(nodes.shape[2], device=nodes.device))


def worth(graph: LearnedGraph, runs: tuple[Sent, Sent], slope: Tensor, example: int, mask: Tensor) -> Tensor:
    """Returns what every edge's message in place of the other run's is worth at every token, `[E, T]` on the CPU.

    Args:
        runs: the clean and the other one.
        slope: of the metric, in what the graph returned, `[B, T, H, F]`.
        mask: the real tokens of the example, `[T]`.
    """
    receivers, tokens = graph.conv.edge_index[1], mask.nonzero().flatten()
    size = graph.edges.shape[1] * slope.shape[-1]
    of_edges = torch.zeros(graph.edges.shape[1], len(mask), dtype=torch.double)
    for part in tokens.split(max(1, BLOCK // max(1, size))):
        change = runs[0].messages(example, part) - runs[1].messages(example, part)  # [n, E, F]
        at = slope[example, part].index_select(1, receivers)  # [n, E, F]
        of_edges[:, part.cpu()] = (change * at).sum(dim=-1).T.cpu().double()
    return of_edges
