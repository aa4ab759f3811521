"""The optimizer of the training loop and its groups of parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from gohgraph.attention.routing import HeadRouter
from gohgraph.graphs.building import GRAPHS
from gohgraph.graphs.protocol import SiteGraph
from gohgraph.learning.train_config import TrainConfig
from gohgraph.parallel.gradients import layout_of

FUSED_ON = ("cpu", "cuda", "mps", "xpu")


def parameter_groups(
    model: nn.Module, config: TrainConfig, at_sites: tuple[type[nn.Module], ...] = (SiteGraph, HeadRouter)
) -> list[dict[str, Any]]:
    """Splits trainable parameters into matrices (decayed), vectors, and head graphs; empty groups are left out.

    What stands at a site of attention, be it a head graph or an opponent, and routers are not decayed unless their
    traits ask for it: their start at zero or one is neutral and no prior. All of them learn at `graph_lr_factor` times
    the learning rate. A parameter used twice is listed once.

    Example:
        >>> import gohgraph as goh
        >>> transformer = goh.TransformerConfig(9, d_model=8, num_heads=2, d_ff=8, head_graph=goh.HeadGraphConfig())
        >>> groups = parameter_groups(goh.LanguageModel(transformer), TrainConfig(steps=1, graph_lr_factor=2.0))
        >>> [(group["name"], group["lr"], group["weight_decay"]) for group in groups]
        [('matrices', 0.001, 0.1), ('vectors', 0.001, 0.0), ('head graphs', 0.002, 0.0)]
    """
    graphs = [module for module in model.modules() if isinstance(module, at_sites)]
    asking = [graph for graph in graphs if isinstance(graph, SiteGraph) and graph.traits.weight_decay]
    decayed = {id(p) for graph in asking for p in graph.parameters() if p.dim() > 1}
    in_graphs = {id(p) for graph in graphs for p in graph.parameters()}
    members: dict[str, list[nn.Parameter]] = {"matrices": [], "vectors": [], "head graphs": [], "decayed graphs": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            kind = "matrices" if parameter.dim() > 1 else "vectors"
            if id(parameter) in in_graphs:
                kind = "decayed graphs" if id(parameter) in decayed else "head graphs"
            members[kind].append(parameter)
    groups = []
    for name, parameters in members.items():
        rate = config.learning_rate * (config.graph_lr_factor if "graphs" in name else 1.0)
        decay = config.weight_decay if name in ("matrices", "decayed graphs") else 0.0
        groups.append({"params": parameters, "name": name, "lr": rate, "weight_decay": decay})
    return [group for group in groups if group["params"]]


def regroup_as_saved(optimizer: torch.optim.Optimizer, model: nn.Module, config: TrainConfig, file: Path) -> None:
    """Groups parameters as a checkpoint has them that was written when opponents and routers were still decayed."""
    saved = torch.load(file, map_location="cpu", weights_only=True)["param_groups"]
    sizes = [len(group["params"]) for group in saved]
    former = parameter_groups(model, config, tuple(GRAPHS.values()))
    if [len(group["params"]) for group in optimizer.param_groups] != sizes == [len(g["params"]) for g in former]:
        defaults = {name: value for name, value in optimizer.defaults.items() if name not in former[0]}
        optimizer.param_groups[:] = [{**defaults, **group} for group in former]


def make_optimizer(model: nn.Module, config: TrainConfig, device: torch.device) -> torch.optim.AdamW:
    """Returns AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) over `parameter_groups`, fused where it can be."""
    groups = [part for group in parameter_groups(model, config) for part in _by_layout(group)]
    if not groups:
        raise ValueError(
            f"Expected trainable parameters (got a {type(model).__name__} without). Do unfreeze some."
        )
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=device.type in FUSED_ON)


def _by_layout(group: dict[str, Any]) -> list[dict[str, Any]]:
    """Splits a group where its parameters lie on ranks in different ways: one call of the optimizer takes one way."""
    members: dict[Any, list[nn.Parameter]] = {}
    for parameter in group["params"]:
        members.setdefault(layout_of(parameter), []).append(parameter)
    return [{**group, "params": parameters} for parameters in members.values()]
