"""Runs the package on the CPU and on the device of `stand_in`, and prints each run that fails there or differs.

Run by tests/test_stand_in.py, in a process of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from helpers import V, trained_like
from stand_in import DEVICE, READS, StandIn, register
from torch import Tensor, nn
from transformers_models import build, inputs_of

import gohgraph as goh
from gohgraph.analysis.ablation import edge_ablation
from gohgraph.analysis.attribution import edge_attribution
from gohgraph.analysis.strength import edge_strength
from gohgraph.common import modules
from gohgraph.graphs.baselines.presets import PRESETS, fields_of
from gohgraph.learning.data.episodes import Episodes
from gohgraph.learning.optim import make_optimizer
from gohgraph.learning.regimes.language import head_loads, window_losses
from gohgraph.learning.regimes.meta import MetaLearner, few_shot_accuracy, parameters_of
from gohgraph.learning.train_config import TrainConfig

# A run: what it is run on -> its numbers.
Run = Callable[[torch.device], Tensor]
HEADS, LENGTH = 8, 7
CONFIG = goh.TransformerConfig(V, d_model=16, num_heads=HEADS, num_layers=2, d_ff=16)
DECODED = ("both", "values", "weights", "moh-75", "experts-2", "value-residual", "paired-heads", "dcmha", "mudd")
STATIC = goh.SiteConfig(edges="static")
RUNS: dict[str, Run] = {}


def run(function: Run) -> Run:
    """Lists a run."""
    RUNS[function.__name__] = function
    return function


def model(graphs: str | goh.HeadGraphConfig = "both", kind: type[nn.Module] = goh.LanguageModel) -> nn.Module:
    """Returns a model as after training, with a preset's graphs or others."""
    own = fields_of(graphs, HEADS) if isinstance(graphs, str) else {"head_graph": graphs}
    return trained_like(kind(dataclasses.replace(CONFIG, **own))).float().eval()


def tokens(device: torch.device) -> Tensor:
    """Returns token ids `[2, T]`, always the same."""
    return ((torch.arange(2 * LENGTH) * 5) % V).view(2, LENGTH).to(device)


def loss(model: nn.Module, batch: Tensor) -> goh.ModelOutput:
    """What analyses take for the loss of a batch."""
    return model(batch, targets=batch.roll(-1, 1))


def metric(output: goh.ModelOutput) -> Tensor:
    """What attribution asks for, `[B]`."""
    return output.logits[:, -1, 5] - output.logits[:, -1, 3]


def joined(by_name: dict[str, Tensor]) -> Tensor:
    """Returns the numbers of all graphs in one row."""
    return torch.cat([values.flatten() for values in by_name.values()])


@contextmanager
def unread() -> Iterator[None]:
    """Nothing may be read from the device inside."""
    READS.clear()
    yield
    if READS:
        raise RuntimeError(f"it was waited for the device in {dict(READS)}")


def gradients(preset: str, device: torch.device) -> Tensor:
    """The loss and all gradients; nothing may be read for them."""
    trained, batch = model(preset).to(device), tokens(device)
    with unread():
        value = loss(trained, batch).loss
        value.backward()
    found = [parameter.grad for parameter in trained.parameters() if parameter.grad is not None]
    return torch.cat([value.detach().flatten(), *(gradient.flatten() for gradient in found)])


def decoded(preset: str, device: torch.device) -> Tensor:
    """A padded prompt and what follows."""
    keep_mask = (torch.arange(2 * LENGTH) > 1).view(2, LENGTH).to(device)
    return model(preset).to(device).generate(tokens(device), 3, temperature=0, keep_mask=keep_mask)


def converted(name: str, device: torch.device) -> Tensor:
    """Logits of a model of transformers that is converted on the device, and saved on the CPU."""
    stock = build(name).to(device)
    inputs = {key: value.to(device) for key, value in inputs_of(stock).items()}
    goh.convert(stock, goh.HeadGraphConfig(goh.SiteConfig(), goh.SiteConfig()))
    return stock(**inputs).logits


RUNS |= {f"gradients of {name}": partial(gradients, name) for name in PRESETS}
RUNS |= {f"{name}, decoded": partial(decoded, name) for name in DECODED}
RUNS |= {f"{name}, converted": partial(converted, name) for name in ("llama", "gpt2", "bert", "t5", "vit")}


def step_by(optimizer: str, device: torch.device) -> nn.Module:
    """A model after one step of training."""
    trained = model().to(device).train()
    by = make_optimizer(trained, TrainConfig(steps=2, optimizer=optimizer), device)
    loss(trained, tokens(device)).loss.backward()
    by.step()
    return trained


@run
def a_step_by_adamw(device: torch.device) -> Tensor:
    return step_by("adamw", device)(tokens(device)).logits


@run
def a_step_by_muon(device: torch.device) -> Tensor:
    # In bfloat16 where it is not a CPU.
    return step_by("muon", device)(tokens(device)).logits.isfinite()


@run
def translation(device: torch.device) -> Tensor:
    translator = model(kind=goh.Transformer).to(device)
    return translator.generate(tokens(device), bos=1, eos=2, max_new_tokens=4, num_beams=3)


@run
def losses_of_windows(device: torch.device) -> Tensor:
    return window_losses(model().to(device), torch.arange(40) % V, batch_size=2, length=LENGTH)


@run
def loads_of_heads(device: torch.device) -> Tensor:
    return head_loads(model("moh-75").to(device), torch.arange(40) % V, batch_size=2, length=LENGTH)


@run
def adaptation_to_new_tasks(device: torch.device) -> Tensor:
    classifier = goh.Classifier(goh.ClassifierConfig(CONFIG, num_classes=3))
    learner = MetaLearner(classifier, parameters_of(classifier, names=["head"]), steps=2).to(device)
    x, y = torch.randint(V, (2, 5, LENGTH)).to(device), torch.randint(3, (2, 5)).to(device)
    return torch.cat([learner(Episodes(x, y, x, y)).cpu(), *few_shot_accuracy(learner, Episodes(x, y, x, y))])


@run
def recording(device: torch.device) -> Tensor:
    recorded = model().to(device)
    with goh.record(recorded, attention=True) as found:
        recorded(tokens(device))
    return goh.head_graph_of(found).mean


@run
def strength_of_edges(device: torch.device) -> Tensor:
    return joined(edge_strength(model("cross-layer-values-scaled").to(device)))


@run
def attribution_of_edges(device: torch.device) -> Tensor:
    return joined(edge_attribution(model().to(device), loss, [tokens(device)]))


@run
def ablation_of_edges(device: torch.device) -> Tensor:
    return joined(edge_ablation(model("outputs-ring-2").to(device), loss, [tokens(device)]))


@run
def importance_of_heads(device: torch.device) -> Tensor:
    return joined(goh.head_importance(model().to(device), loss, [tokens(device)]))


@run
def pruned(device: torch.device) -> Tensor:
    return goh.prune(model().to(device), keep=0.3)(tokens(device)).logits


@run
def folded(device: torch.device) -> Tensor:
    merged = model(goh.HeadGraphConfig(STATIC, values=STATIC)).to(device)
    goh.fold(merged)
    return merged(tokens(device)).logits


@run
def composition(device: torch.device) -> Tensor:
    return goh.composition_graph(build("llama").to(device)).mean


@run
def attribution_of_a_stock_model(device: torch.device) -> Tensor:
    stock = build("gpt2").to(device)
    clean, other = ({"input_ids": batch} for batch in (tokens(device), tokens(device).flip(0)))
    network = goh.attribution_graph(stock, clean, against=other, metric=metric, steps=2)
    return goh.label_heads(stock, network, tokens(device)).mean


@run
def attribution_of_every_token(device: torch.device) -> Tensor:
    own, batch = model().to(device), tokens(device)
    return goh.attribution_graph(own, batch, against=batch.flip(0), metric=metric, every_token=True).by_token


@run
def faithfulness(device: torch.device) -> Tensor:
    stock, clean, other = build("gpt2").to(device), tokens(device), tokens(device).flip(0)
    runs = {"against": {"input_ids": other}, "metric": metric}
    network = goh.attribution_graph(stock, {"input_ids": clean}, **runs)
    return joined(goh.faithfulness(stock, network, {"input_ids": clean}, **runs).values)


@run
def an_encoder_of_torch(device: torch.device) -> Tensor:
    layer = nn.TransformerEncoderLayer(16, HEADS, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, num_layers=1, enable_nested_tensor=False).eval().to(device)
    goh.convert(encoder, goh.HeadGraphConfig(scores=goh.SiteConfig()))
    padding = (torch.arange(2 * LENGTH) > 9).view(2, LENGTH).to(device)
    return encoder(torch.randn(2, LENGTH, 16).to(device), src_key_padding_mask=padding)


@run
def must_stop_at_a_tensor_of_the_cpu(device: torch.device) -> Tensor:
    return tokens(device) + torch.arange(LENGTH)


@run
def must_stop_at_a_generator_of_the_cpu(device: torch.device) -> Tensor:
    return torch.rand(LENGTH, generator=torch.Generator().manual_seed(0), device=device)


@run
def must_stop_at_a_float64(device: torch.device) -> Tensor:
    return tokens(device).double()


@run
def must_stop_at_a_size_that_is_read(device: torch.device) -> Tensor:
    with unread():
        return tokens(device)[tokens(device) > 3].sum()


@run
def must_stop_at_a_copy_to_the_cpu(device: torch.device) -> Tensor:
    with unread():
        return torch.zeros(2, LENGTH, dtype=torch.long).copy_(tokens(device))


def tried(name: str, run: Run) -> str | None:
    """Runs on both; returns what is wrong."""
    results = []
    try:
        for device in (torch.device("cpu"), DEVICE):
            torch.manual_seed(0)
            with StandIn():
                results.append(run(device).detach().cpu())
    except Exception as error:
        return f"{name}: {type(error).__name__}: {error}".splitlines()[0]
    expected, found = (result.double() for result in results)
    apart = (expected - found).abs().max()
    return None if apart <= 1e-4 * (1 + expected.abs().max()) else f"{name}: {apart.item():.2g} apart"


def main() -> None:
    """Tries all runs and prints what is wrong."""
    register()
    torch.set_num_threads(1)
    # What is no plain tensor, such as the device's, is taken for quantised.
    modules._not_plain = lambda *_: None
    for name, run in RUNS.items():
        if wrong := tried(name, run):
            print(wrong, flush=True)
    print("done")


if __name__ == "__main__":
    main()
