"""Labelled data, text domains, the confusion matrix and its picture."""

from __future__ import annotations

import builtins

import pytest
import torch

from gohgraph import Classifier, ClassifierConfig, TransformerConfig, draw_confusion
from gohgraph.learning.data.classification import classify, confusion_matrix, load_digits, load_text_classes
from gohgraph.learning.data.domains import DOMAINS, load_domain


@pytest.mark.parametrize("name", DOMAINS)
def test_every_domain_is_there_repeats_and_does_not_leak(name):
    corpus, again = load_domain(name, limit=60_000), load_domain(name, limit=60_000)
    assert torch.equal(corpus.train, again.train) and torch.equal(corpus.validation, again.validation)
    assert len(corpus.train) > 40_000 and len(corpus.validation) > 3_000
    train, validation = (bytes(part.tolist()).decode() for part in (corpus.train, corpus.validation))
    assert not set(train.split("\n\n\n")) & {block for block in validation.split("\n\n\n") if len(block) > 200}


def test_unknown_domains_are_named():
    with pytest.raises(ValueError, match="Expected domain of .*got 'poems'"):
        load_domain("poems")


def test_digits_are_held_out_once():
    data = load_digits()
    assert len(data.train[1]) + len(data.validation[1]) == 1797 and data.train[0].max() == 1
    x, y = data.batch(3, batch_size=7, seed=1)
    assert x.shape == (7, 1, 8, 8) and torch.equal(y, data.batch(3, batch_size=7, seed=1)[1])
    assert not torch.equal(x, data.batch(4, batch_size=7, seed=1)[0])


def test_text_classes_of_a_folder(tmp_path):
    for name, letter in (("bees", "b"), ("ants", "a")):
        (tmp_path / f"{name}.txt").write_text(letter * 2000)
    data = load_text_classes(tmp_path, length=11, per_class=50)
    assert data.classes == ("ants", "bees") and data.train[0].shape == (100, 11)
    assert torch.equal(data.train[0][:, 0] == ord("b"), data.train[1] == 1) and len(data.validation[1]) == 10
    (tmp_path / "bees.txt").unlink()
    with pytest.raises(ValueError, match="two .txt files or more"):
        load_text_classes(tmp_path)


def test_scikit_learn_missing_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.split(".")[0] == "sklearn":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"gohgraph\[classification\]"):
        load_digits()


def test_measures_of_examples_do_not_depend_on_the_batch():
    config = TransformerConfig(11, d_model=10, num_heads=5, num_layers=1, d_ff=7)
    model = Classifier(ClassifierConfig(config, num_classes=3)).eval()
    x, y = torch.randint(11, (13, 7)), torch.randint(3, (13,))
    losses, found = classify(model, x, y, batch_size=5)
    output = model(x, targets=y)
    torch.testing.assert_close(losses.mean().float(), output.loss)
    assert torch.equal(found, output.logits.argmax(-1))


def test_the_confusion_matrix_counts(tmp_path):
    targets, found = torch.randint(3, (50,)), torch.randint(3, (50,))
    matrix = confusion_matrix(targets, found, 3)
    for row in range(3):
        for column in range(3):
            assert matrix[row, column] == ((targets == row) & (found == column)).sum()
    figure = draw_confusion(matrix, ["a", "b", "documentation"], tmp_path / "confusion.svg", title="test")
    shown = {text.get_text() for text in figure.axes[0].texts}
    assert shown == {str(count) for count in matrix.flatten().tolist() if count}
    assert (tmp_path / "confusion.svg").read_text().startswith("<?xml")
    with pytest.raises(ValueError, match=r"Expected counts \[2, 2\]"):
        draw_confusion(matrix, ["a", "b"])
    with pytest.raises(ValueError, match="png"):
        draw_confusion(matrix, ["a", "b", "c"], tmp_path / "confusion.gif")
