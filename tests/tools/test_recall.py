from __future__ import annotations

import dataclasses

import pytest
import torch
from benchmarks.tasks.recall import RecallModel, RecallTask, recall_batch

from gohgraph import HeadGraphConfig, SiteConfig, TransformerConfig

# Five cues of either kind in an episode, of eleven; the items fill their square of pairs but for six.
TASK = RecallTask(num_cues=11, num_values=7, num_items=19, batch_size=257)


def config(**changes) -> TransformerConfig:
    settings = {"d_model": 30, "num_heads": 5, "num_layers": 2, "d_ff": 13, "positions": "none"}
    return TransformerConfig(TASK.vocab_size, **{**settings, **changes})


@pytest.fixture(scope="module")
def batch():
    return recall_batch(TASK, step=3, seed=5)


def test_shapes_and_ranges(batch):
    cues, values, answers = batch
    assert cues.shape == (257, 20, 2) and values.shape == (257, 20) and answers.shape == (257,)
    assert cues.dtype == values.dtype == answers.dtype == torch.int64
    assert set(cues.unique().tolist()) == set(range(11))
    assert set(values[:, :-1].unique().tolist()) == set(answers.unique().tolist()) == set(range(7))
    assert (values[:, -1] == TASK.unknown).all() and TASK.unknown == 7


def test_answer_is_the_value_of_the_only_item_with_both_cues(batch):
    cues, values, answers = batch
    both = (cues[:, :-1] == cues[:, -1:]).all(dim=-1)  # [B, N]
    assert (both.sum(dim=1) == 1).all()
    assert torch.equal(values[:, :-1][both], answers)


@pytest.mark.parametrize("num_items", [3, 4, 5, 7, 16, 17, 19])
def test_either_cue_of_the_query_has_distractors(num_items):
    task = dataclasses.replace(TASK, num_items=num_items)
    cues, _, _ = recall_batch(task, step=0, seed=0)
    same = cues[:, :-1] == cues[:, -1:]  # [B, N, 2]
    only_a, only_b = same[..., 0] & ~same[..., 1], same[..., 1] & ~same[..., 0]
    assert only_a.any(dim=1).all() and only_b.any(dim=1).all()


def test_pairs_of_an_episode_differ(batch):
    pairs = batch[0][:, :-1, 0] * TASK.num_cues + batch[0][:, :-1, 1]  # [B, N]
    assert all(len(row.unique()) == TASK.num_items for row in pairs)


def test_place_and_single_cues_tell_nothing():
    task = RecallTask(num_cues=5, num_values=2, num_items=9, batch_size=20_000)
    cues, values, _ = recall_batch(task, step=0, seed=0)
    asked = (cues[:, :-1] == cues[:, -1:]).all(dim=-1).float().mean(dim=0)  # [N]
    torch.testing.assert_close(asked, torch.full((9,), 1 / 9), atol=0.01, rtol=0)
    queries = torch.stack([torch.bincount(cues[:, -1, kind], minlength=5) for kind in (0, 1)]) / 20_000
    torch.testing.assert_close(queries, torch.full((2, 5), 1 / 5), atol=0.015, rtol=0)
    assert abs(values[:, :-1].float().mean().item() - 0.5) < 0.01


def test_batches_are_a_pure_function_of_seed_and_step(batch):
    state = torch.random.get_rng_state()
    again = recall_batch(TASK, step=3, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(map(torch.equal, batch, again))
    for step, seed in ((4, 5), (3, 6), (5, 3), (3, 5 + 2**32)):
        assert not torch.equal(recall_batch(TASK, step=step, seed=seed)[0], batch[0])


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("num_items", 2, ValueError),
        ("num_cues", 4, ValueError),
        ("num_values", 1, ValueError),
        ("batch_size", 0, ValueError),
        ("batch_size", 2.0, TypeError),
        ("num_cues", True, TypeError),
    ],
)
def test_task_is_checked(name, value, error):
    with pytest.raises(error, match=rf"^Expected {name} .*got {value}.*\. Do "):
        dataclasses.replace(TASK, **{name: value})


def test_model_is_checked():
    with pytest.raises(ValueError, match="Expected vocab_size = 30"):
        RecallModel(TASK, dataclasses.replace(config(), vocab_size=31))
    with pytest.raises(ValueError, match="positions='none'"):
        RecallModel(TASK, config(positions="rotary"))


def test_model_reads_items_as_a_set(batch):
    cues, values, _ = batch
    model = RecallModel(TASK, config(head_graph=HeadGraphConfig(scores=SiteConfig.ring(2)))).double()
    order = torch.cat((torch.randperm(19), torch.tensor([19])))
    torch.testing.assert_close(model(cues, values), model(cues[:, order], values[:, order]), rtol=0, atol=1e-10)


def test_embedding_is_the_sum_of_cue_a_cue_b_and_value():
    model = RecallModel(TASK, config())
    seen = []
    model.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(torch.tensor([[[2, 3]]]), torch.tensor([[5]]))
    table = model.embedding.weight
    torch.testing.assert_close(seen[0][0, 0], table[2] + table[11 + 3] + table[22 + 5])


def test_variants_differ_in_their_head_graphs_only():
    plain = RecallModel(TASK, config())
    graphs = RecallModel(TASK, config(head_graph=HeadGraphConfig(scores=SiteConfig())))
    fresh = graphs.state_dict()
    added = {name for name in fresh if "_graph" in name}
    assert added and fresh.keys() - added == plain.state_dict().keys()
    plain.load_state_dict({name: value for name, value in fresh.items() if name not in added})
    cues, values, _ = recall_batch(TASK, step=0, seed=0)
    torch.testing.assert_close(plain(cues, values), graphs(cues, values), rtol=0, atol=1e-5)


def test_a_model_learns_the_task():
    task = RecallTask(num_cues=3, num_values=3, num_items=5, batch_size=64)
    shape = {"d_model": 24, "num_heads": 2, "num_layers": 1, "d_ff": 48, "positions": "none"}
    model = RecallModel(task, TransformerConfig(task.vocab_size, **shape))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(200):
        cues, values, answers = recall_batch(task, step, seed=0)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(cues, values), answers).backward()
        optimizer.step()
    cues, values, answers = recall_batch(dataclasses.replace(task, batch_size=512), 0, seed=-1)
    assert (model(cues, values).argmax(dim=-1) == answers).float().mean() > 0.95
