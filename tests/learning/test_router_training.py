"""Training of routed models: annealed budgets, balance biases, statistics, resuming and several processes."""

from __future__ import annotations

import csv
import math
import os
import signal
from functools import partial

import numpy as np
import pytest
import torch
from helpers import assert_equal_to
from ranks import run_ranks
from torch import nn

from gohgraph import HeadGraphConfig, HeadRouter, LanguageModel, RoutingConfig, TransformerConfig
from gohgraph.attention.routing import routers, share_statistics
from gohgraph.learning.data.corpus import sample_batch
from gohgraph.learning.loop import TrainConfig, TrainingInterrupted, train
from gohgraph.learning.recipes import RECIPES
from gohgraph.learning.regimes.language import head_loads, next_token_output, window_losses
from gohgraph.learning.router_training import COLUMNS, RouterTraining, annealed_top_k

TEXT = torch.randint(97, 123, (5003,), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
WINDOWS = {"batch_size": 4, "length": 17}
CONFIG = TrainConfig(
    steps=23, anneal_top_k=13, log_every=5, eval_every=10, checkpoint_every=7, learning_rate=0.01, device="cpu",
    **RECIPES["old"].training,
)  # fmt: skip
batch = partial(sample_batch, TEXT, seed=5, **WINDOWS)


def model(*, dropout: float = 0.0, layers: int = 2, num_shared: int = 2, top_k=(3, 1), **routing) -> LanguageModel:
    torch.manual_seed(11)
    shape = {"d_model": 14, "num_heads": 7, "num_layers": layers, "d_ff": 13, "dropout": dropout}
    graph = HeadGraphConfig(routing=RoutingConfig(num_shared, top_k, **routing))
    return LanguageModel(TransformerConfig(256, **shape, head_graph=graph, **RECIPES["old"].model))


def changed(**values) -> TrainConfig:
    return TrainConfig(**{**CONFIG.to_dict(), **values})


def learned(rows):
    """Rows without what a clock decides."""
    return [{name: row[name] for name in row if name not in ("tokens_per_second", "seconds")} for row in rows]


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_k_falls_linearly_to_the_budget():
    ks = [annealed_top_k(step, 10, num_routed=7, budget=2) for step in range(12)]
    assert ks == [7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2]
    for budget in range(1, 8):
        ks = [annealed_top_k(step, 31, num_routed=7, budget=budget) for step in range(40)]
        assert ks[0] == 7 and set(ks[31:]) == {budget} and ks == sorted(ks, reverse=True)
        assert set(ks) == set(range(budget, 8))
    assert annealed_top_k(0, 0, num_routed=7, budget=2) == 2 and annealed_top_k(0, 5, num_routed=0, budget=0) == 0


def test_each_router_is_annealed_to_its_own_budget(tmp_path):
    trained, seen = model(), []

    def spying(model, tensors):
        output = next_token_output(model, tensors)
        active = [int(one.active.sum(-1).unique()) - 2 for one in output.routing]
        assert active == [router.top_k for router in routers(trained)]
        seen.append(tuple(active))
        return output

    train(trained, batch, spying, changed(steps=9, anneal_top_k=4), tmp_path / "run")
    assert seen == [(5, 5), (5, 4), (4, 3), (4, 2)] + [(3, 1)] * 5
    trained.save_pretrained(tmp_path / "model")
    assert [r.top_k for r in routers(LanguageModel.from_pretrained(tmp_path / "model"))] == [3, 1]


def test_an_interrupted_run_leaves_the_budgets_of_the_configuration(tmp_path):
    def stopping(index):
        if index == 2:
            signal.raise_signal(signal.SIGINT)
        return batch(index)

    trained = model()
    with pytest.raises(TrainingInterrupted):
        train(trained, stopping, next_token_output, CONFIG, tmp_path)
    assert [router.top_k for router in routers(trained)] == [3, 1]


def evaluate(model: nn.Module) -> dict[str, float]:
    return {"validation_loss": window_losses(model, TEXT, **WINDOWS, limit=5).mean().item()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder, trained = tmp_path_factory.mktemp("runs") / "whole", model(dropout=0.2, bias_rate=0.003, z_loss=0.001)
    return trained, train(trained, batch, next_token_output, CONFIG, folder, evaluate=evaluate), folder


@pytest.mark.parametrize("step", [0, 8, 16])
def test_resumed_equals_uninterrupted_with_routers(uninterrupted, tmp_path, step):
    whole, rows, _ = uninterrupted

    def stopping(index):
        if index == step:
            signal.raise_signal(signal.SIGINT)
        return batch(index)

    fresh = partial(model, dropout=0.2, bias_rate=0.003, z_loss=0.001)
    with pytest.raises(TrainingInterrupted, match=f"step {step + 1}"):
        train(fresh(), stopping, next_token_output, CONFIG, tmp_path, evaluate=evaluate)
    resumed = fresh()
    again = train(resumed, batch, next_token_output, CONFIG, tmp_path, evaluate=evaluate, resume=True)
    assert learned(again) == learned(rows) and same_weights(whole, resumed)
    assert all(router.balance_bias.abs().max() > 0 for router in routers(resumed))


def test_the_log_has_the_means_over_steps_of_what_the_routers_report(tmp_path):
    seen = []

    def spying(model, tensors):
        output = next_token_output(model, tensors)
        seen.append(output.routing)
        return output

    rows = train(model(), batch, spying, changed(steps=7, anneal_top_k=0, log_every=3), tmp_path)
    assert [row["step"] for row in rows] == [3, 6, 7]
    for row, steps in zip(rows, (seen[:3], seen[3:6], seen[6:]), strict=True):
        layers = [routing for step in steps for routing in step]
        expected = {
            "balance_loss": np.mean([one.balance_loss.item() for one in layers]),
            "z_loss": np.mean([one.z_loss.item() for one in layers]),
            "router_entropy": np.mean([one.entropy.item() for one in layers]),
            "load_cv": np.mean([np.std(one.load[2:].numpy()) / np.mean(one.load[2:].numpy()) for one in layers]),
            "load_entropy": np.mean([_entropy(one.load[2:].double().numpy()) / math.log(5) for one in layers]),
        }
        assert {name: row[name] for name in COLUMNS} == pytest.approx(expected, abs=1e-6)
    with open(tmp_path / "log.csv", newline="") as file:
        written = list(csv.DictReader(file))
    for line, row in zip(written, rows, strict=True):
        assert [float(line[name]) for name in COLUMNS] == [row[name] for name in COLUMNS]


def _entropy(load):
    q = load[load > 0] / load.sum()
    return -(q * np.log(q)).sum()


@pytest.mark.parametrize("sizes", [{"num_shared": 0}, {"num_shared": 7, "top_k": 0}, {"num_shared": 6, "top_k": 1}])
def test_every_split_of_the_heads_trains(tmp_path, sizes):
    rows = train(model(**sizes, bias_rate=0.01), batch, next_token_output, CONFIG, tmp_path)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert all(math.isfinite(row[name]) for row in rows for name in COLUMNS)
    if sizes["num_shared"] >= 6:
        assert {(row["load_cv"], row["load_entropy"]) for row in rows} == {(0.0, 1.0)}


def test_unrouted_models_have_no_columns_of_routing(tmp_path):
    shape = {"d_model": 14, "num_heads": 7, "num_layers": 2, "d_ff": 13}
    plain = LanguageModel(TransformerConfig(256, **shape))
    rows = train(plain, batch, next_token_output, changed(steps=3, anneal_top_k=0), tmp_path)
    assert not set(COLUMNS) & set(rows[0])


def scalar_loss(model, tensors):
    return next_token_output(model, tensors).loss


def test_a_scalar_loss_trains_the_same_without_columns(tmp_path):
    one, other = model(), model()
    rows = train(one, batch, next_token_output, changed(steps=3, anneal_top_k=1), tmp_path / "one")
    less = train(other, batch, scalar_loss, changed(steps=3, anneal_top_k=1), tmp_path / "other")
    assert same_weights(one, other)
    assert [set(row) - set(COLUMNS) for row in rows] == [set(row) for row in less]


def test_the_bias_of_accumulated_batches_is_that_of_one_large_batch(tmp_path):
    large = lambda index: tuple(map(torch.cat, zip(*(batch(3 * index + i) for i in range(3)), strict=True)))  # noqa: E731
    runs = {}
    for name, data, accumulate in (("small", batch, 3), ("large", large, 1)):
        # The balance loss of the mean load is not the mean of the balance losses, the bias alone is to be compared.
        trained = model(balance_loss=0.0, bias_rate=0.01).double()
        config = changed(steps=6, anneal_top_k=0, accumulate=accumulate, log_every=1)
        runs[name] = trained, train(trained, data, next_token_output, config, tmp_path / name)
    (small, small_rows), (large, large_rows) = runs.values()
    for one, other in zip(routers(small), routers(large), strict=True):
        assert one.balance_bias.unique().numel() > 1
        assert_equal_to(one.balance_bias, other.balance_bias)
        torch.testing.assert_close(one.routed, other.routed, rtol=0, atol=1e-7)
    for name in ("load_cv", "load_entropy"):
        assert [row[name] for row in small_rows] == pytest.approx([row[name] for row in large_rows], abs=1e-10)


def test_the_bias_alone_balances_what_starts_unbalanced(tmp_path):
    def skewed(**routing):
        trained = model(top_k=3, balance_loss=0.0, **routing)
        for router in routers(trained):
            with torch.no_grad():
                # All tokens share a direction, along which the first routed heads are preferred.
                router.routed += torch.linspace(0.1, -0.1, 5).unsqueeze(1)
        for layer in trained.decoder.layers:
            nn.init.constant_(layer.attention.norm.bias, 0.5)
        return trained

    config = changed(steps=80, anneal_top_k=0, learning_rate=1e-4, log_every=10)
    free = train(skewed(), batch, next_token_output, config, tmp_path / "free")
    biased = train(skewed(bias_rate=0.003), batch, next_token_output, config, tmp_path / "biased")
    assert free[-1]["load_cv"] > 0.7 and biased[0]["load_cv"] > 0.5 and biased[-1]["load_cv"] < 0.2
    assert biased[-1]["load_entropy"] > free[-1]["load_entropy"]


def test_head_loads_are_those_of_all_windows_at_once():
    routed = model(top_k=(3, 2)).double().eval()
    # Seven windows in batches of three: the last batch holds one.
    load = head_loads(routed, TEXT[: 7 * 17 + 1], batch_size=3, length=17)
    whole = routed(TEXT[: 7 * 17].long().view(7, 17)).routing
    assert_equal_to(load, torch.stack([one.active.double().mean(dim=(0, 1)) for one in whole]))
    unrouted = LanguageModel(TransformerConfig(256, d_model=14, num_heads=7, num_layers=1))
    with pytest.raises(ValueError, match="Expected routers"):
        head_loads(unrouted, TEXT, batch_size=3, length=17, limit=1)


def test_a_bias_needs_the_routing(tmp_path):
    with pytest.raises(ValueError, match="routing of each of 2 routers .got 0.. Do let loss return"):
        train(model(bias_rate=0.01), batch, scalar_loss, CONFIG, tmp_path)
    training = RouterTraining(model())
    with pytest.raises(ValueError, match="got 1"):
        training.observe([HeadRouter(14, 7, 2, 3)(torch.randn(5, 14))])


def test_annealing_needs_routers_and_fewer_steps_than_there_are(tmp_path):
    with pytest.raises(ValueError, match="routers for anneal_top_k = 13"):
        train(nn.Linear(3, 1), lambda step: torch.ones(2, 3), lambda model, x: model(x).sum(), CONFIG, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for value in (23, -1, 1.5, True):
        with pytest.raises((TypeError, ValueError), match=r"Expected.*anneal_top_k.*got.*Do "):
            changed(anneal_top_k=value)


@pytest.mark.slow
def test_compiled_routers_anneal_and_train_as_eager_ones(tmp_path, monkeypatch):
    calls, compile_model = [], torch.compile

    def traced(module):
        """Each k makes a graph of its own: machine code for all of them would take a minute."""
        calls.append(module)
        return compile_model(module, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", traced)
    eager, compiled = (
        train(
            model(layers=1, top_k=3, bias_rate=0.01), batch, next_token_output,
            changed(steps=4, anneal_top_k=1, log_every=1, compile=compile), tmp_path / str(compile),
        )
        for compile in (False, True)
    )  # fmt: skip
    assert len(calls) == 2, "Expected a trial of the compiler and the model"
    for one, other in zip(learned(eager), learned(compiled), strict=True):
        assert one == pytest.approx(other, abs=1e-4, nan_ok=True)


def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Four rows of tokens, and a mask that leaves 30 real ones in the first two and 7 in the others."""
    lengths = torch.tensor([17, 13, 5, 2])
    return batch(0)[0], torch.arange(17) < lengths.unsqueeze(1)


def losses_and_gradients(model: nn.Module, inner: LanguageModel, rows: slice):
    tokens, keep = (part[rows] for part in padded_batch())
    output = model(tokens, targets=tokens, keep_mask=keep)
    # The rest of the model only takes part: DDP waits for the gradient of every parameter.
    (output.auxiliary_loss + 0 * output.cross_entropy).backward()
    gradients = {name: parameter.grad for name, parameter in inner.named_parameters()}
    values = [(one.balance_loss.detach(), one.z_loss.detach(), one.load, one.entropy) for one in output.routing]
    return output.auxiliary_loss.detach(), values, gradients


def _half_of_the_padded_batch(rank: int, folder: str) -> None:
    inner = model(balance_loss=0.7, z_loss=0.3).double()
    share_statistics(inner, torch.distributed.group.WORLD)
    distributed = nn.parallel.DistributedDataParallel(inner)
    torch.save(losses_and_gradients(distributed, inner, slice(2 * rank, 2 * rank + 2)), f"{folder}/losses-{rank}.pt")


def _half_of_the_training(rank: int, folder: str) -> None:
    trained, half = model(bias_rate=0.01).double(), slice(2 * rank, 2 * rank + 2)

    def data(index):
        # The loop counts micro-batches over all processes.
        assert index % 2 == rank
        return tuple(part[half] for part in batch(index // 2))

    rows = train(trained, data, next_token_output, changed(log_every=1), f"{folder}/run")
    assert all(router.process_group is None for router in routers(trained))
    torch.save((trained.state_dict(), rows), f"{folder}/training-{rank}.pt")


def _both(rank: int, folder: str) -> None:
    # What a launcher tells accelerate besides; the group is there already, so that no port is used.
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")
    _half_of_the_padded_batch(rank, folder)
    _half_of_the_training(rank, folder)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder where two processes that train together left what they computed."""
    folder = tmp_path_factory.mktemp("processes")
    run_ranks(2, _both, str(folder))
    return folder


def test_two_processes_have_the_losses_and_gradients_of_one(two_processes):
    whole = model(balance_loss=0.7, z_loss=0.3).double()
    loss, values, gradients = losses_and_gradients(whole, whole, slice(None))
    assert all(gradients[name].abs().max() > 1e-6 for name in gradients if "router.routed" in name)
    for rank in range(2):
        own_loss, own_values, own_gradients = torch.load(two_processes / f"losses-{rank}.pt")
        assert_equal_to(own_loss, loss)
        for own, expected in zip(own_values, values, strict=True):
            for one, other in zip(own, expected, strict=True):
                assert_equal_to(one, other)
        for name, gradient in gradients.items():
            assert_equal_to(own_gradients[name], gradient)


def test_training_in_two_processes_is_that_of_the_global_batch(two_processes, tmp_path):
    whole = model(bias_rate=0.01).double()
    rows = train(whole, batch, next_token_output, changed(log_every=1), tmp_path)
    for rank in range(2):
        state, _ = torch.load(two_processes / f"training-{rank}.pt")
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=0, atol=1e-8)
    _, own_rows = torch.load(two_processes / "training-0.pt")
    for own, expected in zip(own_rows, rows, strict=True):
        for name in ("loss", *COLUMNS):
            assert own[name] == pytest.approx(expected[name], abs=1e-6)
