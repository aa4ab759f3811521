"""Federated learning: what travels, the weighted mean, and clients that fail or poison a round."""

from __future__ import annotations

import importlib
import logging
import re
import sys

import numpy as np
import pytest
import torch
from example_runs import logs
from flwr.clientapp.mod import LocalDpMod, fixedclipping_mod
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
)

from gohgraph import HeadGraphConfig, LanguageModel, RoutingConfig, TransformerConfig
from gohgraph.learning.data.corpus import Corpus
from gohgraph.learning.federated import flower
from gohgraph.learning.federated.apps import client_app
from gohgraph.learning.federated.client import Client
from gohgraph.learning.federated.flower import Array, ArrayRecord, MetricRecord
from gohgraph.learning.federated.server import federate, last_weights
from gohgraph.learning.federated.sharing import SHARINGS, Sharing, load_state
from gohgraph.learning.federated.simulation import InlineGrid, simulate
from gohgraph.learning.federated.split import dirichlet_split
from gohgraph.learning.interrupts import TrainingInterrupted
from gohgraph.learning.loop import TrainConfig
from gohgraph.learning.optim import make_optimizer
from gohgraph.learning.regimes.language import next_token_output
from gohgraph.learning.regimes.low_rank import add_low_rank


@pytest.fixture(autouse=True)
def quiet():
    """Without Flower's many lines."""
    logging.getLogger("flwr").setLevel(logging.ERROR)


SIZES = (2, 3, 5)
STEPS, ROUNDS = 3, 2
# One rate for all: what the plain loop of a test knows.
CONFIG = TrainConfig(
    steps=STEPS * ROUNDS, optimizer="adamw", learning_rate=0.05, graph_lr_factor=1.0, warmup=2, device="cpu"
)


def model(**graph) -> LanguageModel:
    torch.manual_seed(7)
    config = TransformerConfig(
        11, d_model=14, num_heads=7, num_layers=1, d_ff=13, head_graph=HeadGraphConfig(**graph)
    )
    return LanguageModel(config)


def batch(number: int, step: int):
    tokens = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(100 * number + step))
    return tokens[:, :-1], tokens[:, 1:]


def client(number: int, folder, kind: str = "full", own: LanguageModel | None = None) -> Client:
    return Client(
        model() if own is None else own,
        SHARINGS[kind],
        lambda step: batch(number, step),
        next_token_output,
        CONFIG,
        rounds=ROUNDS,
        num_examples=SIZES[number],
        evaluate=lambda model: {"validation_loss": next_token_output(model, batch(number, 99)).loss.item()},
        folder=folder / f"client-{number}",
    )


def run(folder, kind: str = "full", *, mods=(), rounds: int = ROUNDS, clients=range(3), grid=InlineGrid, **more):
    """Federates some of three clients; returns the log and the shared weights at the end."""
    clients = list(clients)
    app = client_app(lambda context: client(clients[context.node_config["partition-id"]], folder, kind), mods)
    initial = SHARINGS[kind].shared_state(model())
    rows = federate(grid(app, len(clients)), initial, folder / "run", rounds=rounds, **more)
    return rows, last_weights(folder / "run")


def averaged(updates: list[dict], weights) -> dict[str, torch.Tensor]:
    pairs, total = list(zip(weights, updates, strict=True)), sum(weights)
    return {name: sum(weight * update[name].double() for weight, update in pairs) / total for name in updates[0]}


def assert_states_close(actual, expected, tolerance: float = 1e-6) -> None:
    assert actual.keys() == expected.keys()
    for name in actual:
        torch.testing.assert_close(actual[name].double(), expected[name].double(), rtol=0, atol=tolerance)


def test_kinds_of_weights_are_split_without_rest():
    routed = model(routing=RoutingConfig(2, 3))
    add_low_rank(routed, 2)
    states = {kind: Sharing(shared=(kind,)).shared_state(routed) for kind in ("base", "graph", "lora")}
    names = [name for state in states.values() for name in state]
    assert len(names) == len(set(names))
    assert {id(p) for p in routed.parameters()} <= {
        id(dict(routed.state_dict(keep_vars=True))[name]) for name in names
    }
    assert any("router" in name for name in states["graph"]) and all("lora_" in name for name in states["lora"])
    SHARINGS["lora-personal-graph"].prepare(routed)
    trained = {name for name, parameter in routed.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in [*states["graph"], *states["lora"]] if name in dict(routed.named_parameters())}


def test_tied_weights_travel_once():
    tied = LanguageModel(TransformerConfig(11, d_model=14, num_heads=7, num_layers=1, d_ff=13, tie_embeddings=True))
    state = SHARINGS["full"].shared_state(tied)
    assert sum(tensor.numel() for tensor in state.values()) == sum(p.numel() for p in tied.parameters())


@pytest.mark.parametrize("shared, personal", [((), ()), (("base",), ("base",)), (("heads",), ())])
def test_impossible_sharing_is_refused(shared, personal):
    with pytest.raises(ValueError, match="Expected kinds"):
        Sharing(shared, personal)


def test_a_model_without_what_is_shared_is_refused(tmp_path):
    with pytest.raises(ValueError, match="weights of kind \\['lora'\\]"):
        client(0, tmp_path, "lora")
    own = SHARINGS["graph"].shared_state(model())
    with pytest.raises(ValueError, match=r"weights of this model \(got .* for None; .* for None; "):
        load_state(own, SHARINGS["full"].shared_state(model()))
    name, tensor = next(iter(own.items()))
    shape = list(tensor.shape)
    with pytest.raises(ValueError, match=re.escape(f"(got {name} {[2, *shape]} for {shape}). Do give")):
        load_state(own, {**own, name: torch.stack([tensor, tensor])})


def test_a_client_trains_as_the_plain_loop_does(tmp_path):
    expected = model()
    optimizer = make_optimizer(expected, CONFIG, torch.device("cpu"))
    for step in range(STEPS, 2 * STEPS):
        for group in optimizer.param_groups:
            group["lr"] = CONFIG.learning_rate * CONFIG.learning_rate_factor(step)
        optimizer.zero_grad()
        next_token_output(expected, batch(1, step)).loss.backward()
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
        optimizer.step()
    update, metrics = client(1, tmp_path).fit(SHARINGS["full"].shared_state(model()), round=2)
    assert_states_close(update, SHARINGS["full"].shared_state(expected), 1e-7)
    assert metrics["loss"] > 0


def test_a_round_can_be_repeated_and_old_personal_weights_go(tmp_path):
    own = client(0, tmp_path, "personal-graph")
    start = own.sharing.shared_state(model())
    first = own.fit(start, round=1)[0]
    second, again = (client(0, tmp_path, "personal-graph").fit(first, round=2)[0] for _ in range(2))
    assert all(torch.equal(second[name], again[name]) for name in second)
    assert sorted(path.name for path in (tmp_path / "client-0").iterdir()) == [
        "round-000001.safetensors",
        "round-000002.safetensors",
    ]
    # A new run in an old folder begins anew.
    assert all(torch.equal(first[name], tensor) for name, tensor in own.fit(start, round=1)[0].items())
    assert [path.name for path in (tmp_path / "client-0").iterdir()] == ["round-000001.safetensors"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rounds": 4}, "divide into 4 rounds"),
        ({"config": TrainConfig(steps=6, precision="bf16")}, "precision"),
        ({"num_examples": 0}, "Expected examples"),
        ({"sharing": SHARINGS["personal-graph"], "folder": None}, "Expected a folder"),
    ],
)
def test_impossible_clients_are_refused(change, message):
    arguments = {"sharing": SHARINGS["full"], "config": CONFIG, "rounds": 2, "num_examples": 1}
    with pytest.raises(ValueError, match=message):
        Client(model(), batch=batch, loss=next_token_output, **{**arguments, **change})


def test_a_loss_that_runs_away_is_an_error_and_keeps_personal_weights(tmp_path):
    own = client(0, tmp_path, "personal-graph")
    shared = {name: torch.full_like(tensor, torch.inf) for name, tensor in own.sharing.shared_state(model()).items()}
    with pytest.raises(FloatingPointError, match="finite loss"):
        own.fit(shared, round=1)
    assert not (tmp_path / "client-0").exists()


def test_the_server_averages_by_examples_and_counts_bytes(tmp_path):
    rows, weights = run(tmp_path, rounds=1)
    start = SHARINGS["full"].shared_state(model())
    updates = [client(number, tmp_path).fit(start, round=1)[0] for number in range(3)]
    expected = averaged(updates, SIZES)
    assert_states_close(weights, expected)
    assert max((weights[name] - averaged(updates, (1, 1, 1))[name]).abs().max() for name in weights) > 1e-4
    losses = [client(number, tmp_path).measure(weights, 1)["validation_loss"] for number in range(3)]
    mean = sum(size * loss for size, loss in zip(SIZES, losses, strict=True)) / sum(SIZES)
    assert rows[0]["validation_loss"] == pytest.approx(mean) and rows[0]["worst"] == pytest.approx(max(losses))
    # numpy's header has 128 bytes.
    one = sum(4 * tensor.numel() + 128 + len(name) for name, tensor in start.items())
    assert {rows[0][f"bytes_{way}"] for way in ("down", "up", "evaluate")} == {3 * one}
    assert (rows[0]["clients"], rows[0]["refused"]) == (3, 0)


@pytest.mark.parametrize("kind, personal", [("personal-graph", "graph"), ("local-graph", "graph")])
def test_personal_graphs_differ_and_shared_weights_do_not(tmp_path, kind, personal):
    rows, shared = run(tmp_path, kind)
    clients = [client(number, tmp_path, kind) for number in range(3)]
    for own in clients:
        own.measure(shared, ROUNDS)
    first, *others = clients
    for other in others:
        mine, theirs = first.sharing.shared_state(first.model), other.sharing.shared_state(other.model)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        mine, theirs = first.sharing.personal_state(first.model), other.sharing.personal_state(other.model)
        assert mine and not any(torch.equal(mine[name], theirs[name]) for name in mine)
    assert not any("output_graph" in name for name in shared)
    assert (rows[-1]["bytes_up"] == 0) == (kind == "local-graph") == (not shared)


def first_array(change):
    """A modifier of the client that changes the first array of its update."""

    def mod(message, context, call_next):
        reply = call_next(message, context)
        if context.node_config["partition-id"] == 2:
            arrays = reply.content["arrays"]
            name = next(iter(arrays))
            reply.content["arrays"] = ArrayRecord({**arrays, **change(name, arrays[name].numpy())})
        return reply

    return mod


def metrics(change):
    def mod(message, context, call_next):
        reply = call_next(message, context)
        if context.node_config["partition-id"] == 2:
            reply.content["metrics"] = MetricRecord({**reply.content["metrics"], **change})
        return reply

    return mod


def failing(message, context, call_next):
    if context.node_config["partition-id"] == 2:
        raise RuntimeError("power cut")
    return call_next(message, context)


def unnamed(message, context, call_next):
    reply = call_next(message, context)
    if context.node_config["partition-id"] == 2:
        del reply.content["metrics"]
    return reply


FAULTS = {
    "error": (failing, "power cut"),
    "nan": (first_array(lambda name, array: {name: Array(array * np.nan)}), "not finite"),
    "inf": (first_array(lambda name, array: {name: Array(array + np.float32(np.inf))}), "not finite"),
    "shape": (first_array(lambda name, array: {name: Array(array[:1])}), "has shape"),
    "name": (first_array(lambda name, array: {"other": Array(array)}), "other names"),
    "type": (first_array(lambda name, array: {name: Array(array.astype(np.float64))}), "has type"),
    "bytes": (first_array(lambda name, array: {name: Array("float32", (1,), "numpy.ndarray", b"?")}), "be read"),
    "weight": (metrics({"num-examples": -7.0}), "above 0"),
    "weight-nan": (metrics({"num-examples": float("nan")}), "not a finite number"),
    "metric": (metrics({"loss": float("inf")}), "not a finite number"),
    "metric-name": (metrics({"own": 1.0}), "not those of the others"),
    "no-metrics": (unnamed, "record of metrics"),
}


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """The weights of a run of the first two clients alone."""
    return run(tmp_path_factory.mktemp("healthy"), clients=[0, 1])[1]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_poisoned_update_does_not_change_the_mean(tmp_path, fault, caplog, healthy):
    mod, message = FAULTS[fault]
    rows, weights = run(tmp_path, mods=[mod])
    assert all(torch.equal(weights[name], healthy[name]) for name in weights)
    assert [(row["clients"], row["refused"]) for row in rows] == [(2, 1)] * ROUNDS
    warned = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert len(warned) == ROUNDS and all(message in line for line in warned)


def test_a_round_without_any_update_leaves_the_weights(tmp_path, caplog):
    def all_fail(message, context, call_next):
        raise RuntimeError("no power")

    rows, weights = run(tmp_path, mods=[all_fail])
    start = SHARINGS["full"].shared_state(model())
    assert all(torch.equal(weights[name], start[name]) for name in start)
    assert [(row["clients"], row["refused"], row["loss"]) for row in rows] == [(0, 3, None)] * ROUNDS
    assert sum("shared weights stay as they were" in record.getMessage() for record in caplog.records) == ROUNDS


class Deaf(InlineGrid):
    """Its second client is asked and never answers."""

    asked: list[tuple[str, int]] = []

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        self.asked += [(message.metadata.message_type, message.metadata.dst_node_id) for message in messages]
        return super().send_and_receive([one for one in messages if one.metadata.dst_node_id != 2])


def test_a_silent_client_is_left_out_and_not_waited_for_twice(tmp_path):
    rows, weights = run(tmp_path, rounds=1, grid=Deaf)
    start = SHARINGS["full"].shared_state(model())
    updates = [client(number, tmp_path).fit(start, round=1)[0] for number in (0, 2)]
    assert_states_close(weights, averaged(updates, (2, 5)))
    assert (rows[0]["clients"], rows[0]["refused"]) == (2, 1)
    assert sorted(Deaf.asked) == [("evaluate", 1), ("evaluate", 3), ("train", 1), ("train", 2), ("train", 3)]


def distance(weights, start) -> float:
    return sum((weights[name].double() - start[name].double()).square().sum() for name in start).sqrt().item()


def private(noise: float, wrapper=DifferentialPrivacyServerSideFixedClipping):
    mean = FedAvg(min_train_nodes=1, min_evaluate_nodes=1, weighted_by_key="participants")
    return wrapper(mean, noise, 0.01, 3)


def test_differential_privacy_clips_and_adds_noise(tmp_path):
    start = SHARINGS["full"].shared_state(model())
    free = run(tmp_path / "free", rounds=1)[1]
    clipped = run(tmp_path / "clipped", rounds=1, strategy=private(0.0))[1]
    assert distance(free, start) > 0.1 and 0.001 < distance(clipped, start) < 0.0101
    noisy = run(tmp_path / "noisy", rounds=1, strategy=private(3.0))[1]
    size = sum(tensor.numel() for tensor in start.values())
    # Its deviation is noise * clip / clients.
    assert distance(noisy, clipped) == pytest.approx(0.01 * size**0.5, rel=0.1)


def test_one_failure_does_not_stop_a_private_round(tmp_path):
    weights = run(tmp_path, rounds=1, mods=[FAULTS["nan"][0]], strategy=private(0.0))[1]
    assert 0.001 < distance(weights, SHARINGS["full"].shared_state(model())) < 0.0101


def test_modifiers_of_privacy_work_on_clients(tmp_path):
    start = SHARINGS["full"].shared_state(model())
    strategy = private(0.0, DifferentialPrivacyClientSideFixedClipping)
    weights = run(tmp_path / "clipped", rounds=1, mods=[fixedclipping_mod], strategy=strategy)[1]
    assert 0.001 < distance(weights, start) < 0.0101
    local = LocalDpMod(clipping_norm=0.01, sensitivity=0.01, epsilon=5.0, delta=1e-5)
    weights = run(tmp_path / "local", rounds=1, mods=[local])[1]
    assert distance(weights, start) > 0.05


def test_an_interrupted_run_is_resumed_with_equal_results(tmp_path):
    whole, expected = run(tmp_path / "whole", "personal-graph")
    with pytest.raises(TrainingInterrupted, match="after round 1"):
        run(tmp_path / "part", "personal-graph", interrupted=lambda: True)
    # The clients had begun the next round when the server stopped.
    ahead, shared = client(0, tmp_path / "part", "personal-graph"), last_weights(tmp_path / "part" / "run")
    ahead.fit(shared, round=2)
    rows, weights = run(tmp_path / "part", "personal-graph", resume=True)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert logs(tmp_path / "part") == logs(tmp_path / "whole") and rows[-1]["loss"] == whole[-1]["loss"]
    with pytest.raises(ValueError, match="configuration the run"):
        run(tmp_path / "part", "personal-graph", resume=True, settings={"alpha": 1})
    (sorted((tmp_path / "part" / "run" / "checkpoints").iterdir())[-1] / "shared.safetensors").write_bytes(b"?")
    with pytest.raises(ValueError, match="which is damaged"):
        run(tmp_path / "part", "personal-graph", resume=True)


def test_rounds_are_tracked_and_evaluated_now_and_then(tmp_path):
    tracked = []
    rows, _ = run(tmp_path, evaluate_every=2, tracker=lambda values, step: tracked.append((step, values["loss"])))
    assert tracked == [(row["step"], row["loss"]) for row in rows]
    assert rows[0]["validation_loss"] is None and rows[1]["validation_loss"] > 0
    assert (rows[0]["bytes_evaluate"] == 0) and rows[1]["bytes_evaluate"] > 0


def test_unknown_backends_are_refused():
    with pytest.raises(ValueError, match="Expected backend of"):
        simulate(lambda grid: None, client_app(lambda context: None), 3, backend="threads")


def test_texts_are_dealt_out_whole():
    texts = [
        Corpus(str(kind), *(torch.full((size,), kind, dtype=torch.uint8) for size in (1009, 503))) for kind in range(3)
    ]
    clients, shares = dirichlet_split(texts, 5, alpha=0.5, minimum=10, seed=1)
    for kind in range(3):
        counts = torch.tensor([(one.train == kind).sum() for one in clients])
        assert torch.equal(counts, shares[:, kind]) and counts.sum() == 1009
        assert sum((one.validation == kind).sum() for one in clients) == 503
    again = dirichlet_split(texts, 5, alpha=0.5, minimum=10, seed=1)[0]
    assert all(torch.equal(one.train, other.train) for one, other in zip(clients, again, strict=True))
    even = dirichlet_split(texts, 5, alpha=1e5, minimum=10)[1]
    assert (even - 1009 / 5).abs().max() < 10 and (shares - 1009 / 5).abs().max() > 100
    for change in ({"alpha": 0.0}, {"alpha": 0.01, "minimum": 300}):
        with pytest.raises(ValueError, match="alpha"):
            dirichlet_split(texts, 5, **{"minimum": 10, **change})


def test_a_missing_flower_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr.app", None)
    with pytest.raises(ImportError, match="gohgraph\\[federated\\]"):
        importlib.reload(flower)


