"""Trains an encoder-decoder with head graphs to translate, or beside plain attention of equal parameters (--compare).

    python examples/train_translation.py --compare
    python examples/train_translation.py --data multi30k --compare --d-model 128 --num-layers 3 --d-ff 256 \\
        --vocab-size 4000 --batch-size 64 --steps 1500

By default the text is synthetic, sentences about numbers in English and German, and the first command takes some
minutes on one thread. --data names a folder with train.en, train.de, val.en and val.de, one sentence a line, such as
Multi30k: the second command takes 35 minutes on one thread, and BLEU is 34 with head graphs and without
(docs/experiments.md). Subwords are byte pairs over both languages; training smooths labels and follows the schedule of
Vaswani et al. 2017; translations come from beam search and are scored in BLEU by sacrebleu, on the text as it is in
the files.

The run folder holds config.json, log.csv, curves.png, checkpoints, the model, tokenizer.json, translations.txt,
result.json and of a head graph heads.png. Ctrl-C stops it; the same command with --resume goes on.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import zlib
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gohgraph import Transformer, TransformerConfig
from gohgraph.learning.cli.comparison import Comparison
from gohgraph.learning.contests.contest import Result, results_table
from gohgraph.learning.contests.results import about_table
from gohgraph.learning.data.parallel_text import NUMERALS, PairBatches, ParallelText, Subwords, load_parallel_text
from gohgraph.learning.regimes.translation import bleu, sentence_losses, translate, translation_output
from gohgraph.learning.run_folder import write_text
from gohgraph.models.model_output import ModelOutput


class TranslationTraining(Comparison):
    """The sentences, the model, and what is measured, translated and drawn in the end."""

    name, runs = "train_translation", "translation"
    full = dict(d_model=96, num_heads=8, num_layers=2, d_ff=192, vocab_size=400, batch_size=32, steps=600)
    smoke = dict(d_model=16, num_heads=4, num_layers=1, d_ff=16, vocab_size=270, batch_size=4, steps=12)
    learning_rate, weight_decay = 3e-3, 0.01
    columns = {
        "validation loss": ("validation_loss", 4, 1),
        "BLEU": ("bleu", 2, 1),
        "exact [%]": ("exact", 1, 100),
        "step [ms]": ("step_seconds", 1, 1000),
        "time [s]": ("seconds", 1, 1),
    }
    pictures = ("heads.png", "translations.txt")
    examples = "validation sentences"

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--data", default=NUMERALS, metavar="FOLDER", help=f"{NUMERALS} (default, synthetic), or a folder of files")
        add("--source", default="en", help="language to translate from (default en)")
        add("--target", default="de", help="language to translate to (default de)")
        add("--dropout", type=float, default=0.1, help="default %(default)s")
        add("--label-smoothing", type=float, default=0.1, help="default %(default)s")
        add("--beams", type=int, default=4, help="hypotheses of the beam search (default %(default)s)")
        add("--length-penalty", type=float, default=0.6, help="of the beam search (default %(default)s)")

    def check(self) -> None:
        super().check()
        flags = self.flags
        if flags.beams < 1:
            raise ValueError(f"Expected --beams of at least 1 (got {flags.beams}). Do pass 1 for greedy decoding.")
        if not 0 <= flags.label_smoothing < 1:
            raise ValueError(f"Expected --label-smoothing in [0, 1) (got {flags.label_smoothing}). Do pass e.g. 0.1.")

    def load(self) -> TransformerConfig:
        flags = self.flags
        text = load_parallel_text(flags.data, source=flags.source, target=flags.target)
        if flags.smoke:
            text = ParallelText(text.name, text.train[:40], text.validation[:8])
        sentences = [sentence for pair in text.train for sentence in pair]
        self.text, self.subwords = text, Subwords.train(sentences, flags.vocab_size)
        self.validation = self._batches(text.validation)
        self.data_settings = {"name": text.name, "crc32": zlib.crc32("\n".join(sentences).encode())}
        self.data_settings |= self.values("source", "target", "batch_size", "label_smoothing")
        return self.transformer(len(self.subwords))

    def shape(self) -> dict[str, Any]:
        return self.values() | {"dropout": self.flags.dropout}

    def batches(self, seed: int) -> PairBatches:
        return self._batches(self.text.train, seed)

    def _batches(self, pairs: list[tuple[str, str]], seed: int = 0) -> PairBatches:
        source, target = (self.subwords.encode(side) for side in zip(*pairs, strict=True))
        return PairBatches(source, target, batch_size=self.flags.batch_size, seed=seed)

    def build(self, config: TransformerConfig) -> Transformer:
        return Transformer(config)

    def loss(self, model: Transformer, batch: Any) -> ModelOutput:
        return translation_output(model, batch, label_smoothing=self.flags.label_smoothing)

    def schedule(self) -> dict[str, Any]:
        if self.flags.recipe == "modern":
            return {"betas": (0.9, 0.98)}
        warmup = max(1, self.flags.steps // 5) if self.flags.warmup is None else self.flags.warmup
        return {"schedule": "inverse-sqrt", "warmup": warmup, "betas": (0.9, 0.98)}

    def evaluate(self, model: Transformer) -> dict[str, float]:
        losses, counts = sentence_losses(model, self.validation)
        return {"validation_loss": (losses.sum() / counts.sum()).item()}

    def measure(self, model: Transformer, leaf: Path) -> Result:
        flags, pairs = self.flags, self.text.validation
        losses, counts = sentence_losses(model, self.validation)
        beams = {"num_beams": flags.beams, "length_penalty": flags.length_penalty}
        found = translate(model, self.subwords, self.validation, **beams)
        translations = list(tqdm(found, desc="translating", total=len(pairs), unit="sentence"))
        score, signature = bleu(translations, [target for _, target in pairs])
        shown = list(zip(pairs, translations, strict=True))
        lines = [f"{source}\n{translation}\n({target})\n" for (source, target), translation in shown]
        write_text(leaf / "translations.txt", "\n".join(lines))
        write_text(leaf / "tokenizer.json", self.subwords.to_json())
        return {
            # Per token, so that long sentences do not count for more.
            "losses": losses / counts,
            "validation_loss": (losses.sum() / counts.sum()).item(),
            "bleu": score,
            "bleu_signature": signature,
            "exact": statistics.mean(translation == target for (_, target), translation in shown),
        }

    def report(self, results: dict[tuple[int, str], Result]) -> None:
        self.write_table(results_table(results, self.columns))
        print(about_table(results, self.flags.steps))
        print(f"loss in nats per subword; BLEU {next(iter(results.values()))['bleu_signature']}")
        self.conclude(results, "written")


main = TranslationTraining.main

if __name__ == "__main__":
    sys.exit(main())
