"""Where a head graph stands in a model, by its module name: in which attention block, and at which of its sites."""

import re
from collections.abc import Iterable, Mapping, Sequence

# What the slots of `MultiHeadAttention` are called in titles, in the order of drawing.
SITES = {
    "output_graph": "outputs",
    "score_graph": "scores",
    "inner_graphs.weight": "weights",
    "inner_graphs.query": "queries",
    "inner_graphs.key": "keys",
    "inner_graphs.value": "values",
}
# In a chain of modules at one site a last number tells which of them.
_SITE = re.compile(rf"(^|\.)({'|'.join(map(re.escape, SITES))})(\.\d+)?$")
# T5 numbers the parts of a block, too: "block.3.layer.1.EncDecAttention" is cross attention of layer 3.
_NUMBER = re.compile(r"\.block\.(\d+)\.layer\.\d+(?=\.|$)|\.(\d+)(?=\.|$)")
_CROSS = re.compile("cross|EncDec")


def site_of(name: str) -> str:
    """Returns the site of a graph: "outputs" where its name tells nothing.

    Example:
        >>> site_of("decoder.layers.0.attention.object.score_graph")
        'scores'
    """
    match = _SITE.search(name)
    return SITES[match[2]] if match else "outputs"


def block_of(name: str) -> str:
    """Returns the name of the attention block a graph is part of.

    Example:
        >>> block_of("decoder.layers.0.attention.object.output_graph.1")
        'decoder.layers.0.attention.object'
    """
    return _SITE.sub("", name)


def layer_of(block: str) -> int | None:
    """Returns the number of a block's layer, the last one in its name; `None` where there is none.

    Example:
        >>> layer_of("decoder.layers.3.attention.object"), layer_of("decoder.block.3.layer.1.EncDecAttention")
        (3, 3)
    """
    found = _last_number(block)
    return None if found is None else int(found[found.lastindex or 0])


def family_of(block: str) -> str:
    """Returns a block's name without its layer's number: blocks of one family follow each other in a stack.

    Example:
        >>> family_of("decoder.layers.3.attention.object")
        'decoder.layers.*.attention.object'
    """
    found = _last_number(block)
    if found is None:
        return block
    start, end = found.span(found.lastindex or 0)
    return f"{block[: start - 1]}*{block[end - 1 :]}"


def _last_number(block: str) -> re.Match[str] | None:
    return next(reversed(list(_NUMBER.finditer(f".{block}"))), None)


def block_titles(blocks: Sequence[str]) -> list[str]:
    """Returns short titles of attention blocks: "layer 0", with the name of the stack where that is needed.

    Example:
        >>> block_titles(["encoder.layers.0.attention", "decoder.layers.0.attention"])
        ['encoder layer 0', 'decoder layer 0']
    """
    return _short(blocks, blocks, [""] * len(blocks))


def named_blocks(blocks: Iterable[str]) -> dict[str, str]:
    """Returns the titles of attention blocks by their names, each once."""
    names = list(dict.fromkeys(blocks))
    return dict(zip(names, block_titles(names), strict=True))


def of_layer(titles: Mapping[str, str], layer: int | str | None) -> list[str]:
    """Returns the names of the attention blocks of a layer, all of them for `None`.

    Args:
        titles: of all blocks, by their names.
        layer: its number, or the title of a block where several have that.

    Raises:
        ValueError: there is none of that layer.

    Example:
        >>> of_layer({"decoder.layers.0.attention": "decoder layer 0"}, 0)
        ['decoder.layers.0.attention']
    """
    names = [name for name, title in titles.items() if layer is None or layer in (title, layer_of(name))]
    if not names and layer is not None:
        known = list(titles.values())
        raise ValueError(f"Expected a layer of {known} (got {layer}). Do choose one of them, or its number.")
    return names


def graph_titles(names: Sequence[str]) -> list[str]:
    """Returns short titles of head graphs by their module names: "layer 0 outputs" and the like.

    The name of the stack precedes where several stacks have such layers; where that does not tell them apart, titles
    are the names themselves.

    Example:
        >>> graph_titles(["decoder.layers.0.attention.object.score_graph"])
        ['layer 0 scores']
    """
    return _short(names, [block_of(name) for name in names], [site_of(name) for name in names])


def _short(names: Sequence[str], blocks: Sequence[str], sites: Sequence[str]) -> list[str]:
    layers = [layer_of(block) for block in blocks]
    crosses = ["cross" if _CROSS.search(name) else "" for name in names]
    short = [
        name if layer is None else " ".join(filter(None, [f"layer {layer}", cross, site]))
        for name, layer, cross, site in zip(names, layers, crosses, sites, strict=True)
    ]
    long = [f"{name.split('.')[0]} {title}" for name, title in zip(names, short, strict=True)]
    for titles in (short, long):
        if len(set(titles)) == len(titles):
            return titles
    return list(names)
