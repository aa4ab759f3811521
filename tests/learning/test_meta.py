"""Meta-learning: inner loops against a loop written out, second derivatives, Reptile's step, and the example."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from example_runs import refused
from helpers import assert_equal_to, load_script, trained_like
from torch.nn.attention import SDPBackend, sdpa_kernel

from gohgraph import Classifier, ClassifierConfig, HeadGraphConfig, HeadGraphConv, TransformerConfig
from gohgraph.learning.data.episodes import Episodes, EpisodeSampler
from gohgraph.learning.regimes.low_rank import LowRankUpdate, add_low_rank
from gohgraph.learning.regimes.meta import MetaLearner, few_shot_accuracy, maml_loss, parameters_of, reptile_loss

CLASSES = [torch.rand(7, 1, 4, 4, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in range(5)]
SAMPLER = EpisodeSampler(CLASSES, tasks=3, ways=2, shots=2, queries=3, seed=1)


def classifier(low_rank: bool = False) -> Classifier:
    shape = {"d_model": 15, "num_heads": 5, "num_layers": 1, "d_ff": 7, "max_length": 4, "positions": "learned"}
    config = TransformerConfig(1, **shape, head_graph=None if low_rank else HeadGraphConfig())
    model = trained_like(Classifier(ClassifierConfig(config, num_classes=2, patch_size=2, channels=1)))
    if low_rank:
        add_low_rank(model, 2)
    return model


CHOICES = {"all": {}, "graph": {"types": (HeadGraphConv,)}, "read-out": {"names": ["head"]}}


def written_out(learner: MetaLearner, episodes: Episodes) -> list[torch.Tensor]:
    """The queries' losses after steps on the parameters themselves, task by task, differentiable in them."""
    losses = []
    for support, targets, query, query_targets in zip(*episodes, strict=True):
        own = dict(learner.model.named_parameters())
        rates = learner.log_rate.exp()
        fast = {name: own[name] for name in learner.adapted}
        for _ in range(learner.steps):
            loss = torch.func.functional_call(learner.model, fast, (support,), {"targets": targets}).loss
            gradients = torch.autograd.grad(loss, list(fast.values()), create_graph=learner.second_order)
            moved = zip(fast.items(), gradients, rates, strict=True)
            fast = {name: value - rate * gradient for (name, value), gradient, rate in moved}
        logits = torch.func.functional_call(learner.model, fast, (query,)).logits
        losses.append(F.cross_entropy(logits, query_targets))
    return losses


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("second_order", [True, False])
def test_the_inner_loop_is_the_one_written_out_in_value_and_gradient(choice, second_order):
    model, episodes = classifier(), SAMPLER(0)
    names = parameters_of(model, **CHOICES[choice])
    learner = MetaLearner(model, names, steps=2, learning_rate=0.3, second_order=second_order).double()
    losses = learner(episodes)
    with sdpa_kernel(SDPBackend.MATH):
        expected = written_out(learner, episodes)
        gradients = torch.autograd.grad(torch.stack(expected).mean(), list(learner.parameters()), allow_unused=True)
    assert_equal_to(losses, torch.stack(expected))
    found = torch.autograd.grad(maml_loss(learner, episodes), list(learner.parameters()), allow_unused=True)
    for (name, parameter), own, other in zip(learner.named_parameters(), found, gradients, strict=True):
        assert (own is None) == (other is None), name
        assert_equal_to(parameter * 0 if own is None else own, parameter * 0 if other is None else other)
    names = [name for name, _ in learner.named_parameters()]
    assert found[names.index("log_rate")].abs().sum() > 0


def test_second_derivatives_matter_and_need_no_care_of_the_caller():
    model, episodes = classifier(), SAMPLER(0)
    gradients = []
    for second_order in (True, False):
        learner = MetaLearner(model, parameters_of(model), learning_rate=0.3, second_order=second_order).double()
        gradients.append(torch.autograd.grad(maml_loss(learner, episodes), model.head.weight)[0])
    assert (gradients[0] - gradients[1]).abs().max() > 1e-4


def test_adapting_leaves_the_model_as_it_was_and_lowers_the_loss_on_its_support():
    model = classifier()
    before = copy.deepcopy(model.state_dict())
    learner = MetaLearner(model, parameters_of(model), steps=5, learning_rate=0.03).double()
    episodes = SAMPLER(2)
    support = Episodes(episodes.support, episodes.support_targets, episodes.support, episodes.support_targets)
    losses, accuracy = few_shot_accuracy(learner, support)
    direct = torch.stack(
        [F.cross_entropy(model(x).logits, y) for x, y in zip(support.support, support.support_targets, strict=True)]
    )
    assert (losses < direct).all() and accuracy.shape == (3,)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_reptile_moves_towards_the_adapted_parameters():
    model, episodes = classifier(), SAMPLER(1)
    learner = MetaLearner(model, parameters_of(model), learning_rate=0.1, second_order=False).double()
    loss = reptile_loss(learner, episodes)
    assert_equal_to(loss, maml_loss(learner, episodes))
    loss.backward()
    adapted = [learner.adapt(x, y) for x, y in zip(episodes.support, episodes.support_targets, strict=True)]
    for name, parameter in model.named_parameters():
        assert_equal_to(parameter.grad, parameter - torch.stack([one[name] for one in adapted]).mean(dim=0))


def test_low_rank_updates_adapt():
    model = classifier(low_rank=True)
    names = parameters_of(model, types=(LowRankUpdate,))
    learner = MetaLearner(model, names, learning_rate=0.3).double()
    maml_loss(learner, SAMPLER(0)).backward()
    assert all("lora" in name for name in names)
    assert learner.bytes_adapted() == 8 * sum(p.numel() for n, p in model.named_parameters() if "lora" in n)
    assert all(dict(model.named_parameters())[name].grad.abs().sum() > 0 for name in names if "lora_B" in name)


def test_episodes_are_pure_and_keep_support_and_query_apart():
    one, again = SAMPLER(4), SAMPLER(4)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one.support, SAMPLER(5).support)
    for task in range(3):
        support = {tuple(image.flatten().tolist()) for image in one.support[task]}
        query = {tuple(image.flatten().tolist()) for image in one.query[task]}
        assert len(support) == 4 and len(query) == 6 and not support & query
        # Examples of one number are of one class, and the other way round.
        kinds = [
            {number for number, images in enumerate(CLASSES) for image in images if torch.equal(image, x)}
            for x in torch.cat((one.support[task], one.query[task]))
        ]
        numbers = torch.cat((one.support_targets[task], one.query_targets[task])).tolist()
        assert len({(number, min(kind)) for number, kind in zip(numbers, kinds, strict=True)}) == 2


@pytest.mark.parametrize("more", [{"ways": 6}, {"shots": 7}, {"tasks": 0}])
def test_impossible_episodes(more):
    with pytest.raises(ValueError, match="Expected"):
        EpisodeSampler(CLASSES, **{"tasks": 2, "ways": 2, "shots": 2, "queries": 3, **more})


def test_impossible_inner_loops():
    model = classifier()
    with pytest.raises(ValueError, match="names of parameters .got .'nose'"):
        MetaLearner(model, ["nose"])
    with pytest.raises(ValueError, match="steps to be an int >= 1"):
        MetaLearner(model, parameters_of(model), steps=0)
    with pytest.raises(ValueError, match="LowRankUpdate"):
        parameters_of(model, types=(LowRankUpdate,))


@pytest.fixture
def main(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = load_script("examples", "meta_learning")
    return lambda *arguments: script.main(["--smoke", "--device", "cpu", *arguments])


def test_the_example_compares_inner_loops(main, tmp_path, capsys):
    assert main("--run", "out", "--steps", "2") == 0
    shown, folder = capsys.readouterr().out, tmp_path / "out"
    results = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/result.json")}
    assert len(results) == 8 and (folder / "table.md").read_text() in shown and (folder / "curves.png").exists()
    size = {name: one["bytes_adapted"] for name, one in results.items()}
    assert size["maml"] == size["reptile"] > size["graph+read-out"] > size["graph"] > 0
    assert size["graph+read-out"] == size["graph"] + size["read-out"]
    assert all(0 <= one["accuracy"] <= 1 for one in results.values())


@pytest.mark.parametrize(
    "flags, message",
    [(["--ways", "5"], "5 classes"), (["--inner-steps", "0"], "steps to be an int >= 1"), (["--shots", "0"], "shots")],
)
def test_impossible_flags_are_one_sentence(main, tmp_path, capsys, flags, message):
    assert message in refused(main("--run", "out", *flags), capsys)
    assert not (tmp_path / "out").exists()
