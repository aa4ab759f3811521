"""Which head could read which, by weights alone: the composition scores of all heads as a network."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gohgraph.analysis.architectures import AttentionUnit, Rows, Wiring, wiring_of
from gohgraph.analysis.architectures.norms import Gain, gain_of
from gohgraph.analysis.architectures.weights import Folder, Modules, linear_weight, modules_of
from gohgraph.analysis.architectures.wiring import SITES
from gohgraph.analysis.learned_edges import LearnedGraph, learned_graphs
from gohgraph.analysis.strength import edge_strength
from gohgraph.analysis.unit_network import Reader, UnitNodes, Writer, network_of
from gohgraph.common.checks import check_bool, check_int

if TYPE_CHECKING:
    from gohgraph.analysis.network import HeadNetwork

KINDS = {site[0]: site for site in SITES}


def composition_graph(
    model: nn.Module | str | os.PathLike[str], kinds: str = "qkv", *, components: int | None = None,
    learned: bool = True,
) -> HeadNetwork:  # fmt: skip
    r"""Returns which head could read which in a pretrained model: composition scores of all pairs, by weights alone.

    .. math::
        C(u \to r) = \frac{\| W_{OV}^u \, W_r \|_F}{\| W_{OV}^u \|_F \, \| W_r \|_F}, \qquad
        W_r = W_Q W_K^T,\; W_K W_Q^T \text{ or } W_V W_O

    for Q-, K- and V-composition, with rows acting on the stream from the left. Scores are in [0, 1]. Norms' gains are
    folded into the weights that read through them, means that a LayerNorm subtracts are taken out of both sides,
    norms after a block (Gemma, BERT) into what is written; their scales cancel. With fewer key/value heads than query
    heads these are nodes of their own, and W_r is that of all query heads of the group, side by side.

    Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; components: Merullo et al. 2024,
    arXiv 2406.09519. Scores come from triangular factors of D x D: no product is M x M, and the weights of no more than
    two layers are there at once.

    Args:
        model: see `wiring_of` for the architectures; or a folder of transformers with safetensors, which is read layer
            by layer, so that the model is never loaded.
        kinds: of "q", "k" and "v", which edges there are: sites "queries", "keys" and "values".
        components: so many leading singular components of both matrices are compared, instead of the whole, in which
            much is noise; from 1 to D.
        learned: edges of head graphs are edges of the network too, with `edge_strength`, their size by weights alone.

    Returns:
        The network, whose `mean` is the score; `std` is 0.

    Raises:
        ValueError: an unknown kind; a model whose layers are not known, or whose weights are elsewhere; with `learned`,
            a head graph of several rounds, keyed or with norms.

    Example:
        >>> import gohgraph as goh
        >>> model = goh.LanguageModel(goh.TransformerConfig(9, d_model=8, num_heads=2, num_layers=2, d_ff=8))
        >>> network = composition_graph(model)
        >>> network.num_edges, sorted(set(network.site)), bool((network.mean <= 1).all())
        (12, ['keys', 'queries', 'values'], True)
    """
    if not kinds or set(kinds) - set(KINDS):
        raise ValueError(f"Expected kinds of 'q', 'k' and 'v' (got {kinds!r}). Do pass e.g. 'qkv'.")
    check_bool("learned", learned)
    if components is not None:
        check_int("components", components, low=1)
    modules: Modules
    graphs: list[LearnedGraph] = []
    strengths: dict[str, Tensor] = {}
    if isinstance(model, nn.Module):
        wiring, modules = wiring_of(model), modules_of(model)
        graphs = learned_graphs(model, wiring) if learned else []
        strengths = edge_strength(model) if graphs else {}
    else:
        modules = Folder(model)
        wiring = wiring_of(modules.model)
    nodes = UnitNodes(wiring, learned=graphs)
    units = {unit.name: unit for unit in wiring.attentions}
    values: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        for name in tqdm(units, desc="composition", unit="layer", disable=None, leave=False):
            readers = [r for r in nodes.readers if r.unit == name and r.site[0] in kinds and nodes.edges_into(r)]
            if readers:
                by_site = _scores(readers, units, wiring, modules, nodes, components)
                values |= {(name, site): (scores, torch.zeros_like(scores)) for site, scores in by_site.items()}
    return network_of(nodes, values, {one.name: (s := strengths[one.name], torch.zeros_like(s)) for one in graphs})


class _Side(NamedTuple):
    """What a reader's site does to what it reads: `[M, R*k]`, the norm of each, and whether means are not seen."""

    core: Tensor
    sizes: Tensor
    centred: bool
    heads: int


def _scores(
    readers: list[Reader], units: dict[str, AttentionUnit], wiring: Wiring, modules: Modules, nodes: UnitNodes,
    components: int | None,
) -> dict[str, Tensor]:  # fmt: skip
    """The scores `[W, R]` of every reader of one unit, by its site."""
    unit = units[readers[0].unit]
    sides = {reader.site: _side(reader.site, unit, modules, components) for reader in readers}
    scores_of: dict[str, list[Tensor]] = {reader.site: [] for reader in readers}
    # Readers of one stream and time have the same writers.
    everyone = {writer.unit: writer for reader in readers for writer in nodes.edges_into(reader)}
    for name, writer in everyone.items():
        written = _written(units[name], modules, components)  # [H, k, M]
        for reader in readers:
            if writer in nodes.edges_into(reader):
                arriving = _arriving(written, writer, reader, wiring, modules)
                scores_of[reader.site].append(_compare(arriving, sides[reader.site]))
    return {site: torch.cat(scores) for site, scores in scores_of.items()}


def _compare(written: Tensor, side: _Side) -> Tensor:
    """Scores `[H, R]` of what heads write, `[H, k, M]`."""
    if side.centred:
        written = written - written.mean(dim=-1, keepdim=True)
    squares = (written.flatten(0, 1) @ side.core).square()  # [H*k, R*n]
    size = written.flatten(1).norm(dim=1)  # [H]
    squares = squares.unflatten(0, written.shape[:2]).unflatten(-1, (side.heads, -1))  # [H, k, R, n]
    scale = size[:, None] * side.sizes  # [H, R]
    return squares.sum(dim=(1, 3)).sqrt() / scale.clamp(min=torch.finfo(scale.dtype).tiny)


def _arriving(written: Tensor, writer: Writer, reader: Reader, wiring: Wiring, modules: Modules) -> Tensor:
    """What a writer wrote as it is after the norms on the stream between the two."""
    for norm in wiring.norms_between(writer.stream, writer.time, reader.reading.time):
        written = _gain(norm.module, modules, written)(written)
    return written


def _written(unit: AttentionUnit, modules: Modules, components: int | None) -> Tensor:
    """The part of W_OV that its products need, `[H, k, M]`: |R_V O X| = |V O X| where V = U R_V."""
    value = _read(unit.values, unit.source.norm, None, modules)  # [G, D, M]
    triangles = _triangle(value).repeat_interleave(unit.queries.heads // unit.values.heads, dim=0)  # [H, D, D]
    core = triangles @ _output(unit, modules)  # [H, D, M]
    return core if components is None else _leading(core, components)


def _side(site: str, unit: AttentionUnit, modules: Modules, components: int | None) -> _Side:
    """|Y W_r| = |Y core|: what reads, times the triangular factor of what that is multiplied with."""
    if site == "values":
        reads = _read(unit.values, unit.source.norm, None, modules)  # [G, D, M]
        other = _of_groups(_triangle(_output(unit, modules)), unit.values.heads)  # [G, D, D]
    else:
        queries = _read(unit.queries, unit.reads.norm, unit.query_norm, modules)  # [H, D, M]
        keys = _read(unit.keys, unit.source.norm, unit.key_norm, modules)  # [G, D, M]
        if site == "queries":
            reads = queries
            other = _triangle(keys).repeat_interleave(unit.queries.heads // unit.keys.heads, dim=0)  # [H, D, D]
        else:
            reads, other = keys, _of_groups(_triangle(queries), unit.keys.heads)
    core = other @ reads  # [R, D, M]
    core = core if components is None else _leading(core, components)
    norm = (unit.reads if site == "queries" else unit.source).norm
    centred = norm is not None and gain_of(modules(norm), core.shape[-1]).centred
    sizes = core.flatten(1).norm(dim=1)  # [R]
    return _Side(core.flatten(0, 1).t().contiguous(), sizes, centred, len(core))


def _output(unit: AttentionUnit, modules: Modules) -> Tensor:
    """W_O by head with the gain of a norm behind it, `[H, D, M]`, without means where LayerNorms read the stream."""
    output = _wide(linear_weight(modules(unit.output))).t()  # [H*D, M]
    output = output.unflatten(0, (unit.queries.heads, unit.values.size))  # [H, D, M]
    if unit.post_norm is not None:
        output = _gain(unit.post_norm, modules, output)(output)
    centred = unit.reads.norm is not None and _gain(unit.reads.norm, modules, output).centred
    return output - output.mean(dim=-1, keepdim=True) if centred else output


def _read(rows: Rows, norm: str | None, own_norm: str | None, modules: Modules) -> Tensor:
    """Weights `[heads, D, M]` with the gains of the norm before and, of queries and keys, behind."""
    weight = rows.of(_wide(linear_weight(modules(rows.module))))  # [heads, D, M]
    if norm is not None:
        weight = _gain(norm, modules, weight).into(weight)
    if own_norm is not None:
        gain = _gain(own_norm, modules, None)
        features = weight.flatten(0, 1) if len(gain.weight) != rows.size else weight  # [heads*D, M] or [heads, D, M]
        weight = gain(features.mT).mT.reshape(weight.shape)
    return weight


def _gain(norm: str, modules: Modules, like: Tensor | None) -> Gain:
    module = modules(norm)
    width = like.shape[-1] if like is not None else next(module.parameters()).numel()
    gain = gain_of(module, width)
    return gain._replace(weight=_wide(gain.weight))


def _triangle(weight: Tensor) -> Tensor:
    """R `[heads, D, D]` of weights `[heads, D, M]`: |W X| = |R X| for the columns' space."""
    return torch.linalg.qr(weight.mT, mode="r").R


def _of_groups(triangles: Tensor, groups: int) -> Tensor:
    """The triangular factor of all heads of a group side by side, `[H, D, D]` -> `[G, D, D]`."""
    if len(triangles) == groups:
        return triangles
    stacked = triangles.unflatten(0, (groups, -1)).flatten(1, 2)  # [G, n*D, D]
    return torch.linalg.qr(stacked, mode="r").R


def _leading(core: Tensor, components: int) -> Tensor:
    """The leading right singular vectors times their values, `[R, D, M]` -> `[R, k, M]`."""
    _, values, vectors = torch.linalg.svd(core, full_matrices=False)
    return values[:, :components, None] * vectors[:, :components]


def _wide(weight: Tensor) -> Tensor:
    return weight if weight.dtype == torch.float64 else weight.float()
