"""What the ranks of the distributed tests do; each function runs on every rank of a group."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import os
import signal
from functools import cache
from unittest import mock

import torch
from helpers import load_script, trained_like
from planning.traffic import Traffic
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from gohgraph import (
    Classifier,
    ClassifierConfig,
    HeadGraphConfig,
    LanguageModel,
    RoutingConfig,
    SiteConfig,
    Transformer,
    TransformerConfig,
)
from gohgraph.attention.routing import share_statistics
from gohgraph.graphs.cross_layer import CrossLayer
from gohgraph.graphs.topologies import TOPOLOGIES
from gohgraph.learning.optim import make_optimizer
from gohgraph.learning.train_config import TrainConfig
from gohgraph.models.model_output import ModelOutput
from gohgraph.parallel import Layout, ParallelConfig, clip_gradients, parallelize

VOCAB, BATCH, LENGTH = 13, 4, 12
OPTIONS = {"ring": {"hops": 2}, "groups": {"ranks": 4}, "small-world": {"neighbors": 2}}
ROUTING = RoutingConfig(2, 3, z_loss=0.1)
SEQUENCE = ParallelConfig(("tp",), sequence_parallel=True)
INTO_ONE = [(j, 0) for j in range(8)]


def cases() -> dict[str, HeadGraphConfig | None]:
    """Every topology at both sites, router on and off; then what edges and rounds can be."""
    sites = {name: SiteConfig(name, OPTIONS.get(name, {})) for name in TOPOLOGIES}
    found = {name: HeadGraphConfig(site, site) for name, site in sites.items()}
    found |= {f"{name}-routed": HeadGraphConfig(site, site, ROUTING) for name, site in sites.items()}
    return found


def special_cases() -> dict[str, HeadGraphConfig | None]:
    """What head graphs can have beside a topology."""
    deep = {"rounds": 2, "cross_layer": 1, "norm": True}
    return {
        "plain": None,
        "moh": HeadGraphConfig.moh(2, 3),
        "into-one": HeadGraphConfig(SiteConfig(INTO_ONE, **deep), None, ROUTING),
        "deep": HeadGraphConfig(SiteConfig(rank=3, **deep), SiteConfig.ring(3, rank=2, top_edges=2), ROUTING),
        "fixed": HeadGraphConfig(
            SiteConfig(edges="static"), SiteConfig("star", edges="frozen"), queries=SiteConfig(), keys=SiteConfig()
        ),
        "pyg": HeadGraphConfig(SiteConfig(backend="pyg"), SiteConfig(backend="pyg")),
        "across-layers": HeadGraphConfig(
            SiteConfig.ring(3, cross_layer="first"), None, ROUTING,
            # With an edge to itself near -1, a query is rounding errors, which QK norm makes as long as any other.
            queries=SiteConfig.ring(2, self_loops=False, cross_layer=1),
            keys=SiteConfig(cross_layer="all"), values=SiteConfig(cross_layer=CrossLayer("first", "all-pairs", 0.1)),
        ),
        "rounds-within": HeadGraphConfig(None, SiteConfig("groups", {"ranks": 4}, rounds=2)),
    }


def alone(graph: HeadGraphConfig | None, site: str) -> HeadGraphConfig | None:
    """The same with an empty other site, and edges from this layer only."""
    if graph is None:
        return None
    other = "scores" if site == "outputs" else "outputs"
    graph = dataclasses.replace(graph, **{other: None})
    own = getattr(graph, site)
    return graph if own is None else dataclasses.replace(graph, **{site: dataclasses.replace(own, cross_layer=0)})


MODERN = {"qk_norm": True, "activation": "relu2", "norm": "unweighted-rms", "embedding_norm": True, "logit_cap": 5.0}


def build(graph: HeadGraphConfig | None, *, layers: int = 1, **settings) -> LanguageModel:
    """A model of M = 48, H = 8, D = 6 in float64."""
    torch.manual_seed(3)
    shape = {"d_model": 48, "num_heads": 8, "num_layers": layers, "d_ff": 20}
    return trained_like(LanguageModel(TransformerConfig(VOCAB, **shape, head_graph=graph, **settings)))


def batch(step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets `[B, T]` of a step, of all ranks together."""
    tokens = torch.randint(VOCAB, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    return tokens[:, :-1], tokens[:, 1:]


@cache
def layout(config: ParallelConfig) -> Layout:
    """One mesh for all cases: every group has threads of its own."""
    return Layout(config)


class Ranks:
    """A model on all ranks, and the part of a batch that this one sees."""

    def __init__(self, model: LanguageModel, config: ParallelConfig) -> None:
        self.layout = layout(config)
        share_statistics(model, self.layout.data_group())
        self.model = parallelize(model, self.layout) if config.is_sharded else DistributedDataParallel(model)

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.chunk(self.layout.data_ranks)[self.layout.data_rank]

    def backward(self, step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = map(self.rows, batch(step))
        output = self.model(inputs, targets=targets)
        output.loss.backward()
        loss = output.loss.detach().clone()
        torch.distributed.all_reduce(loss)
        return output.logits.detach(), loss / torch.distributed.get_world_size()


@cache
def in_one_process(name: str, **settings) -> tuple[LanguageModel, ModelOutput]:
    """The model of a case with its gradients and output: what every kind of parallelism is held against."""
    model = build((cases() | special_cases())[name], **settings)
    inputs, targets = batch()
    output = model(inputs, targets=targets)
    output.loss.backward()
    return model, output


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def largest_errors(rank: int, config: ParallelConfig, names: list[str], settings: dict) -> dict[str, float]:
    """Of each case the largest difference of logits, loss or a gradient to those of one process."""
    found = {}
    for name in names:
        alone, output = in_one_process(name, **settings)
        model = copy.deepcopy(alone)
        ranks = Ranks(model, config)
        logits, loss = ranks.backward()
        errors = [(logits - ranks.rows(output.logits)).abs().max(), (loss - output.loss).abs()]
        own = dict(alone.named_parameters())
        assert set(model.state_dict()) == set(alone.state_dict())
        for key, parameter in model.named_parameters():
            gradient = None if parameter.grad is None else whole(parameter.grad)
            assert (gradient is None) == (own[key].grad is None), key
            if gradient is not None:
                errors.append((gradient - own[key].grad).abs().max())
        found[name] = max(error.item() for error in errors)
    return found


def others_apart(rank: int, config: ParallelConfig) -> dict[str, float]:
    """Of an encoder-decoder and a classifier, the largest difference of a loss or gradient to one process."""
    tokens, targets = batch()
    shape = TransformerConfig(
        VOCAB, d_model=48, num_heads=8, num_layers=2, d_ff=20, positions="sinusoidal",
        head_graph=HeadGraphConfig(SiteConfig.ring(3, cross_layer=1), SiteConfig(), ROUTING),
    )  # fmt: skip
    makes = {
        "transformer": (
            lambda: Transformer(shape),
            lambda model: model(tokens, targets[:, :10], targets=tokens[:, :10]),
        ),
        "classifier": (
            lambda: Classifier(ClassifierConfig(shape, 5)),
            lambda model: model(tokens, targets=torch.arange(BATCH)),
        ),
    }
    found = {}
    for name, (make, run) in makes.items():
        torch.manual_seed(3)
        alone = trained_like(make())
        torch.manual_seed(3)
        model = parallelize(trained_like(make()), layout(config))
        losses = [run(one).loss for one in (alone, model)]
        for loss in losses:
            loss.backward()
        own = dict(alone.named_parameters())
        errors = [(losses[0] - losses[1]).abs()]
        errors += [
            (whole(parameter.grad) - own[key].grad).abs().max()
            for key, parameter in model.named_parameters()
            if parameter.grad is not None
        ]
        found[name] = max(error.item() for error in errors)
    return found


def losses_apart(
    rank: int, config: ParallelConfig, names: list[str], steps: int, optimizer: str, factor: float | None
) -> dict[str, float]:
    """Of each case the largest difference of a loss in float32 training to that of one process."""
    known, found = cases() | special_cases(), {}
    training = TrainConfig(steps=steps, learning_rate=3e-3, optimizer=optimizer, graph_matrix_lr_factor=factor)
    for name in names:
        model, alone = build(known[name]).float(), build(known[name]).float()
        ranks = Ranks(model, config)
        optimizers = [make_optimizer(one, training, torch.device("cpu")) for one in (model, alone)]
        apart = []
        for step in range(steps):
            _, loss = ranks.backward(step)
            output = alone(batch(step)[0], targets=batch(step)[1])
            output.loss.backward()
            apart.append((loss - output.loss).abs().item())
            for one, optimizer in zip((model, alone), optimizers, strict=True):
                clip_gradients(one.parameters(), training.grad_clip)
                optimizer.step()
                optimizer.zero_grad()
        found[name] = max(apart)
    return found


def all_of(rank: int, calls: list[tuple]) -> list:
    """Makes several calls in one group of ranks: starting them is what takes time."""
    return [function(rank, *args) for function, *args in calls]


def train_language_model(rank: int, argv: list[str], die_at: int | None = None) -> tuple[int, str]:
    """Runs the example on every rank; the last one dies in training step `die_at`. Returns exit code and errors."""
    from gohgraph.learning.training import Training

    step = Training._train_step

    def dying(self) -> None:
        if self.step == die_at and rank == torch.distributed.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        step(self)

    Training._train_step = dying
    errors = io.StringIO()
    # Figures take longer than such a training; the tests of the script have them drawn.
    figures = ("gohgraph.learning.training.draw_curves", "gohgraph.learning.cli.comparison.draw", "gohgraph.draw_load")
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stderr(errors))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        for name in figures:
            stack.enter_context(mock.patch(name))
        code = load_script("examples", "train_language_model").main(argv)
    return code, errors.getvalue()


def bytes_sent(rank: int, config: ParallelConfig, names: list[str], site: str) -> dict[str, dict[str, int]]:
    """Of each case with head graphs at one site alone, the bytes that this rank sends in a step, by collective."""
    found = {}
    for name in names:
        graph = alone((cases() | special_cases())[name], site)
        ranks = Ranks(build(graph), config)
        with Traffic() as traffic:
            inputs, targets = map(ranks.rows, batch())
            ranks.model(inputs, targets=targets).loss.backward()
        found[name] = dict(traffic.bytes)
    return found


def refusals(rank: int) -> list[str]:
    """What tensor parallelism says to models and inputs that it cannot take."""
    found = []
    experts = HeadGraphConfig.graph_experts(2)
    rounds = HeadGraphConfig(None, SiteConfig(rounds=2))
    cases = ((None, 5, 4), (experts, 4, 4), (rounds, 4, 4), (None, 4, 5), (None, 4, 4, "hyper"))
    for graph, heads, length, *residual in cases:
        shape = {"d_model": 10 * heads, "num_heads": heads, "num_layers": 1, "d_ff": 20}
        shape |= {"residual": residual[0]} if residual else {}
        try:
            ranks = Ranks(LanguageModel(TransformerConfig(VOCAB, **shape, head_graph=graph)), SEQUENCE)
            ranks.model(torch.zeros(1, length, dtype=torch.long))
        except ValueError as error:
            found.append(str(error))
    return found
