"""What server and clients must agree on, in a simulation as in separate processes: model, text, and what is shared."""

from __future__ import annotations

import dataclasses
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gohgraph import HeadGraphConfig, LanguageModel, SiteConfig, TransformerConfig
from gohgraph.common.checks import there
from gohgraph.learning.contests.matching import count_parameters
from gohgraph.learning.data.corpus import Corpus, evaluation_batches, sample_batch
from gohgraph.learning.data.domains import DOMAINS, load_domain
from gohgraph.learning.federated.client import Client
from gohgraph.learning.federated.sharing import SHARINGS
from gohgraph.learning.federated.split import dirichlet_split
from gohgraph.learning.loop import TrainConfig
from gohgraph.learning.recipes import RECIPES
from gohgraph.learning.regimes.language import VOCAB_SIZE, next_token_output
from gohgraph.learning.regimes.low_rank import ALL_LINEAR, add_low_rank, matching_rank

# The base knows the first kind of text; clients have the others.
BASE, KINDS = "documentation", tuple(name for name in DOMAINS if name != "documentation")
# The best of a grid (docs/regimes.md); the local ones and LoRA with a graph take those of their kind.
LEARNING_RATES = {"full": 1.6e-2, "personal-graph": 8e-3, "local": 8e-3, "graph": 2e-2, "local-graph": 2e-2}
LEARNING_RATES |= {"lora": 4e-2, "lora-personal-graph": 4e-2}


@dataclasses.dataclass(frozen=True)
class Settings:
    """A federation of language models of bytes.

    Args:
        folder: of the run; each client keeps its personal weights in a folder of its own below.
        base: folder of a saved model that all begin with; "" for one that has learned nothing.
        method: one of `SHARINGS`.
        recipe: one of `RECIPES`, of clients, and of a base that has learned nothing.
        clients, alpha: how many, and the alpha of `dirichlet_split`.
        rounds, local_steps: rounds, and steps of a client in each.
        learning_rate: of clients; 0 for the method's own.
        in_degree: of the head graph, a ring; low-rank updates get as many parameters.
        batch_size, length: windows of a batch, bytes of a window.
        windows: at most so many of a client's validation text are measured.
        limit: characters of each kind of text.
        seed: of the split, the data and a new base.
        threads: of torch, in every process.
        d_model, num_heads, num_layers, d_ff: of a base that has learned nothing.
    """

    folder: str
    base: str = ""
    method: str = "full"
    recipe: str = "modern"
    clients: int = 8
    alpha: float = 0.3
    rounds: int = 20
    local_steps: int = 10
    learning_rate: float = 0.0
    in_degree: int = 4
    batch_size: int = 8
    length: int = 64
    windows: int = 64
    limit: int = 500_000
    seed: int = 0
    threads: int = 1
    d_model: int = 64
    num_heads: int = 8
    num_layers: int = 3
    d_ff: int = 256

    def to_dict(self) -> dict[str, Any]:
        """Returns what defines the run, as JSON values: not where it is written or computed."""
        return {name: value for name, value in vars(self).items() if name not in ("folder", "base", "threads")}


def make_model(settings: Settings) -> LanguageModel:
    """Returns the model of a method as it begins: the base, with neutral adapters."""
    torch.set_num_threads(settings.threads)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        base = _base(settings)
        whole = _graph_parameters(base, settings.in_degree)
        half = settings.in_degree // 2
        degree = {"lora": 0, "lora-personal-graph": half}.get(settings.method, settings.in_degree)
        graph = HeadGraphConfig(SiteConfig.ring(degree)) if degree else None
        model = LanguageModel(dataclasses.replace(base.config, head_graph=graph))
        model.load_state_dict(base.state_dict(), strict=False)
        if "lora" in settings.method:
            rest = whole - (_graph_parameters(base, degree) if degree else 0)
            add_low_rank(model, matching_rank(base, rest, ALL_LINEAR), targets=ALL_LINEAR)
    return model


def make_shared(settings: Settings) -> dict[str, Tensor]:
    """Returns the weights that the server begins with."""
    return SHARINGS[settings.method].shared_state(make_model(settings))


@cache
def make_client(settings: Settings, number: int) -> Client:
    """Returns a client; it is kept, for what it does depends only on what it is sent and on its folder."""
    text = split(settings)[0][number]
    windows = {"batch_size": settings.batch_size, "length": settings.length}

    def batch(step: int) -> tuple[Tensor, Tensor]:
        return sample_batch(text.train, step, seed=1000 * settings.seed + number, **windows)

    return Client(
        make_model(settings),
        SHARINGS[settings.method],
        batch,
        next_token_output,
        client_training(settings),
        rounds=settings.rounds,
        num_examples=len(text.train),
        evaluate=partial(measure, text=text.validation, length=settings.length, windows=settings.windows),
        folder=Path(settings.folder) / "clients" / str(number),
    )


def client_training(settings: Settings) -> TrainConfig:
    """Returns the training of a client over all rounds; adapters take the whole rate and no decay, as PEFT's do."""
    sharing = SHARINGS[settings.method]
    trains_all = "base" in (*sharing.shared, *sharing.personal)
    training = RECIPES[settings.recipe].training
    if not trains_all:
        training = {**training, "weight_decay": 0.0, "graph_lr_factor": 1.0}
    return TrainConfig(
        steps=settings.rounds * settings.local_steps,
        learning_rate=settings.learning_rate or LEARNING_RATES[settings.method],
        seed=settings.seed,
        device="cpu",
        **training,
    )


def measure(model: nn.Module, text: Tensor, *, length: int, windows: int) -> dict[str, float]:
    """Returns the loss in nats per byte, and the share of bytes that are the likeliest of all."""
    loss, right, total = 0.0, 0, 0
    for inputs, targets in evaluation_batches(text, batch_size=16, length=length, limit=windows):
        output = model(inputs, targets=targets)
        loss += there(output.cross_entropy).item() * targets.numel()
        right += int((output.logits.argmax(dim=-1) == targets).sum())
        total += targets.numel()
    return {"validation_loss": loss / total, "accuracy": right / total}


@cache
def _texts(limit: int) -> list[Corpus]:
    return [load_domain(name, limit=limit) for name in KINDS]


def split(settings: Settings) -> tuple[list[Corpus], Tensor]:
    """Returns the text of every client, and the bytes of each kind `[C, K]`."""
    minimum = 2 * settings.length
    return dirichlet_split(
        _texts(settings.limit), settings.clients, alpha=settings.alpha, minimum=minimum, seed=settings.seed
    )


def parameters_of(settings: Settings) -> int:
    """Returns how many parameters a client trains."""
    model = make_model(settings)
    SHARINGS[settings.method].prepare(model)
    return count_parameters(model)


def _base(settings: Settings) -> LanguageModel:
    if settings.base:
        return LanguageModel.from_pretrained(settings.base)
    shape = {name: getattr(settings, name) for name in ("d_model", "num_heads", "num_layers", "d_ff")}
    return LanguageModel(TransformerConfig(VOCAB_SIZE, **shape, **RECIPES[settings.recipe].model))


def _graph_parameters(base: LanguageModel, degree: int) -> int:
    graph = HeadGraphConfig(SiteConfig.ring(degree))
    return count_parameters(LanguageModel(dataclasses.replace(base.config, head_graph=graph))) - count_parameters(base)
