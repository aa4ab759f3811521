"""What a conversion finds in a model and what it reports."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gohgraph.attention.block import MultiHeadAttention
from gohgraph.attention.call import Core
from gohgraph.attention.routing import HeadRouter
from gohgraph.attention.slots import HeadSlots, Slots
from gohgraph.common.modules import working_modules
from gohgraph.convert.trial_runs import dtype_for
from gohgraph.graphs.building import build_graph
from gohgraph.graphs.config import HeadGraphConfig
from gohgraph.graphs.protocol import SiteGraph, check_site

CONVERSION = "head_graph_conversion"
SLOTS = ("output_graph", "score_graph", "router")


@dataclass(frozen=True)
class Block:
    """An attention block that can take head graphs.

    Args:
        name: of its module in the model.
        num_heads, head_dim, d_model: H, D, and M of its context.
        weight_like: a tensor of the dtype and on the device that head graphs are to have.
        projection: the output projection, or `None` where it was not found.
        attach: puts slots into the block; takes `output_graph`, `score_graph` and `router`.
        no_scores: why it takes no score graph; empty where it does.
        allowed: what it can give graphs, as in `check_site`.
        core: of another library's attention that stays beneath, what it takes.
        inputs: makes arguments of its module, where it can be called by itself.
    """

    name: str
    num_heads: int
    head_dim: int
    d_model: int
    weight_like: Tensor
    projection: nn.Module | None
    attach: Callable[..., None]
    no_scores: str = ""
    allowed: Collection[str] = ("whole", "nonlinear")
    core: Core | None = None
    inputs: Callable[[], tuple[Tensor, ...]] | None = None


@dataclass(frozen=True)
class Conversion:
    """What was put into a model; a converted model carries it as `head_graph_conversion`.

    Args:
        config: the graphs of every block.
        sizes: H, D and M of every block, by the name of its attention module.
        projections: names of the output projections, by the same; those not found are left out.
    """

    config: HeadGraphConfig
    sizes: dict[str, tuple[int, int, int]]
    projections: dict[str, str]


@dataclass
class Search:
    """The attention blocks of a model that were found, and why others were not."""

    blocks: dict[str, Block] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def add(self, block: Block) -> None:
        """Takes in a block."""
        self.blocks[block.name] = block

    def contains_or_is_inside(self, name: str) -> bool:
        """Whether a block found stands at that name, inside it or around it."""
        prefixes = [other + "." for other in self.blocks]
        return any((name + ".").startswith(prefix) or prefix.startswith(name + ".") for prefix in prefixes)


@dataclass(frozen=True)
class Report:
    """What `convert` did.

    Args:
        model: the model, changed in place.
        replaced: names of the attention modules that have head graphs now, in model order.
        skipped: names of those that have not, with the reason.
        unchecked: names of those whose outputs before and after were not compared, with the reason.

    Example:
        >>> report = Report(nn.Linear(2, 3), ["attention"], {})
        >>> report.parameters, report.trainable
        (9, 9)
    """

    model: nn.Module
    replaced: list[str]
    skipped: dict[str, str]
    unchecked: dict[str, str] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Parameters of the model, head graphs included."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def head_graph_parameters(self) -> int:
        """Parameters of the head graphs and routers alone."""
        return sum(parameter.numel() for _, parameter in head_graph_parameters(self.model))

    @property
    def trainable(self) -> int:
        """Parameters that are trained."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def __str__(self) -> str:
        lines = [
            f"head graphs in {len(self.replaced)} attention modules: {self.head_graph_parameters:,} of "
            f"{self.parameters:,} parameters ({self.head_graph_parameters / max(1, self.parameters):.2%}), "
            f"{self.trainable:,} trainable ({self.trainable / max(1, self.parameters):.2%})"
        ]
        lines += [f"left as it was: {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines + [f"not compared: {name}: {reason}" for name, reason in self.unchecked.items()])


def build_slots(config: HeadGraphConfig, block: Block, layer: int) -> Slots:
    """Builds what `config` puts into a block, in its dtype and on its device."""
    sizes = (block.num_heads, block.head_dim, block.d_model)
    # Whatever the default device is: graphs go to that of their block.
    with torch.device("cpu"):
        slots = slots_of(config, sizes, layer)
        for site, graph in (("outputs", slots["output_graph"]), ("scores", slots["score_graph"])):
            if isinstance(graph, SiteGraph):
                check_site(site, graph, block.num_heads, block.allowed)
        _check_width(block, slots["score_graph"])
        return move(slots, block.weight_like.device, dtype_for(block.weight_like))


def move(slots: Slots, device: torch.device, dtype: torch.dtype) -> Slots:
    """Moves what stands in the slots, in place."""
    for module in slots.values():
        if isinstance(module, nn.Module):
            module.to(device, dtype)
    return slots


def _check_width(block: Block, score_graph: nn.Module | None) -> None:
    """Raises `ValueError` where wider heads are the only form and too wide for the attention beneath."""
    core = block.core
    if not isinstance(score_graph, SiteGraph) or core is None or not core.opaque or core.widest is None:
        return
    senders = score_graph.traits.most_senders
    if senders * block.head_dim > core.widest:
        raise ValueError(
            f"Expected a score graph of in-degree up to {core.widest // block.head_dim} in {block.name} (got {senders} "
            f"of size {block.head_dim}, where the attention beneath takes heads up to {core.widest}). Do use a "
            "sparser graph, or load the model with attn_implementation='sdpa'."
        )


def slots_of(config: HeadGraphConfig, sizes: tuple[int, int, int], layer: int) -> Slots:
    """Builds the slots of one attention block of sizes (H, D, M)."""
    routing, (num_heads, _, d_model) = config.routing, sizes
    return {
        "output_graph": build_graph(config.outputs, sizes),
        "score_graph": build_graph(config.scores, sizes),
        "router": None if routing is None else HeadRouter.from_config(routing, d_model, num_heads, layer=layer),
    }


def slots_at(model: nn.Module, name: str) -> HeadSlots:
    """Returns what holds the slots of the attention module of that name; of copies that PEFT keeps, the one in use."""
    return [module for _, module in working_modules(model.get_submodule(name)) if isinstance(module, HeadSlots)][-1]


def converted(model: nn.Module) -> tuple[nn.Module, Conversion]:
    """Returns the module that was converted, `model` or one inside it, and what was put into it.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        if CONVERSION in module.__dict__:
            return module, module.__dict__[CONVERSION]
    raise ValueError(f"Expected a converted model (got {type(model).__name__}, which is not). Do convert it first.")


def head_slots(model: nn.Module) -> dict[str, HeadSlots]:
    """Returns everything in a model that holds slots for head graphs, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, HeadSlots)}


def head_graph_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Returns the parameters of the slots of a converted model, or of our own attention blocks, by name."""
    holders = [module for _, module in working_modules(model) if isinstance(module, (HeadSlots, MultiHeadAttention))]
    inside = {id(p) for holder in holders for slot in _slots_in(holder) for p in slot.parameters()}
    return [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) in inside]


def _slots_in(holder: Any) -> list[nn.Module]:
    inner = getattr(holder, "inner_graphs", None)
    slots = [getattr(holder, name) for name in SLOTS]
    return [slot for slot in slots if slot is not None] + ([] if inner is None else [inner])
