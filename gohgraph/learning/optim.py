"""The optimizer of the training loop and its groups of parameters."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gohgraph.attention.routing import HeadRouter
from gohgraph.graphs.edge_graph import EdgeGraph
from gohgraph.graphs.protocol import SiteGraph
from gohgraph.learning.muon import MUON_GROUPS, MuonWithAdamW
from gohgraph.learning.regimes.low_rank import LowRankUpdate
from gohgraph.learning.train_config import TrainConfig
from gohgraph.models.streams import DenseConnection, StreamWeights
from gohgraph.parallel.gradients import layout_of

FUSED_ON = ("cpu", "cuda", "mps", "xpu")
MATRICES, *GRAPH_MATRICES = MUON_GROUPS
GRAPHS = ("head graphs", "decayed graphs")
# Ends of names of what has two dimensions at a site and is no map from a token to edges or features.
NO_MATRICES = ("bias", "gain", "embedding")


def parameter_groups(
    model: nn.Module, config: TrainConfig, at_sites: tuple[type[nn.Module], ...] = (SiteGraph, HeadRouter)
) -> list[dict[str, Any]]:
    """Splits trainable parameters into matrices (decayed), vectors, and head graphs; empty groups are left out.

    What stands at a site of attention, be it a head graph or an opponent, and routers are not decayed unless their
    traits ask for it: their start at zero or one is neutral and no prior. They learn at `graph_lr_factor` times the
    learning rate, times the factor of their traits. A parameter used twice is listed once. For Muon, matrices are those
    inside layers, at its own rate; embeddings and the output's projection, which are tables rather than maps, are a
    group that AdamW trains. The few weights of residual paths count as vectors, and beside Muon so do low-rank updates,
    as thin as they are. With a `graph_matrix_lr_factor` Muon trains the matrices at sites, too, at that multiple of its
    rate; their biases and gains stay with AdamW.

    Example:
        >>> import gohgraph as goh
        >>> transformer = goh.TransformerConfig(9, d_model=8, num_heads=2, d_ff=8, head_graph=goh.HeadGraphConfig())
        >>> groups = parameter_groups(goh.LanguageModel(transformer), TrainConfig(steps=1, graph_lr_factor=2.0))
        >>> for group in groups:
        ...     print(group["name"], group["lr"], group["weight_decay"])
        matrices 0.02 0.1
        embeddings 0.001 0.1
        vectors 0.001 0.0
        head graphs 0.002 0.0
    """
    graphs = [module for module in model.modules() if isinstance(module, at_sites)]
    factors, decayed = _factors(graphs), _decayed(graphs)
    by_muon = config.optimizer == "muon"
    thin = (StreamWeights, DenseConnection, LowRankUpdate) if by_muon else (StreamWeights, DenseConnection)
    like_vectors = _ids(module for module in model.modules() if isinstance(module, thin))
    tables = _ids(_tables(model)) if by_muon else set()
    by_own_rate = set() if config.graph_matrix_lr_factor is None else _matrices(graphs)

    def kind(parameter: nn.Parameter) -> str:
        if id(parameter) in factors:
            kinds = GRAPH_MATRICES if id(parameter) in by_own_rate else GRAPHS
            return kinds[id(parameter) in decayed]
        if parameter.dim() < 2 or id(parameter) in like_vectors:
            return "vectors"
        return "embeddings" if by_muon and (parameter.dim() > 2 or id(parameter) in tables) else MATRICES

    members: dict[tuple[str, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            members.setdefault((kind(parameter), factors.get(id(parameter), 1.0)), []).append(parameter)
    settings = _settings(config)
    order = list(settings)
    groups = sorted(members.items(), key=lambda member: (order.index(member[0][0]), member[0][1]))
    return [
        {"params": parameters, "name": name, "lr": settings[name][0] * factor, "weight_decay": settings[name][1]}
        for (name, factor), parameters in groups
    ]


def _settings(config: TrainConfig) -> dict[str, tuple[float, float]]:
    """Of every kind of parameters, in the order of groups, the learning rate and the decay."""
    rate, decay = config.learning_rate, config.weight_decay
    of_matrices = config.matrix_learning_rate if config.optimizer == "muon" else rate
    of_graphs, of_graph_matrices = rate * config.graph_lr_factor, of_matrices * (config.graph_matrix_lr_factor or 0.0)
    return {
        MATRICES: (of_matrices, decay),
        "embeddings": (rate, decay),
        "vectors": (rate, 0.0),
        GRAPHS[0]: (of_graphs, 0.0),
        GRAPHS[1]: (of_graphs, decay),
        GRAPH_MATRICES[0]: (of_graph_matrices, 0.0),
        GRAPH_MATRICES[1]: (of_graph_matrices, decay),
    }


def _factors(graphs: list[nn.Module]) -> dict[int, float]:
    """Of every parameter at a site, the product of the factors of all graphs around it."""
    factors: dict[int, float] = {}
    for graph in graphs:
        factor = graph.traits.learning_rate_factor if isinstance(graph, SiteGraph) else 1.0
        for parameter in graph.parameters():
            factors[id(parameter)] = factors.get(id(parameter), 1.0) * factor
    return factors


def _decayed(graphs: list[nn.Module]) -> set[int]:
    asking = [graph for graph in graphs if isinstance(graph, SiteGraph) and graph.traits.weight_decay]
    return {id(parameter) for graph in asking for parameter in graph.parameters() if parameter.dim() > 1}


def _matrices(graphs: list[nn.Module]) -> set[int]:
    named = [named for graph in graphs if isinstance(graph, SiteGraph) for named in graph.named_parameters()]
    return {id(p) for name, p in named if p.dim() in (2, 3) and not name.endswith(NO_MATRICES)}


def _ids(modules: Iterable[nn.Module]) -> set[int]:
    return {id(parameter) for module in modules for parameter in module.parameters()}


def _tables(model: nn.Module) -> list[nn.Module]:
    """What is looked up, and what stands between the model and its input and output."""
    ends: list[Any] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    ends += [getattr(model, name, None) for name in ("embedding", "head")]
    # Transformers' models say which is theirs.
    of_output = getattr(model, "get_output_embeddings", None)
    ends += [] if of_output is None else [of_output()]
    return [end for end in ends if isinstance(end, nn.Module)]


def regroup_as_saved(optimizer: torch.optim.Optimizer, model: nn.Module, config: TrainConfig, file: Path) -> None:
    """Groups parameters as a checkpoint has them that was written when opponents and routers were still decayed."""
    saved = torch.load(file, map_location="cpu", weights_only=True)["param_groups"]
    sizes = [len(group["params"]) for group in saved]
    former = parameter_groups(model, config, (EdgeGraph,))
    if [len(group["params"]) for group in optimizer.param_groups] != sizes == [len(g["params"]) for g in former]:
        defaults = {name: value for name, value in optimizer.defaults.items() if name not in former[0]}
        optimizer.param_groups[:] = [{**defaults, **group} for group in former]


def make_optimizer(model: nn.Module, config: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """Returns AdamW (arXiv 1711.05101), fused where it can be, or `MuonWithAdamW`, over `parameter_groups`."""
    groups = [part for group in parameter_groups(model, config) for part in _by_layout(group)]
    if not groups:
        raise ValueError(
            f"Expected trainable parameters (got a {type(model).__name__} without). Do unfreeze some."
        )
    fused = device.type in FUSED_ON
    if config.optimizer == "muon":
        return MuonWithAdamW(groups, betas=config.betas, fused=fused)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=fused)


def _by_layout(group: dict[str, Any]) -> list[dict[str, Any]]:
    """Splits a group where its parameters lie on ranks in different ways: one call of the optimizer takes one way."""
    members: dict[Any, list[nn.Parameter]] = {}
    for parameter in group["params"]:
        members.setdefault(layout_of(parameter), []).append(parameter)
    return [{**group, "params": parameters} for parameters in members.values()]
