"""Trains an encoder-decoder with head graphs to translate, or beside plain attention of equal parameters (--compare).

    python examples/train_translation.py --compare
    python examples/train_translation.py --data multi30k --compare --d-model 128 --num-layers 3 --d-ff 256 \\
        --vocab-size 4000 --batch-size 64 --steps 1500

By default the text is synthetic, sentences about numbers in English and German, and the first command takes some
minutes on one thread. --data names a folder with train.en, train.de, val.en and val.de, one sentence a line, such as
Multi30k: the second command takes 20 minutes on one thread, and BLEU is 26 with head graphs and 23 without
(docs/results.md). Subwords are byte pairs over both languages; training smooths labels and follows the schedule of
Vaswani et al. 2017; translations come from beam search and are scored in BLEU by sacrebleu, on the text as it is in
the files.

The run folder holds config.json, log.csv, curves.png, checkpoints, the model, tokenizer.json, translations.txt,
result.json and of a head graph heads.png. Ctrl-C stops it; the same command with --resume goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gohgraph import Transformer, TransformerConfig, draw, record
from gohgraph.common.command_line import ArgumentParser, run
from gohgraph.drawing import draw_curves
from gohgraph.learning.cli.experiment import (
    add_run_flags,
    add_size_flags,
    add_training_flags,
    can_resume,
    fill_sizes,
    open_folder,
    resumable,
    train_config,
)
from gohgraph.learning.cli.graph_flags import add_graph_flags, graph_from_flags
from gohgraph.learning.contests.contest import Contest, add_rate_flags, results_table, verdict
from gohgraph.learning.contests.matching import count_parameters, with_plain
from gohgraph.learning.data.parallel_text import NUMERALS, PairBatches, ParallelText, Subwords, load_parallel_text
from gohgraph.learning.loop import Training
from gohgraph.learning.regimes.translation import bleu, sentence_losses, translate, translation_output
from gohgraph.learning.run_folder import step_seconds, write_text

SIZES = ("d_model", "num_heads", "num_layers", "d_ff", "vocab_size", "batch_size", "steps")
FULL = dict(zip(SIZES, (96, 8, 2, 192, 400, 32, 600), strict=True))
SMOKE = dict(zip(SIZES, (16, 4, 1, 16, 270, 4, 12), strict=True))
COLUMNS = {
    "validation loss": ("validation_loss", 4, 1),
    "BLEU": ("bleu", 2, 1),
    "exact [%]": ("exact", 1, 100),
    "step [ms]": ("step_seconds", 1, 1000),
    "time [s]": ("seconds", 1, 1),
}
# Pairs that are trained on and measured in a smoke run.
SMOKE_PAIRS = 40, 8


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """What all models of a run are trained and measured on."""

    text: ParallelText
    subwords: Subwords
    flags: argparse.Namespace

    def batches(self, pairs: list[tuple[str, str]], seed: int = 0) -> PairBatches:
        """Returns the batches of sentence pairs."""
        sides = [self.subwords.encode(side) for side in zip(*pairs, strict=True)]
        return PairBatches(*sides, batch_size=self.flags.batch_size, seed=seed)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    return run(_parser(), partial(_main, argv), argv)


def _main(argv: list[str], flags: argparse.Namespace) -> None:
    fill_sizes(flags, FULL, SMOKE)
    if flags.beams < 1:
        raise ValueError(f"Expected --beams of at least 1 (got {flags.beams}). Do pass 1 for greedy decoding.")
    if not 0 <= flags.label_smoothing < 1:
        raise ValueError(f"Expected --label-smoothing in [0, 1) (got {flags.label_smoothing}). Do pass e.g. 0.1.")
    text = load_parallel_text(flags.data, source=flags.source, target=flags.target)
    if flags.smoke:
        text = ParallelText(text.name, text.train[: SMOKE_PAIRS[0]], text.validation[: SMOKE_PAIRS[1]])
    folder = open_folder(flags, "translation")
    with resumable("train_translation", argv, folder):
        subwords = Subwords.train([sentence for pair in text.train for sentence in pair], flags.vocab_size)
        configs, task = _configs(len(subwords), flags), Task(text, subwords, flags)
        start, finish = partial(_training, task), partial(_finish, task)
        trained = Contest(configs, flags.seeds, flags.learning_rates, folder).run(start, finish, resume=flags.resume)
    if trained:
        _report(trained, folder, flags)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--data", default=NUMERALS, metavar="FOLDER", help=f"{NUMERALS} (default, synthetic), or a folder of files")
    add("--source", default="en", help="language to translate from (default en)")
    add("--target", default="de", help="language to translate to (default de)")
    add_run_flags(parser, "translation")
    add("--compare", action="store_true", help="also train plain attention of as many parameters, in turns")
    add_size_flags(parser, FULL)
    add("--dropout", type=float, default=0.1, help="default %(default)s")
    add("--label-smoothing", type=float, default=0.1, help="default %(default)s")
    add("--beams", type=int, default=4, help="hypotheses of the beam search (default %(default)s)")
    add("--length-penalty", type=float, default=0.6, help="of the beam search (default %(default)s)")
    add_graph_flags(parser)
    add_rate_flags(parser, learning_rate=3e-3)
    add_training_flags(parser, weight_decay=0.01)
    return parser


def _configs(vocab_size: int, flags: argparse.Namespace) -> dict[str, TransformerConfig]:
    shape = {name: getattr(flags, name) for name in ("d_model", "num_heads", "num_layers", "d_ff", "dropout")}
    graph = graph_from_flags(flags, flags.num_heads)
    config = TransformerConfig(vocab_size, **shape, head_graph=graph)
    return with_plain(Transformer, config) if flags.compare else {"plain" if graph is None else "goh": config}


def _training(task: Task, config: TransformerConfig, seed: int, rate: float, leaf: Path) -> Training:
    flags, validation = task.flags, task.batches(task.text.validation)
    torch.manual_seed(seed)

    def evaluate(model: Transformer) -> dict[str, float]:
        losses, counts = sentence_losses(model, validation)
        return {"validation_loss": (losses.sum() / counts.sum()).item()}

    warmup = max(1, flags.steps // 5) if flags.warmup is None else flags.warmup
    written = "\n".join(sentence for pair in task.text.train for sentence in pair)
    names = ("source", "target", "batch_size", "label_smoothing")
    data = {"name": task.text.name, "crc32": zlib.crc32(written.encode())} | {n: getattr(flags, n) for n in names}
    anneal = flags.anneal_top_k if config.head_graph is not None and flags.anneal_top_k else 0
    return Training(
        Transformer(config),
        task.batches(task.text.train, seed),
        partial(translation_output, label_smoothing=flags.label_smoothing),
        train_config(flags, seed, rate, warmup=warmup, schedule="inverse-sqrt", betas=(0.9, 0.98), anneal_top_k=anneal),
        leaf,
        evaluate=evaluate,
        resume=can_resume(leaf, flags),
        settings={"model": config.to_dict(), "data": data, "flags": vars(flags)},
        description=leaf.name,
    )


def _finish(task: Task, training: Training, leaf: Path) -> dict[str, Any]:
    """Measures, translates with and draws the model as it was saved; writes result.json and returns more of it."""
    flags, validation = task.flags, task.batches(task.text.validation)
    training.accelerator.unwrap_model(training.model).save_pretrained(leaf / "model")
    model = Transformer.from_pretrained(leaf / "model").eval().to(training.accelerator.device)
    losses, counts = sentence_losses(model, validation)
    found = translate(model, task.subwords, validation, num_beams=flags.beams, length_penalty=flags.length_penalty)
    translations = list(tqdm(found, desc="translating", total=len(task.text.validation), unit="sentence"))
    score, signature = bleu(translations, [target for _, target in task.text.validation])
    exact = [own == target for own, (_, target) in zip(translations, task.text.validation, strict=True)]
    result = {
        "parameters": count_parameters(model),
        "validation_loss": (losses.sum() / counts.sum()).item(),
        "bleu": score,
        "bleu_signature": signature,
        "exact": statistics.mean(exact),
        "seconds": training.seconds,
        "step_seconds": statistics.median(step_seconds(training.folder.rows)),
    }
    write_text(leaf / "result.json", json.dumps(result, indent=2))
    write_text(leaf / "tokenizer.json", task.subwords.to_json())
    shown = zip(task.text.validation, translations, strict=True)
    lines = [f"{source}\n{own}\n({target})\n" for (source, target), own in shown]
    write_text(leaf / "translations.txt", "\n".join(lines))
    graph = model.config.head_graph
    if graph is not None and (graph.outputs is not None or graph.scores is not None):
        with record(model) as heads:
            sentence_losses(model, validation)
        draw(heads, leaf / "heads.png", title="mean edge weights over validation sentences")
    # Per token, so that long sentences do not count for more.
    return {**result, "losses": losses / counts, "log": training.folder.rows}


def _report(trained: dict[tuple[int, str], dict[str, Any]], folder: Path, flags: argparse.Namespace) -> None:
    """Prints the table, which is better, and where the translations and pictures are."""
    table = results_table(trained, COLUMNS) + "\n"
    write_text(folder / "table.md", table)
    print(f"\n{table}\nloss in nats per subword; BLEU {next(iter(trained.values()))['bleu_signature']}")
    if flags.compare:
        print(verdict(trained))
    if len(trained) > 1:
        draw_curves({one["leaf"]: one["log"] for one in trained.values()}, folder / "curves.png")
    files = [folder / "curves.png", *sorted(folder.rglob("heads.png")), *sorted(folder.rglob("translations.txt"))]
    print("written: " + ", ".join(str(path) for path in files))


if __name__ == "__main__":
    sys.exit(main())
