"""What ranks do to compare a sharded head graph with the whole one; each function runs on every rank of a group."""

from __future__ import annotations

import copy
from typing import Any

import torch
from helpers import trained_like
from parallel_checks import INTO_ONE, OPTIONS
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from gohgraph import HeadGraphConv, SiteConfig
from gohgraph.graphs.cross_layer import CrossLayer
from gohgraph.graphs.topologies import TOPOLOGIES
from gohgraph.parallel.sharded_graph import ShardedHeadGraphConv

HEADS, HEAD_DIM, WIDTH, TOKENS = 8, 3, 7, 5
DEEP = {"rounds": 2, "cross_layer": 1, "norm": True}
SITES = {name: SiteConfig(name, OPTIONS.get(name, {})) for name in TOPOLOGIES} | {
    "into one": SiteConfig(INTO_ONE, self_loops=False, **DEEP),
    "out of one": SiteConfig([(0, i) for i in range(HEADS)], **DEEP),
    "low rank": SiteConfig("star", rank=2, rounds=2, norm=True),
    "static": SiteConfig.ring(3, edges="static", activation=None),
    "frozen": SiteConfig.ring(2, edges="frozen"),
    "top edges": SiteConfig("small-world", top_edges=2),
    "pyg": SiteConfig(backend="pyg"),
    "across layers": SiteConfig.ring(3, rounds=2, cross_layer=CrossLayer("first", "all-pairs", scale=0.1)),
    "same head": SiteConfig("empty", rounds=2, edges="static", cross_layer=CrossLayer(1, "same-head", scale=0)),
}


def check_sites(rank: int) -> list[str]:
    """Compares every graph, on a mesh and in its process group, over outputs and over scores; returns which."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    checked = []
    for name, site in SITES.items():
        for ranks in (mesh, mesh.get_group()):
            for over_maps in (False, True) if site.rounds == 1 else (False,):
                _check(site, ranks, over_maps=over_maps)
                checked.append(f"{name}, {type(ranks).__name__}, over maps {over_maps}")
    return checked


def _check(site: SiteConfig, ranks: Any, *, over_maps: bool) -> None:
    torch.manual_seed(3)
    whole = trained_like(HeadGraphConv.from_config(site, HEADS, HEAD_DIM, WIDTH, layer=1))
    graph = ShardedHeadGraphConv(copy.deepcopy(whole), ranks, over_maps=over_maps)
    heads = list(graph.exchange.heads_of(graph.group.rank()))
    # Queries and keys, or head outputs of this layer and of those before.
    nodes = [torch.randn(TOKENS, HEADS, HEAD_DIM).double() for _ in range(2 if over_maps else 1 + whole.cross_layer)]
    context, active = torch.randn(TOKENS, WIDTH).double(), torch.rand(TOKENS, HEADS) < 0.7
    weights = torch.randn(TOKENS, HEADS, TOKENS if over_maps else HEAD_DIM).double()
    expected, of_inputs, of_parameters = _run(whole, nodes, context, active, weights, over_maps)
    here = [each[:, heads] for each in nodes]
    received, *found = _run(graph, here, context, active, weights[:, heads], over_maps)
    _assert_equal(received, expected[:, heads])
    for gradient, other in zip(found[0], [of_inputs[0], *(each[:, heads] for each in of_inputs[1:])], strict=True):
        _assert_equal(gradient, other)
    assert list(found[1]) == list(of_parameters)
    parts = {} if isinstance(ranks, DeviceMesh) else _parts(graph, heads)
    for name, gradient in found[1].items():
        other = of_parameters[name].index_select(*parts[name]) if name in parts else of_parameters[name]
        _assert_equal(gradient.full_tensor() if isinstance(gradient, DTensor) else gradient, other)


def _run(
    graph: nn.Module, nodes: list[Tensor], context: Tensor, active: Tensor, weights: Tensor, over_maps: bool
) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """What heads receive, the gradients of context and nodes, and those of parameters by name."""
    inputs = [each.clone().requires_grad_() for each in (context, *nodes)]
    context, *nodes = inputs
    if over_maps:
        queries, keys = graph.gather_senders(*nodes) if isinstance(graph, ShardedHeadGraphConv) else nodes
        received = graph(torch.einsum("thd,shd->ths", queries, keys), context, active=active)  # [T, H, S]
    else:
        received = graph(nodes[0], context, nodes[1:], active)  # [T, H, D]
    named, loss = dict(graph.named_parameters()), (received * weights).sum()
    gradients = torch.autograd.grad(loss, (*inputs, *named.values()), allow_unused=True, materialize_grads=True)
    return received, gradients[: len(inputs)], dict(zip(named, gradients[len(inputs) :], strict=True))


def _parts(graph: ShardedHeadGraphConv, heads: list[int]) -> dict[str, tuple[int, Tensor]]:
    """Of parameters that a plain group holds in parts, the dimension and this rank's rows: its heads and its edges."""
    layers = torch.arange(1 + graph.cross_layer).unsqueeze(1) * HEADS  # [1+w, 1]
    edges = graph.exchange.edges_of_ranks(graph.edge_index.t().tolist())[graph.group.rank()]
    of_edges = (1, torch.tensor(edges, dtype=torch.long))
    return {"gain": (0, (layers + torch.tensor(heads)).flatten()), "edges.bias": of_edges, "edges.weight": of_edges}


def _assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
