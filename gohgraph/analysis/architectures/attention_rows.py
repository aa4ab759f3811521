"""Where the weights of queries, keys, values and the output lie in an attention module."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from gohgraph.analysis.architectures.layouts import has
from gohgraph.analysis.architectures.wiring import Rows

SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("self.query", "self.key", "self.value"),
    ("q", "k", "v"),
)
OUTPUTS = ("o_proj", "out_proj", "output", "output.dense", "dense", "c_proj", "o")
SIZES = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim")


class AttentionRows(NamedTuple):
    """The rows of queries, keys and values, and the name of the output projection."""

    queries: Rows
    keys: Rows
    values: Rows
    output: str


def attention_rows(name: str, attention: nn.Module) -> AttentionRows | str:
    """Returns where an attention module's weights lie, by module names in the model, or what is missing."""
    places = [attention, *(attention.get_submodule(p) for p in ("self",) if has(attention, p))]
    size = next((getattr(place, s) for place in places for s in SIZES if hasattr(place, s)), None)
    if not isinstance(size, int):
        return f"the size of a head ({', '.join(SIZES)})"
    output = next((path for path in OUTPUTS if has(attention, path) and features(attention.get_submodule(path))), None)
    if output is None:
        return f"an output projection ({', '.join(OUTPUTS)})"
    rows = _separate(name, attention, size) or _fused(name, attention, size)
    if rows is None:
        return "projections of queries, keys and values (separate, c_attn or query_key_value)"
    queries, keys, values = rows
    if queries.heads % keys.heads or keys.heads != values.heads:
        return f"key/value heads that divide the query heads ({queries.heads}, {keys.heads}, {values.heads})"
    sizes = features(attention.get_submodule(output))
    if sizes is None or sizes[0] != queries.heads * values.size:
        return f"an output projection of {queries.heads} heads of size {values.size}"
    return AttentionRows(queries, keys, values, f"{name}.{output}")


def features(module: nn.Module) -> tuple[int, int] | None:
    """Returns the input and output features of a linear map, or `None` of anything else."""
    for names in (("in_features", "out_features"), ("nx", "nf")):
        if all(isinstance(getattr(module, name, None), int) for name in names):
            return getattr(module, names[0]), getattr(module, names[1])
    return None


def _separate(name: str, attention: nn.Module, size: int) -> list[Rows] | None:
    for paths in SEPARATE:
        if all(has(attention, path) for path in paths):
            widths = [sizes[1] for path in paths if (sizes := features(attention.get_submodule(path)))]
            if len(widths) == len(paths) and not any(width % size for width in widths):
                return [Rows(f"{name}.{path}", out // size, size) for path, out in zip(paths, widths, strict=True)]
    return None


def _fused(name: str, attention: nn.Module, size: int) -> list[Rows] | None:
    # GPT-2's map is [queries | keys | values], GPT-NeoX's the same within every head.
    for path, by_head in (("c_attn", False), ("query_key_value", True)):
        size_of = features(attention.get_submodule(path)) if has(attention, path) else None
        if size_of is None or size_of[1] % (3 * size):
            continue
        return [Rows(f"{name}.{path}", size_of[1] // (3 * size), size, part, by_head) for part in range(3)]
    return None
