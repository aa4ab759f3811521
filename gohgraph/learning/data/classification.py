"""Labelled data for a `Classifier`, and how well it tells classes apart."""

import os
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gohgraph.common.packages import needs
from gohgraph.learning.data.corpus import Corpus, evaluation_batches, load_corpus
from gohgraph.learning.data.domains import DOMAINS, load_domain
from gohgraph.models.model_output import ModelOutput


@dataclass(frozen=True, eq=False)
class LabelledData:
    """Examples with their classes, split into what is trained on and what is only measured.

    Args:
        name: where they come from.
        classes: the name of every class.
        train: inputs `[N, ...]` and classes `[N]`.
        validation: the same, held out.
    """

    name: str
    classes: tuple[str, ...]
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]

    def batch(self, index: int, *, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
        """Returns random training examples, a pure function of (seed, index)."""
        inputs, targets = self.train
        generator = torch.Generator().manual_seed(random.Random(f"{seed} {index}").getrandbits(32))
        rows = torch.randint(len(targets), (batch_size,), generator=generator)
        return inputs[rows], targets[rows]


def load_digits() -> LabelledData:
    """Loads the handwritten digits that scikit-learn ships: 1,797 images of 8 x 8 pixels, a fixed fifth held out.

    Example:
        >>> load_digits().validation[0].shape
        torch.Size([359, 1, 8, 8])
    """
    with needs("scikit-learn for its digits", "classification"):
        from sklearn import datasets
    data = datasets.load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 16  # [N, 1, 8, 8]
    digits = torch.from_numpy(data.target).long()  # [N]
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(random.Random("0 0").getrandbits(32)))
    held_out, rest = order[: len(order) // 5], order[len(order) // 5 :]
    train, validation = (images[rest], digits[rest]), (images[held_out], digits[held_out])
    return LabelledData("digits", tuple(map(str, range(10))), train, validation)


def load_text_classes(
    folder: str | os.PathLike[str] | None = None, *, length: int = 32, per_class: int = 4000
) -> LabelledData:
    """Loads windows of bytes, whose class is the text they come from.

    Args:
        folder: `None` for the kinds of text of `load_domain`, else a folder with one `.txt` file for every class.
        length: bytes of a window.
        per_class: the most windows of a class; a tenth as many are held out, from other parts of the text.

    Returns:
        Token ids `[N, length]` and classes `[N]`; windows do not overlap.
    """
    if folder is None:
        texts = {name: load_domain(name) for name in DOMAINS}
    else:
        texts = {path.stem: load_corpus(path) for path in sorted(Path(folder).glob("*.txt"))}
    if len(texts) < 2:
        raise ValueError(f"Expected a folder with two .txt files or more (got {len(texts)} in {folder}). Do add some.")
    sides = [
        _labelled([_windows(text, side, length, count) for text in texts.values()])
        for side, count in (("train", per_class), ("validation", max(1, per_class // 10)))
    ]
    return LabelledData("text" if folder is None else os.fspath(folder), tuple(texts), *sides)


def _windows(corpus: Corpus, side: str, length: int, count: int) -> Tensor:
    batches = evaluation_batches(getattr(corpus, side), batch_size=count, length=length, limit=count)
    return next(batches)[0]  # [N, T]


def _labelled(classes: list[Tensor]) -> tuple[Tensor, Tensor]:
    targets = torch.cat([torch.full((len(inputs),), number) for number, inputs in enumerate(classes)])  # [N]
    return torch.cat(classes), targets


def classification_output(model: nn.Module, batch: tuple[Tensor, Tensor]) -> ModelOutput:
    """Returns a classifier's output for `(inputs [B, ...], targets [B])`: a loss for `train`."""
    inputs, targets = batch
    return model(inputs, targets=targets)


@torch.no_grad()
def classify(model: nn.Module, inputs: Tensor, targets: Tensor, *, batch_size: int = 256) -> tuple[Tensor, Tensor]:
    """Measures a classifier on examples, one number each.

    Args:
        model: used as it is; call `model.eval()` first.
        inputs: `[N, ...]`.
        targets: `[N]`.
        batch_size: examples at a time.

    Returns:
        Cross entropy of every example in nats, float64 `[N]`, and the most likely class `[N]`, on the CPU.
    """
    device = next(model.parameters()).device
    losses, predicted = [], []
    for x, y in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
        logits = model(x.to(device)).logits.float().cpu()  # [B, C]
        losses.append(F.cross_entropy(logits, y, reduction="none").double())
        predicted.append(logits.argmax(dim=-1))
    return torch.cat(losses), torch.cat(predicted)


def confusion_matrix(targets: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Counts how often class i (row) was taken for class j (column), int64 `[C, C]`.

    Example:
        >>> confusion_matrix(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), 2).tolist()
        [[1, 1], [0, 1]]
    """
    cells = targets * num_classes + predicted
    return torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)  # [C, C]
