"""Parallel text, subwords, batches of pairs, label smoothing and BLEU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_equal_to, small_config, trained_like

from gohgraph import Transformer
from gohgraph.learning.data.numerals import english_numeral, german_numeral
from gohgraph.learning.data.parallel_text import BOS, EOS, PAD, PairBatches, Subwords, load_parallel_text
from gohgraph.learning.regimes.translation import bleu, sentence_losses, translate, translation_output


def sentences(count: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
    return [torch.randint(3, 13, (length,), generator=generator) for length in lengths]


@pytest.fixture
def pairs() -> PairBatches:
    return PairBatches(sentences(17, 1), sentences(17, 2), batch_size=5, seed=3)


@pytest.mark.parametrize(
    "number, english, german",
    [
        (0, "zero", "null"),
        (1, "one", "eins"),
        (21, "twenty-one", "einundzwanzig"),
        (100, "one hundred", "einhundert"),
        (1_000, "one thousand", "eintausend"),
        (17_016, "seventeen thousand sixteen", "siebzehntausendsechzehn"),
        (101_001, "one hundred one thousand one", "einhunderteintausendeins"),
        (999_999, "nine hundred ninety-nine thousand nine hundred ninety-nine",
         "neunhundertneunundneunzigtausendneunhundertneunundneunzig"),
    ],
)  # fmt: skip
def test_numerals(number, english, german):
    assert (english_numeral(number), german_numeral(number)) == (english, german)


def test_numerals_out_of_range():
    with pytest.raises(ValueError, match="Expected a number of 0..999,999"):
        german_numeral(1_000_000)


def test_the_built_in_text_has_both_directions():
    text, back = load_parallel_text(), load_parallel_text(source="de", target="en")
    assert [pair[::-1] for pair in text.train] == back.train
    assert len(set(text.train) | set(text.validation)) == 20_500
    with pytest.raises(ValueError, match="Do pass a folder"):
        load_parallel_text(target="fr")


def test_folders_of_sentences(tmp_path):
    for split, lines in (("train", 3), ("val", 2)):
        for language in ("en", "de"):
            (tmp_path / f"{split}.{language}").write_text(f"{language} ä\n" * lines, encoding="utf-8")
    text = load_parallel_text(tmp_path)
    assert text.train == [("en ä", "de ä")] * 3 and len(text.validation) == 2
    (tmp_path / "val.de").write_text("one\n")
    with pytest.raises(ValueError, match="as many lines"):
        load_parallel_text(tmp_path)
    (tmp_path / "val.de").write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match="UTF-8"):
        load_parallel_text(tmp_path)
    with pytest.raises(ValueError, match="Do check the path"):
        load_parallel_text(tmp_path / "missing")


def test_subwords_give_back_any_text():
    subwords = Subwords.train(["der bär und die bären"] * 5, vocab_size=280)
    assert 259 < len(subwords) <= 280
    for text in ("der bär", "Ω ≠ 日本, naïve"):
        (tokens,) = subwords.encode([text])
        assert subwords.decode(tokens) == text and tokens.min() > EOS
        assert subwords.decode(torch.cat((torch.tensor([BOS]), tokens, torch.tensor([EOS, EOS, PAD])))) == text
    with pytest.raises(ValueError, match="vocab_size of at least 259"):
        Subwords.train(["a"], vocab_size=100)


def test_an_epoch_has_every_pair_once_and_batches_are_pure(pairs):
    assert len(pairs) == 4
    again = PairBatches(pairs.source, pairs.target, batch_size=5, seed=3)
    orders = []
    for epoch in (1, 0):
        seen = []
        for index in range(4 * epoch, 4 * epoch + 4):
            source, target, after = pairs(index)
            assert all(torch.equal(a, b) for a, b in zip(pairs(index), again(index), strict=True))
            assert (target[:, 0] == BOS).all() and target.shape == after.shape
            assert torch.equal(target[:, 1:][after[:, 1:] != -100], after[:, :-1][after[:, 1:] != -100])
            assert ((after == EOS).sum(1) == 1).all() and ((source == EOS).sum(1) == 1).all()
            seen += [tuple(row[(row != PAD) & (row != EOS)].tolist()) for row in source]
        assert sorted(seen) == sorted(tuple(one.tolist()) for one in pairs.source)
        orders.append(seen)
    assert orders[0] != orders[1]


def test_neighbours_are_of_like_length():
    long = PairBatches(sentences(500, 1), sentences(500, 2), batch_size=10)
    padding = sum((long(index)[0] == PAD).sum().item() for index in range(len(long)))
    in_order = sum((source == PAD).sum().item() for source, _, _ in long.in_order())
    assert padding < 0.7 * in_order


@pytest.mark.parametrize("graph", ["plain", "outputs", "moh"])
def test_label_smoothing_is_its_formula_and_ignores_padding(pairs, graph):
    model = trained_like(Transformer(small_config(graph)))
    source, target, after = batch = pairs(0)
    output = translation_output(model, batch, label_smoothing=0.1)
    log_p = output.logits.log_softmax(-1)
    real = after != -100
    right = log_p.gather(-1, after.clamp(min=0).unsqueeze(-1)).squeeze(-1)[real]
    expected = -(0.9 * right + 0.1 * log_p.mean(-1)[real]).mean()
    auxiliary = 0 if output.auxiliary_loss is None else output.auxiliary_loss
    assert_equal_to(output.loss - auxiliary, expected)
    wider = F.pad(source, (0, 2), value=PAD), F.pad(target, (0, 3), value=PAD), F.pad(after, (0, 3), value=-100)
    assert_equal_to(translation_output(model, wider, label_smoothing=0.1).loss, output.loss)
    assert (output.auxiliary_loss is None) == (graph != "moh")


def test_losses_of_sentences_make_the_loss_per_token(pairs):
    model = trained_like(Transformer(small_config("outputs"))).eval()
    losses, counts = sentence_losses(model, pairs)
    assert len(losses) == len(counts) == 17 and counts.tolist() == [len(one) + 1 for one in pairs.target]
    whole = PairBatches(pairs.source, pairs.target, batch_size=17)
    expected = translation_output(model, next(whole.in_order())).loss
    torch.testing.assert_close(losses.sum() / counts.sum(), expected, rtol=1e-5, atol=1e-5)


def test_translations_come_in_order():
    torch.manual_seed(5)
    subwords = Subwords.train(["ein haus"], vocab_size=259)
    model = Transformer(small_config().__class__(259, d_model=10, num_heads=5, num_layers=1, d_ff=7)).eval()
    source = subwords.encode(["ein haus", "haus", "ein", "aus", "us"])
    alone, beside = (
        list(translate(model, subwords, PairBatches(source, source, batch_size=size), num_beams=1)) for size in (1, 5)
    )
    # Beside longer sources a translation may become longer, but not another.
    assert len(alone) == 5 and all(long.startswith(short) for short, long in zip(alone, beside, strict=True))
    assert len(set(alone)) > 1


def test_bleu_is_sacrebleus():
    score, signature = bleu(["the cat sat on the mat today"], ["the cat sat on a mat today"])
    assert 30 < score < 80 and "tok:13a" in signature
