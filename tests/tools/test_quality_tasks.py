"""The tasks of the quality benchmark: episodes are what they say, and models can be trained and measured on them."""

from __future__ import annotations

import dataclasses
import random
import types

import pytest
import torch
from benchmarks.tasks import TASKS
from benchmarks.tasks.associative import ManyQueries
from benchmarks.tasks.base import CHOOSING, HELD_OUT_SEEDS, REPORTED, generator_of
from benchmarks.tasks.find_block import DOT, HASH, FindBlock
from benchmarks.tasks.two_hops import TwoHops

EPISODES = 101
SMALLER = {"text": {"windows": 7, "d_model": 16}}
SMALLER["translation"] = {"vocab_size": 300, "d_model": 16, "num_layers": 1, "batch_size": 250}


def drawn(task, seed=0):
    return task.draw(EPISODES, generator_of(seed, 0))


def asked(targets):
    return [(row != -100).nonzero().flatten().tolist() for row in targets]


def test_every_query_of_mqar_repeats_a_key_and_asks_for_its_value():
    task = ManyQueries(num_pairs=5, num_keys=11)
    inputs, targets = drawn(task)
    assert inputs.shape == targets.shape == (EPISODES, task.length)
    for row, target, places in zip(inputs.tolist(), targets.tolist(), asked(targets), strict=True):
        pairs = dict(zip(row[0:10:2], row[1:10:2], strict=True))
        assert len(pairs) == 5 and max(pairs) <= 11 < min(pairs.values()) and max(pairs.values()) < task.vocab_size
        assert len(set(pairs.values())) == 5
        assert sorted(row[place] for place in places) == sorted(pairs) and min(places) >= 10
        assert all(target[place] == pairs[row[place]] for place in places)
        assert not any(token for place, token in enumerate(row[10:], 10) if place not in places)


def test_queries_of_mqar_come_early_by_a_power_law():
    task = ManyQueries(num_pairs=2, num_keys=11)
    _, targets = task.draw(4001, generator_of(0, 0))
    gaps = torch.tensor([place - 4 for places in asked(targets) for place in places]) // 2
    share = torch.bincount(gaps, minlength=6) / len(gaps)
    # p(g) ~ (g+1)^-0.99; without replacement the two of an episode flatten it.
    assert share[0] > 1.5 * share[1] > 1.5 * share[3] > share[5] > 0


def test_two_hops_lead_from_the_query_to_the_answer():
    pairs, answers = drawn(TwoHops(num_chains=4, num_symbols=13))
    assert pairs.shape == (EPISODES, 12, 2) and answers.shape == (EPISODES, 4)
    for row, answer in zip(pairs.tolist(), answers.tolist(), strict=True):
        listed, asked_for = dict(row[:8]), [symbol for symbol, unknown in row[8:] if unknown == 0]
        assert len(listed) == 8 and 0 not in listed
        assert answer == [listed[listed[symbol]] for symbol in asked_for]
        # No first symbol is what another one leads to: an answer is always two hops away.
        assert not set(asked_for) & set(listed.values())


def test_pairs_are_listed_in_any_order():
    pairs, _ = drawn(TwoHops(num_chains=4, num_symbols=13))
    firsts = torch.tensor([[pair[0] in {q for q, _ in row[8:]} for pair in row[:8]] for row in pairs.tolist()])
    assert (firsts.float().mean(dim=0) - 0.5).abs().max() < 0.2


@pytest.mark.parametrize("size", [(3, 5, 2), (7, 8, 3)], ids=str)
def test_one_block_holds_the_question(size):
    task = FindBlock(num_blocks=size[0], block_length=size[1], num_asked=size[2])
    inputs, targets = drawn(task)
    assert inputs.shape == (EPISODES, task.length)
    for row, target in zip(inputs.tolist(), targets.tolist(), strict=True):
        width = task.block_length + 1
        text, rest = row[: task.num_blocks * width], row[task.num_blocks * width :]
        blocks = [text[at : at + task.block_length] for at in range(0, len(text), width)]
        ends = text[task.block_length :: width]
        assert ends == [DOT] * (task.num_blocks - 1) + [HASH]
        assert all(len(set(block)) == task.block_length and max(block) < 26 for block in blocks)
        question, said = rest[: task.num_asked], rest[task.num_asked :]
        (found,) = [block for block in blocks if set(question) <= set(block)]
        assert target[-task.block_length :] == found and said == found[:-1] and len(set(question)) == len(question)
        assert set(target[: -task.block_length]) == {-100}


@pytest.mark.parametrize("name", ["mqar", "two-hops", "find-block", "two-cues"])
def test_episodes_depend_on_seed_and_number_alone(name):
    task = TASKS[name]()
    first = task.batch(3, seed=0)
    torch.rand(7)
    assert all(map(torch.equal, first, task.batch(3, seed=0)))
    assert not torch.equal(first[0], task.batch(4, seed=0)[0]) and not torch.equal(first[0], task.batch(3, seed=1)[0])


class Answers(torch.nn.Module):
    """A model that answers by a function of an episode: token or value by position."""

    def __init__(self, answer, vocab_size):
        super().__init__()
        self.answer, self.vocab_size = answer, vocab_size

    def forward(self, *inputs, targets=None):
        answers = torch.tensor([self.answer(*(part.tolist() for part in row)) for row in zip(*inputs, strict=True)])
        logits = 50.0 * torch.nn.functional.one_hot(answers, self.vocab_size)
        if targets is None:
            return logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return types.SimpleNamespace(logits=logits, cross_entropy=loss)


def look_up_values(row):
    pairs = dict(zip(row[0:8:2], row[1:8:2], strict=True))
    return [pairs.get(token, 0) for token in row]


def look_up_a_block(row):
    task, width = FindBlock(), FindBlock().block_length + 1
    text, question = row[: task.num_blocks * width], row[task.num_blocks * width :][: task.num_asked]
    blocks = [text[at : at + task.block_length] for at in range(0, len(text), width)]
    (found,) = [block for block in blocks if set(question) <= set(block)]
    return [0] * (len(row) - len(found)) + found


def look_up_both_cues(cues, values):
    (place,) = [place for place, pair in enumerate(cues[:-1]) if pair == cues[-1]]
    return values[place]


def look_up_twice(pairs):
    listed = dict(pair for pair in pairs if pair[1])
    return [listed.get(listed.get(first), 0) for first, _ in pairs]


SOLVERS = {
    "mqar": look_up_values,
    "find-block": look_up_a_block,
    "two-cues": look_up_both_cues,
    "two-hops": look_up_twice,
}


@pytest.mark.parametrize("name", SOLVERS)
def test_one_who_looks_up_makes_no_error(name):
    task = TASKS[name]()
    model = Answers(SOLVERS[name], task.config().vocab_size)
    measured = task.evaluate(model)
    assert measured["error"] == measured["choosing_error"] == 0 and measured["validation_loss"] < 1e-3


@pytest.mark.parametrize(("name", "chance"), [("mqar", 3 / 4), ("two-cues", 15 / 16), ("two-hops", 3 / 4)])
def test_one_who_guesses_is_wrong_by_chance(name, chance):
    generator = random.Random(0)

    def guess(*row):
        if name == "mqar":
            return [generator.choice(row[0][1:8:2]) for _ in row[0]]
        if name == "two-cues":
            return generator.choice(range(16))
        sent, received = {first for first, _ in row[0]}, {second for _, second in row[0]}
        return [generator.choice(sorted(received - sent - {0})) for _ in row[0]]

    task = TASKS[name]()
    # 512 episodes of at least one answer: a standard deviation is 0.02 at most.
    assert abs(task.evaluate(Answers(guess, task.config().vocab_size))["error"] - chance) < 0.06


@pytest.mark.parametrize("name", TASKS)
def test_a_model_is_trained_and_measured(name):
    task = TASKS[name](**{"batch_size": 5, **SMALLER.get(name, {})})
    torch.manual_seed(0)
    model = task.model(task.config())
    output = task.output(model, task.batch(0, seed=0))
    loss = output if isinstance(output, torch.Tensor) else output.loss
    loss.backward()
    assert loss.isfinite() and sum(p.grad is not None for p in model.parameters()) > 10
    with torch.no_grad():
        found, again = task.evaluate(model.eval()), task.evaluate(model)
    assert found == again and found[task.measure] > 0 and found["validation_loss"] > 0
    # Chosen on one part of the data, reported on another: no number of one is that of the other.
    assert found[task.choosing] > 0 and found["choosing_loss"] != found["validation_loss"]


def test_errors_and_losses_are_those_of_the_asked_positions():
    task = FindBlock(num_blocks=3, batch_size=64)
    model = task.model(task.config()).eval()
    inputs, targets = task.draw(512, generator_of(HELD_OUT_SEEDS[REPORTED], 0))
    with torch.no_grad():
        logits = model(inputs).logits[:, -5:]
        found = task.evaluate(model)
    answers = targets[:, -5:]
    assert found["error"] == (logits.argmax(-1) != answers).double().mean().item()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten())
    assert found["validation_loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["mqar", "two-hops", "find-block"])
def test_the_three_parts_are_different_episodes(name):
    task = TASKS[name]()
    drawn_of = {seed: task.draw(64, generator_of(seed, 0))[0] for seed in (0, *HELD_OUT_SEEDS.values())}
    rows = [{tuple(row) for row in inputs.flatten(1).tolist()} for inputs in drawn_of.values()]
    assert len(HELD_OUT_SEEDS) == 2 and not rows[0] & rows[1] and not rows[0] & rows[2] and not rows[1] & rows[2]


def test_digits_are_chosen_and_reported_on_different_images():
    task, seen = TASKS["digits"](), []
    model = task.model(task.config()).eval()
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        task.measures(model, CHOOSING), task.measures(model, REPORTED)
    assert [len(images) for images in seen] == [179, 180] and torch.equal(torch.cat(seen), task.images[2])


def test_text_is_chosen_and_reported_on_halves_of_what_is_held_out(tmp_path):
    file = tmp_path / "text.txt"
    # The held-out tenth is half of one letter, half of another.
    file.write_bytes(b"ab" * 4500 + b"c" * 500 + b"d" * 500)
    task = TASKS["text"](data=str(file), length=10, windows=3, final_windows=7)

    class Sure(torch.nn.Module):
        """Says that every byte is a c, and counts the windows it is given."""

        def __init__(self):
            super().__init__()
            self.bias, self.windows = torch.nn.Parameter(torch.zeros(())), 0

        def forward(self, tokens):
            self.windows += len(tokens)
            logits = torch.zeros(*tokens.shape, 256)
            logits[..., ord("c")] = 20.0
            return types.SimpleNamespace(logits=logits, routing=())

    model = Sure()
    measured = task.evaluate(model)
    assert measured["choosing_loss"] < 1e-3 and measured["validation_loss"] == pytest.approx(20, rel=1e-3)
    model.windows = 0
    assert task.final(model)["choosing_loss"] < 1e-3 and model.windows == 14
    assert task.epochs(90) == pytest.approx(90 * 4 * 10 / 9000)


def test_translation_chooses_on_training_pairs_that_are_not_trained_on():
    task = TASKS["translation"](num_choosing=600, batch_size=500, vocab_size=300, d_model=16, num_layers=1)
    parts = {part: set(pairs) for part, pairs in task.parts.items()}
    assert len(parts["training"]) == 19400 and len(parts[CHOOSING]) == 600 and len(parts[REPORTED]) == 500
    assert not parts["training"] & parts[CHOOSING] and not parts["training"] & parts[REPORTED]
    assert task.epochs(97) == 2.5 and task.parts == TASKS["translation"](num_choosing=600).parts
    with pytest.raises(ValueError, match="Expected num_choosing in 1..19999"):
        _ = TASKS["translation"](num_choosing=20_000).parts


def test_translations_are_scored_in_the_end(monkeypatch):
    task = TASKS["translation"](vocab_size=300, d_model=16, num_layers=1)
    kept = {part: pairs[:7] for part, pairs in task.parts.items()}
    monkeypatch.setitem(vars(task), "parts", kept)
    model = task.model(task.config()).eval()
    answers = iter([german for _, german in kept[REPORTED]])
    assert 0 <= task.final(model)["bleu"] < 50
    monkeypatch.setattr("benchmarks.tasks.translation.translate", lambda *_: answers)
    assert task.final(model)["bleu"] == pytest.approx(100)


def test_digits_held_out_are_never_trained_on():
    images, digits, held_out, _ = TASKS["digits"]().images
    assert len(images) + len(held_out) == 1797 and len(held_out) == 359 and len(digits) == len(images)
    assert 0 <= images.min() and images.max() == 1
    seen = {image.numpy().tobytes() for image in images}
    assert not any(image.numpy().tobytes() in seen for image in held_out)


@pytest.mark.parametrize("name", ["two-cues", "two-hops"])
@pytest.mark.parametrize("field,value", [("embedding_norm", True), ("logit_cap", 5.0)])
def test_what_a_model_of_its_own_would_leave_out_is_refused(name, field, value):
    task = TASKS[name]()
    with pytest.raises(ValueError, match=f"Expected no {field}"):
        task.model(dataclasses.replace(task.config(), **{field: value}))
