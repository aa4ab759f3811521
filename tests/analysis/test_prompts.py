from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers

from gohgraph.analysis.metrics import label_loss, log_probability, logit_difference
from gohgraph.analysis.prompts import Pair, encoded, ioi_pairs, pairs_from_csv, repeated_tokens


def output(*shape):
    return SimpleNamespace(logits=torch.randn(*shape))


def test_metrics_are_one_number_an_example():
    out, right, wrong = output(3, 5, 11), torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])
    at = torch.tensor([4, 0, 2])
    found = logit_difference(right, wrong, at=at)(out)
    rows = [out.logits[b, at[b]] for b in range(3)]
    assert found.tolist() == [(row[a] - row[b]).item() for row, a, b in zip(rows, right, wrong, strict=True)]
    classes = output(3, 11)
    expected = -F.cross_entropy(classes.logits, right, reduction="none")
    torch.testing.assert_close(log_probability(right)(classes), expected)
    labels = torch.randint(11, (3, 5))
    labels[0, 3:] = -100
    for shift in (True, False):
        logits, tokens = (out.logits[:, :-1], labels[:, 1:]) if shift else (out.logits, labels)
        expected = [F.cross_entropy(logits[b], tokens[b]) for b in range(3)]
        torch.testing.assert_close(label_loss(labels, shift=shift)(out), torch.stack(expected))


def test_repeated_tokens_differ_in_their_first_half_alone():
    task = repeated_tokens(97, length=5, examples=3, first=7)
    assert task.inputs.shape == (3, 10) and task.inputs.min() >= 7
    assert torch.equal(task.inputs[:, 5:], task.against[:, 5:])
    assert not torch.equal(task.inputs[:, :5], task.against[:, :5])
    assert not torch.equal(repeated_tokens(97, length=5, examples=3, seed=1).inputs, task.inputs)
    assert task.metric(output(3, 10, 97)).shape == (3,)


class Words:
    """A tokenizer of words."""

    def __init__(self):
        words = sorted({word for pair in ioi_pairs(50) for text in pair for word in text.replace(",", " ,").split()})
        self.own = Tokenizer(models.WordLevel({word: n + 1 for n, word in enumerate(words)} | {"?": 0}, unk_token="?"))
        self.own.pre_tokenizer = pre_tokenizers.Whitespace()
        self.pad_token_id = 0

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": self.own.encode(text).ids}


def test_pairs_are_padded_and_measured_at_their_last_token():
    pairs = [*ioi_pairs(2), Pair("When Mary gave", "When Tom gave", " Tom", " Mary")]
    task = encoded(pairs, Words())
    lengths = task.inputs["attention_mask"].sum(dim=1)
    assert lengths.tolist() == [14, 14, 3] and task.against["input_ids"].shape == (3, 14)
    out = output(3, 14, 60)
    words = Words()
    right, wrong = (words(getattr(pairs[2], name))["input_ids"][0] for name in ("right", "wrong"))
    assert task.metric(out)[2] == out.logits[2, 2, right] - out.logits[2, 2, wrong]
    with pytest.raises(ValueError, match="equally many tokens"):
        encoded([Pair("When Mary gave", "When gave", " Tom", " Mary")], words)
    with pytest.raises(ValueError, match="differ in the first"):
        encoded([Pair("When Mary gave", "When Tom gave", " Tom", " Tom")], words)


def test_pairs_are_read_from_a_table(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("clean,other,right,wrong\nWhen Mary,When Tom, a, b\n")
    assert pairs_from_csv(path) == [Pair("When Mary", "When Tom", " a", " b")]
    path.write_text("clean,other,right\nWhen Mary,When Tom, a\n")
    with pytest.raises(ValueError, match="no .'wrong'., line 2"):
        pairs_from_csv(path)
    path.write_text("clean,other,right,wrong\n")
    with pytest.raises(ValueError, match="got none"):
        pairs_from_csv(path)
