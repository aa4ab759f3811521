"""Output graphs in any attention that ends in a projection of its concatenated heads: a hook before that projection.

For attention that calls no function of transformers' interface and is none of torch's or timm's: BLOOM, Falcon,
DeBERTa and the like, and modules people wrote themselves.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from gohgraph.attention.slots import HeadSlots, Slots
from gohgraph.convert import hidden_states
from gohgraph.convert.attention_interface import CHILD, HOOKS
from gohgraph.convert.blocks import Block, Search
from gohgraph.convert.trial_runs import device_of, dtype_for

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Where the projection is called so, and what the number of heads is called.
PROJECTIONS = ("o_proj", "out_proj", "c_proj", "proj", "to_out", "out_lin", "dense", "wo", "o", "output.dense")
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead")
SOURCES = "_head_graph_sources"
NO_SCORES = "its scores are out of reach: no attention interface"


class ProjectionGraphs(HeadSlots):
    """The head graphs before an output projection, which hands its input over; its module has them as a child."""

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Passes messages between heads concatenated in `z [*, H*D]` under the context `x [*, M]`."""
        heads = z.unflatten(-1, (self.num_heads, -1))  # [B, T, H, D]
        return self.pass_messages(heads, x, self.route(x)).flatten(-2)  # [B, T, H*D]


def find(model: nn.Module, search: Search, example: Any) -> None:
    """Adds modules called attention whose projection and number of heads bear a usual name."""
    for name, module in model.named_modules():
        if "attention" not in type(module).__name__.lower() or search.contains_or_is_inside(name):
            continue
        if isinstance(module, (HeadSlots, nn.MultiheadAttention)):
            continue
        heads, path = _num_heads(module), _projection(module)
        if heads is None or path is None or _features(module.get_submodule(path))[0] % heads:
            search.skipped.setdefault(name, f"{type(module).__name__}, whose heads or output projection are unknown")
            continue
        projection = module.get_submodule(path)
        inputs, outputs = _features(projection)
        attach = partial(give, module, path, heads)
        search.skipped.pop(name, None)
        like = torch.empty(0, dtype=dtype_for(projection.weight), device=device_of(projection))
        search.add(Block(name, heads, inputs // heads, outputs, like, projection, attach, NO_SCORES))


def undo(model: nn.Module) -> None:
    """Takes all head graphs before projections out; PEFT may have wrapped them, so they are known by their hooks."""
    for projection in model.modules():
        if SOURCES in vars(projection):
            for hook in vars(projection).pop(SOURCES) + vars(projection).pop(HOOKS):
                hook.remove()
            delattr(projection, CHILD)


def give(module: nn.Module, path: str, num_heads: int, **slots: Unpack[Slots]) -> None:
    """Gives head graphs to an attention module whose output projection has that path inside it."""
    projection = module.get_submodule(path)
    # Scores are out of its reach.
    graphs = ProjectionGraphs(num_heads, output_graph=slots.get("output_graph"), router=slots.get("router"))
    setattr(projection, CHILD, graphs)
    vars(projection)[HOOKS] = [projection.register_forward_pre_hook(_pass_messages)]
    vars(projection)[SOURCES] = hidden_states.note_for(module, path, required=True)


def _pass_messages(projection: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x = hidden_states.read(projection)
    if not isinstance(x, Tensor) or x.shape[:-1] != args[0].shape[:-1]:
        raise RuntimeError(
            "Expected hidden states of the tokens whose heads are projected (got none). Do convert the model with "
            "where= that leaves this attention out, or after its layers were wrapped."
        )
    return (getattr(projection, CHILD)(x, args[0]), *args[1:])


def _num_heads(module: nn.Module) -> int | None:
    for part in (module, *module.children()):
        for name in HEADS:
            if isinstance(getattr(part, name, None), int):
                return getattr(part, name)
    return None


def _projection(module: nn.Module) -> str | None:
    for path in PROJECTIONS:
        try:
            projection = module.get_submodule(path)
        except AttributeError:
            continue
        weight = getattr(projection, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dim() == 2:
            return path
    return None


def _features(projection: nn.Module) -> tuple[int, int]:
    """Widths in and out; transformers' Conv1D keeps its matrix the other way round."""
    rows, columns = cast(Tensor, projection.weight).shape
    return (columns, rows) if isinstance(projection, nn.Linear) else (rows, columns)
