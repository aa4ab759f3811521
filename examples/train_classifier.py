"""Trains a classifier of images or text with head graphs, or beside plain attention of equal parameters (--compare).

    python examples/train_classifier.py --compare
    python examples/train_classifier.py --task text --compare
    python examples/train_classifier.py --task text --data folder --length 64

Images are scikit-learn's handwritten digits, cut into 16 patches of 2 x 2 pixels; text is which of five kinds (Python's
documentation and sources, C++ headers, Unicode names, licences) 32 bytes come from, or with --data which .txt file of a
folder. Each comparison takes one to two minutes on one thread; expected accuracies (docs/regimes.md): 99 % of the
digits and 80 % of the texts with either.

The run folder holds config.json, log.csv, curves.png, checkpoints, the model, confusion.png, result.json and of a head
graph heads.png. Ctrl-C stops it; the same command with --resume goes on.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gohgraph import Classifier, ClassifierConfig, TransformerConfig, draw_confusion
from gohgraph.learning.cli.comparison import Comparison
from gohgraph.learning.data.classification import (
    classification_output,
    classify,
    confusion_matrix,
    load_digits,
    load_text_classes,
)


class ClassifierTraining(Comparison):
    """The data, the model, and what is measured and drawn in the end."""

    name, runs = "train_classifier", "classifier-TASK"
    full = dict(d_model=48, num_heads=8, num_layers=2, d_ff=96, length=32, batch_size=64, steps=600)
    smoke = dict(d_model=8, num_heads=4, num_layers=1, d_ff=8, length=8, batch_size=5, steps=12)
    learning_rate = 2e-3
    columns = {
        "validation loss": ("validation_loss", 4, 1),
        "accuracy [%]": ("accuracy", 2, 100),
        "step [ms]": ("step_seconds", 1, 1000),
        "time [s]": ("seconds", 1, 1),
    }
    pictures = ("heads.png", "confusion.png")
    examples = "validation examples"

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--task", choices=("digits", "text"), default="digits", help="default %(default)s")
        add("--data", metavar="FOLDER", help="of texts, one .txt file for every class (default: five kinds of text)")
        add("--dropout", type=float, default=0.1, help="default %(default)s")

    def check(self) -> None:
        super().check()
        flags = self.flags
        if flags.data is not None and flags.task != "text":
            raise ValueError("Expected no --data with --task digits (got one). Do add --task text.")
        if flags.batch_size < 1:
            raise ValueError(f"Expected --batch-size of at least 1 (got {flags.batch_size}). Do raise it.")

    def run_name(self) -> str:
        return f"classifier-{self.flags.task}"

    def load(self) -> TransformerConfig:
        flags, images = self.flags, self.flags.task == "digits"
        per_class = 40 if flags.smoke else 4000
        self.data = load_digits() if images else load_text_classes(flags.data, length=flags.length, per_class=per_class)
        crc32 = zlib.crc32(self.data.train[0].numpy().tobytes())
        self.data_settings = {"name": self.data.name, "crc32": crc32, "batch_size": flags.batch_size}
        return self.transformer(1 if images else 256)

    def shape(self) -> dict[str, Any]:
        length = 16 if self.flags.task == "digits" else self.flags.length
        return self.values() | {"dropout": self.flags.dropout, "max_length": length, "positions": "learned"}

    def build(self, config: TransformerConfig) -> Classifier:
        patches = {"patch_size": 2, "channels": 1} if self.data.name == "digits" else {}
        return Classifier(ClassifierConfig(config, num_classes=len(self.data.classes), **patches))

    def batches(self, seed: int) -> Callable[[int], Any]:
        return partial(self.data.batch, batch_size=self.flags.batch_size, seed=seed)

    loss = staticmethod(classification_output)

    def evaluate(self, model: Classifier) -> dict[str, float]:
        inputs, targets = self.data.validation
        losses, found = classify(model, inputs, targets)
        return {"validation_loss": losses.mean().item(), "accuracy": (found == targets).double().mean().item()}

    def measure(self, model: Classifier, leaf: Path) -> dict[str, Any]:
        inputs, targets = self.data.validation
        losses, found = classify(model, inputs, targets)
        matrix = confusion_matrix(targets, found, len(self.data.classes))
        draw_confusion(matrix, self.data.classes, leaf / "confusion.png")
        return {
            "losses": losses,
            "validation_loss": losses.mean().item(),
            "accuracy": (found == targets).double().mean().item(),
            "confusion": matrix.tolist(),
            "classes": self.data.classes,
        }


main = ClassifierTraining.main

if __name__ == "__main__":
    sys.exit(main())
