from __future__ import annotations

import itertools

import pytest
import torch

from gohgraph.models.generation import beam_search, check_sampling, sample

BOS, EOS = 0, 2


class Table:
    """A model whose next-token logits are an arbitrary function of the input and of everything said so far."""

    def __init__(self, vocab_size, names):
        self.vocab_size, self.names, self.said = vocab_size, names, None

    def logits(self, name, prefix):
        generator = torch.Generator().manual_seed(hash((name, *prefix)) % 2**31)
        return torch.randn(self.vocab_size, generator=generator) * 2

    def __call__(self, tokens, rows):
        per_input = len(tokens) // len(self.names)
        before = [[] for _ in tokens] if self.said is None else [self.said[row] for row in rows.tolist()]
        self.said = [[*old, token] for old, token in zip(before, tokens.tolist(), strict=True)]
        names = [name for name in self.names for _ in range(per_input)]
        return torch.stack([self.logits(name, said) for name, said in zip(names, self.said, strict=True)])

    def log_p(self, name, sequence):
        steps = (self.logits(name, [BOS, *sequence[:t]]).log_softmax(-1)[token] for t, token in enumerate(sequence))
        return float(sum(steps))


def every_hypothesis(vocab_size, longest):
    """All sequences that end with EOS, or are cut at the greatest length."""
    others = [token for token in range(vocab_size) if token != EOS]
    for length in range(1, longest + 1):
        for head in itertools.product(others, repeat=length - 1):
            yield [*head, EOS]
    yield from (list(full) for full in itertools.product(others, repeat=longest))


def search(table, num_beams, **settings):
    found = beam_search(table, len(table.names), bos=BOS, eos=EOS, num_beams=num_beams, **settings)
    table.said = None
    return found


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("vocab_size,longest", [(3, 4), (5, 3)])
def test_beams_enough_for_all_hypotheses_find_the_best(vocab_size, longest, length_penalty):
    table = Table(vocab_size, names=[0, 1, 2, 3, 4, 5, 6])
    settings = {"max_new_tokens": longest, "length_penalty": length_penalty}
    found = search(table, vocab_size**longest, **settings)
    lengths = set()
    for name, row in zip(table.names, found.tolist(), strict=True):
        best = max(
            every_hypothesis(vocab_size, longest),
            key=lambda s: table.log_p(name, s) / ((5 + len(s)) / 6) ** length_penalty,
        )
        lengths.add(len(best))
        assert row == [BOS, *best, *[EOS] * (len(row) - 1 - len(best))]
    assert len(lengths) > 1


def test_one_beam_is_greedy():
    table = Table(7, names=[3, 4, 5])
    found = search(table, 1, max_new_tokens=11)
    for name, row in zip(table.names, found.tolist(), strict=True):
        greedy = [BOS]
        while len(greedy) < found.shape[1]:
            ended = EOS in greedy[1:]
            greedy.append(EOS if ended else int(table.logits(name, greedy).argmax()))
        assert row == greedy


def beams_slowly(table, name, num_beams, longest, length_penalty):
    """Beam search over lists: grow all that have not ended, rank them with those that have, keep the best."""

    def score(sequence):
        return table.log_p(name, sequence) / ((5 + len(sequence)) / 6) ** length_penalty

    beams = [[]]
    for _ in range(longest):
        ended = [beam for beam in beams if EOS in beam]
        grown = [[*beam, token] for beam in beams if EOS not in beam for token in range(table.vocab_size)]
        beams = sorted(ended + grown, key=score, reverse=True)[:num_beams]
    return beams[0]


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("num_beams", [1, 2, 3, 7])
def test_beam_search_equals_a_slow_one(num_beams, length_penalty):
    table = Table(5, names=list(range(23)))
    found = search(table, num_beams, max_new_tokens=7, length_penalty=length_penalty)
    for name, row in zip(table.names, found.tolist(), strict=True):
        best = beams_slowly(table, name, num_beams, 7, length_penalty)
        assert row == [BOS, *best, *[EOS] * (len(row) - 1 - len(best))]


@pytest.mark.parametrize("num_beams", [1, 2, 5])
def test_inputs_of_a_batch_do_not_influence_each_other(num_beams):
    names = [11, 12, 13]
    together = search(Table(5, names), num_beams, max_new_tokens=7)
    for name, row in zip(names, together.tolist(), strict=True):
        alone = search(Table(5, [name]), num_beams, max_new_tokens=7)[0].tolist()
        assert row == alone + [EOS] * (len(row) - len(alone))


def test_more_beams_find_nothing_less_likely_than_all_beams():
    table = Table(5, names=list(range(17)))
    settings = {"max_new_tokens": 3, "length_penalty": 0.0}

    def scores(num_beams):
        rows = search(table, num_beams, **settings)[:, 1:].tolist()
        ended = [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]
        return torch.tensor([table.log_p(name, row) for name, row in zip(table.names, ended, strict=True)])

    best, few, greedy = scores(125), scores(3), scores(1)
    assert (best >= few - 1e-6).all() and (best >= greedy - 1e-6).all()
    assert few.mean() > greedy.mean()


def test_search_stops_when_all_have_ended():
    def step(tokens, rows):
        return torch.tensor([[0.0, 1.0, 9.0]]).repeat(len(tokens), 1)

    found = beam_search(step, 2, bos=BOS, eos=EOS, max_new_tokens=50, num_beams=1)
    assert found.tolist() == [[BOS, EOS]] * 2


def reference_probabilities(logits, temperature, top_k, top_p):
    weights = [float(torch.exp(x / temperature)) for x in logits.double()]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])
    if top_k is not None:
        order = order[:top_k]
    if top_p is not None:
        total, kept, mass = sum(weights[i] for i in order), [], 0.0
        for i in order:
            if mass >= top_p:
                break
            kept.append(i)
            mass += weights[i] / total
        order = kept
    total = sum(weights[i] for i in order)
    return [weights[i] / total if i in order else 0.0 for i in range(len(weights))]


@pytest.fixture
def drawn_from(monkeypatch):
    """The probabilities the last token was drawn from."""
    seen, draw = [], torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda p, n: (seen.append(p / p.sum(-1, keepdim=True)), draw(p, n))[1])
    return seen


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("top_k", [None, 1, 3, 11, 20])
@pytest.mark.parametrize("top_p", [None, 1e-6, 0.5, 0.9, 1.0])
def test_sample_draws_from_the_right_probabilities(drawn_from, temperature, top_k, top_p):
    logits = torch.randn(5, 11) * 2
    tokens = sample(logits, temperature, top_k, top_p)
    expected = torch.tensor([reference_probabilities(row, temperature, top_k, top_p) for row in logits])
    torch.testing.assert_close(drawn_from[-1], expected, rtol=0, atol=1e-6)
    assert tokens.shape == (5,) and (expected[torch.arange(5), tokens] > 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_temperature_zero_takes_the_most_likely(dtype):
    logits = torch.randn(5, 11).to(dtype)
    for temperature in (0, 1e-30):
        assert torch.equal(sample(logits, temperature), logits.argmax(dim=-1))


def test_top_p_one_keeps_even_the_least_likely(drawn_from):
    sample(torch.tensor([[0.0, -20.0, -21.0]]), top_p=1.0)
    assert (drawn_from[-1] > 0).all()


def test_sample_follows_the_generator():
    logits = torch.randn(3, 17)
    torch.manual_seed(5)
    first = sample(logits)
    torch.manual_seed(5)
    assert torch.equal(sample(logits), first)


@pytest.mark.parametrize(
    "change",
    [
        {"max_new_tokens": 0}, {"max_new_tokens": 2.5}, {"temperature": -1.0}, {"temperature": float("nan")},
        {"temperature": float("inf")}, {"top_k": 0}, {"top_k": 2.5}, {"top_p": 0.0}, {"top_p": 1.1},
        {"top_p": float("nan")},
    ],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_refused(change):
    settings = {"max_new_tokens": 1, "temperature": 1.0, "top_k": None, "top_p": None}
    check_sampling(**settings)
    ((name, value),) = change.items()
    error = TypeError if value == 2.5 else ValueError
    with pytest.raises(error, match=f"^Expected {name} .*got {value}.*Do "):
        check_sampling(**{**settings, **change})


@pytest.mark.parametrize("num_beams, error", [(0, ValueError), (-1, ValueError), (1.5, TypeError)])
def test_beam_search_refuses_impossible_beams(num_beams, error):
    with pytest.raises(error, match="^Expected num_beams to be an int >= 1"):
        search(Table(3, names=[0]), num_beams, max_new_tokens=2)
