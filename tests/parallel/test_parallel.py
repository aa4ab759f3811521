"""Distributed training equals training in one process: gloo ranks on this machine."""

from __future__ import annotations

import shutil
import signal

import pytest
import torch
from example_runs import logs
from pairs import EXHAUSTIVE
from parallel_checks import (
    BATCH,
    LENGTH,
    MODERN,
    VOCAB,
    all_of,
    alone,
    bytes_sent,
    cases,
    largest_errors,
    losses_apart,
    others_apart,
    refusals,
    special_cases,
    train_language_model,
)
from planning.cost import Cluster, Workload, graph_cost, plain_cost
from ranks import run_ranks
from torch.torch_version import TorchVersion

from gohgraph.parallel import ParallelConfig, plan_exchange
from gohgraph.parallel.ranks import lost_ranks

# What takes long is dealt out among the kinds of parallelism. By themselves, all graphs are compared at one, two and
# four ranks in test_sharded_graph.py; a whole training by tensor parallelism is below.
ALL, SPECIAL = list(cases()), list(special_cases())
TP, DDP, FSDP = (ParallelConfig((mode,)) for mode in ("tp", "ddp", "fsdp"))
TP_FSDP, TP_DDP = ParallelConfig(("tp", "fsdp")), ParallelConfig(("ddp", "tp"))
TOKENS = ParallelConfig(("tp",), sequence_parallel=True, recompute=True)
STEPS = 20 if EXHAUSTIVE else 5


def some(names, first, of=2):
    return names if EXHAUSTIVE else names[first::5][:of]


def equal(config, names, **settings):
    return (largest_errors, config, names, settings)


def trains(config, names, optimizer="adamw", graph_matrix_lr_factor=None):
    return (losses_apart, config, names, STEPS, optimizer, graph_matrix_lr_factor)


ONE_PROCESS = {
    1: [equal(TP, ALL[:2]), equal(TP, SPECIAL, layers=2)],
    2: [
        equal(TP, ALL), equal(DDP, ALL if EXHAUSTIVE else ALL[::2]), equal(FSDP, ALL if EXHAUSTIVE else ALL[1::2]),
        equal(TP, SPECIAL, layers=2), equal(TOKENS, ["deep", "moh"], layers=2, norm_first=False),
        (others_apart, TP), (others_apart, TOKENS),
        equal(TP, ["deep"], layers=2, num_kv_heads=4, activation="swiglu", tie_embeddings=False, bias=False),
        equal(TP, ["deep"], layers=2, **MODERN), equal(TOKENS, ["deep"], layers=2, **MODERN),
        equal(FSDP, ["deep"], layers=2, **MODERN),
        trains(TP, some(ALL, 0)), trains(DDP, some(ALL, 1)), trains(FSDP, some(ALL, 2)),
        trains(TP, ["deep"], "muon"), trains(FSDP, ["moh"], "muon"), trains(TP, ["deep"], "muon", 0.5),
    ],
    4: [
        equal(TP, some(ALL, 1)), equal(TP_FSDP, some(ALL, 3)), equal(TP_DDP, some(ALL, 4, of=1)),
        equal(TOKENS, some(SPECIAL, 2, of=1), layers=2),
        trains(TP_FSDP, some(ALL, 4, of=1)), trains(TP_FSDP, ["deep"], "muon", 0.5),
        *([trains(TP, some(ALL, 3, of=1)), trains(TP_DDP, ALL)] * EXHAUSTIVE),
    ],
}  # fmt: skip
# The first half of the cases has no router, which adds the same to all. Of two sites and two numbers of ranks, every
# case sends its heads at two of the four.
SENT = [*ALL[:8], "ring-routed", "deep", "into-one"]
BYTES = {
    ranks: [
        (bytes_sent, TP, ["plain", *(SENT if EXHAUSTIVE else SENT[(ranks == 4) ^ (site == "scores") :: 2])], site)
        for site in ("outputs", "scores")
    ]
    for ranks in (2, 4)
}
CALLS = {
    1: ONE_PROCESS[1],
    2: [*ONE_PROCESS[2], *BYTES[2], (bytes_sent, FSDP, ["plain", *ALL[:8]], "outputs"), (refusals,)],
    4: [*ONE_PROCESS[4], *BYTES[4]],
}


def _needs_new_torch():
    if TorchVersion(torch.__version__) < "2.13":
        pytest.skip("sharded tensors of older torch lack operators, or add other gradients up (docs/limits.md)")


@pytest.fixture(scope="module")
def found(request):
    """The number of ranks, and of each of their calls what every rank gave, from one group: to start it takes long."""
    _needs_new_torch()
    calls = CALLS[request.param]
    return request.param, list(zip(calls, zip(*run_ranks(request.param, all_of, calls), strict=True), strict=True))


def of(found, calls):
    """The results of these calls."""
    return [next(results for call, results in found[1] if call == wanted) for wanted in calls]


def ranks(*numbers):
    return pytest.mark.parametrize("found", numbers, indirect=True)


@ranks(1, 2, 4)
def test_ranks_equal_one_process(found):
    world = found[0]
    for (function, *args), results in zip(ONE_PROCESS[world], of(found, ONE_PROCESS[world]), strict=True):
        errors = {name: max(result[name] for result in results) for name in results[0]}
        limit = 1e-4 if function is losses_apart else 1e-9
        print(f"{world} ranks, {args[0]}, {len(errors)} cases, {function.__name__}: {max(errors.values()):.1e}")
        assert {name: error for name, error in errors.items() if not error <= limit} == {}, (function, args[0])


SMALL = "--d-model 16 --num-heads 4 --num-layers 1 --d-ff 20 --length 12 --batch-size 2 --steps 6 --smoke".split()
RUN = [*SMALL, "--router", "--device", "cpu", "--checkpoint-every", "3", "--eval-every", "6", "--parallel", "tp"]


def train(world, folder, *more, die_at=None):
    text = folder.parent / "text"
    text.write_text(" ".join(f"head {number} talks to head {number**2 % 97}" for number in range(400)))
    more = ("--data", str(text), *more)
    return run_ranks(world, train_language_model, [*RUN, "--run", str(folder), *more], die_at, dies=die_at is not None)


def losses(folder):
    (rows,) = logs(folder).values()
    return [[float(row[name]) for name in ("loss", "balance_loss")] for row in rows]


def test_a_run_goes_on_at_another_number_of_ranks_and_after_one_is_lost(tmp_path):
    _needs_new_torch()
    whole = tmp_path / "whole"
    assert [code for code, _ in train(2, whole)] == [0, 0]
    expected = losses(whole)
    assert len(expected) == 6 and (whole / "model" / "model.safetensors").is_file()
    for ranks in (1, 4):
        folder = tmp_path / str(ranks)
        shutil.copytree(whole, folder)
        shutil.rmtree(folder / "checkpoints" / "step-000006")
        assert [code for code, _ in train(ranks, folder, "--resume")] == [0] * ranks
        for row, other in zip(losses(folder), expected, strict=True):
            assert row == pytest.approx(other, abs=1e-4)
    ((code, errors),) = train(1, whole, "--resume", "--parallel", "ddp")
    assert code == 2 and "Expected a checkpoint of whole models" in errors.splitlines()[-1]
    part = tmp_path / "part"
    ((code, errors),) = train(2, part, die_at=4)
    last = errors.splitlines()[-1]
    assert code == 2 and last.startswith("error: Expected all 2 ranks to go on") and last.endswith("--resume.")
    assert "torchrun --nproc-per-node 2 -- examples/train_language_model.py" in last
    assert [path.name for path in (part / "checkpoints").glob("step-*")] == ["step-000003"]
    assert [code for code, _ in train(2, part, "--resume")] == [0, 0]
    assert losses(part) == expected


@ranks(2, 4)
def test_the_plan_predicts_the_bytes_that_are_counted(found):
    world = found[0]
    model = Workload(8, 1, 48, 20, vocab_size=VOCAB, length=LENGTH, batch_size=BATCH, number_bytes=8)
    cluster = Cluster(tensor=world)
    for (_, _, names, site), results in zip(BYTES[world], of(found, BYTES[world]), strict=True):
        counted = results[0]
        plain = sum(counted["plain"].values())
        assert plain == pytest.approx(plain_cost(model, cluster).tensor_bytes, rel=0.2)
        for name in names[1:]:
            graphs = alone((cases() | special_cases())[name], site)
            added = sum(counted[name].values()) - plain
            predicted = graph_cost(graphs, model, cluster).tensor_bytes
            assert added == pytest.approx(predicted, rel=0.2, abs=8 * 8), (site, name)
            if name in ("groups", "empty"):
                assert added == predicted == 0


def test_every_case_is_counted_at_both_sites_and_both_numbers_of_ranks():
    counted = {(world, site, name) for world in BYTES for _, _, names, site in BYTES[world] for name in names[1:]}
    assert {(world, name) for world, _, name in counted} == {(world, name) for world in BYTES for name in SENT}
    assert {(site, name) for _, site, name in counted} == {(s, name) for s in ("outputs", "scores") for name in SENT}


@ranks(2)
def test_the_plan_predicts_the_bytes_of_sharded_parameters(found):
    call = (bytes_sent, FSDP, ["plain", *ALL[:8]], "outputs")
    ((counted, *_),) = of(found, [call])
    model = Workload(8, 1, 48, 20, vocab_size=VOCAB, length=LENGTH, batch_size=BATCH, number_bytes=8)
    for name in ALL[:8]:
        added = sum(counted[name].values()) - sum(counted["plain"].values())
        predicted = graph_cost(alone(cases()[name], "outputs"), model, Cluster(data=2, is_sharded=True)).data_bytes
        assert added == pytest.approx(predicted, rel=0.2), name


def test_a_rank_that_torchrun_ends_says_how_to_go_on(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    before = signal.getsignal(signal.SIGTERM)
    told = "Expected all 3 ranks to go on .*SIGTERM.*Do start again"
    with pytest.raises(ValueError, match=told), lost_ranks("start again"):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(RuntimeError, match="shapes"), lost_ranks("start again"):
        raise RuntimeError("shapes do not fit")


@pytest.mark.parametrize(
    ("modes", "options", "world", "told"),
    [
        ((), {}, 2, "one or more"),
        (("tp", "tp"), {}, 2, "one or more"),
        (("ddp",), {"tensor_ranks": 2}, 2, "Expected tp"),
        (("tp",), {"tensor_ranks": 0}, 2, "tensor_ranks to be an int >= 1"),
        (("tp",), {"tensor_ranks": 2}, 4, "Expected 2 ranks"),
        (("tp", "fsdp"), {}, 3, "Expected 2 ranks"),
    ],
)
def test_ranks_that_cannot_share_the_work_are_refused(modes, options, world, told):
    with pytest.raises(ValueError, match=told):
        ParallelConfig(modes, **options).sizes(world)


def test_modes_make_a_mesh():
    assert ParallelConfig(("ddp",)).sizes(4) == (4, 1, 1)
    assert ParallelConfig(("fsdp",)).sizes(4) == (1, 4, 1)
    assert ParallelConfig(("tp",)).sizes(4) == (1, 1, 4)
    assert ParallelConfig(("tp", "fsdp")).sizes(8) == (1, 4, 2)
    assert ParallelConfig(("ddp", "tp"), tensor_ranks=4).sizes(8) == (2, 1, 4)
    assert ParallelConfig(("ddp", "fsdp", "tp")).sizes(16, machines=2) == (2, 4, 2)


@pytest.mark.parametrize(
    ("edges", "may_scatter", "kind", "heads"),
    [
        ([(0, 1), (2, 3)], True, "nothing", ()),
        ([(0, 2), (0, 3)], True, "all-gather", ((0,), (2,))),
        ([(0, 3), (1, 3)], True, "reduce-scatter", ((0,), (3,))),
        ([(0, 3), (1, 3)], False, "all-gather", ((0, 1), (2, 3))),
        ([(1, 2)], True, "all-gather", ((1,), (2,))),
    ],
)
def test_the_exchange_moves_the_fewest_heads(edges, may_scatter, kind, heads):
    exchange = plan_exchange(4, 2, edges, may_scatter=may_scatter)
    assert (exchange.kind, exchange.heads) == (kind, heads)


@ranks(2)
def test_what_cannot_be_sharded_is_refused(found):
    ((told, *_),) = of(found, [(refusals,)])
    assert told == [
        "Expected num_heads to be a multiple of 2 ranks (got 5). Do change either.",
        "Expected a HeadGraphConv at outputs, whose heads may lie on several ranks (got GraphExperts). Do replace it, "
        "or train data parallel: ddp or fsdp.",
        "Expected one round of messages between scores across ranks (got 2). Do set rounds=1, or keep the edges of a "
        "score graph within ranks.",
        "Expected a multiple of 2 tokens with sequence_parallel (got 5). Do pad them, or turn it off.",
        "Expected residual='plain' under tensor parallelism (got 'hyper'). Do change it, or train data parallel: ddp "
        "or fsdp.",
    ]  # fmt: skip
