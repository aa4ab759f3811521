"""Trains a byte-level language model with head graphs, or beside plain attention of equal parameter count (--compare).

The run folder holds config.json, log.csv, curves.png, checkpoints, the model, sample.txt and result.json, of a head
graph heads.png, and of a router load.png. Ctrl-C stops it; --resume goes on. Where TensorBoard is installed, losses and
head graphs are in tensorboard/: tensorboard --logdir runs
"""

from __future__ import annotations

import argparse
import statistics
import zlib
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from gohgraph.attention.head_load import load_cv, load_entropy
from gohgraph.common.checks import there
from gohgraph.common.command_line import ArgumentParser
from gohgraph.drawing.load_chart import draw_load
from gohgraph.drawing.tensorboard import log_head_graphs
from gohgraph.learning.cli.comparison import Comparison, has_head_graphs
from gohgraph.learning.cli.flags import add_parallel_flags, parallel_config
from gohgraph.learning.contests.contest import Result
from gohgraph.learning.contests.matching import with_plain
from gohgraph.learning.contests.results import too_short
from gohgraph.learning.data.corpus import PYTHON_DOCS, evaluation_batches, load_corpus, sample_batch
from gohgraph.learning.regimes import language
from gohgraph.learning.run_folder import step_seconds, write_text
from gohgraph.learning.tracking import TensorBoard
from gohgraph.models.byte_tokenizer import save_byte_tokenizer
from gohgraph.models.config import FEED_FORWARD_ACTIVATIONS, POSITIONS, TransformerConfig
from gohgraph.models.models import LanguageModel

# What a model is called and what it means: with messages, with routing.
KINDS = {
    (True, False): ("goh", "heads as a graph"),
    (True, True): ("goh", "heads as a graph, routed by token"),
    (False, True): ("moh", "heads routed by token"),
    (False, False): ("plain", "plain attention"),
}


ABOUT_DEMO = """Train a small language model with head graphs beside a plain one of equal size, and draw its graph.

    gohgraph demo                                     three minutes on one thread
    gohgraph demo --smoke                             a few steps, to see that it runs
    gohgraph demo --data book.txt --steps 2000 --run runs/book
    gohgraph demo --sites both --score-in-degree 4 --run runs/both
    gohgraph demo --run runs/book --resume            after Ctrl-C
"""


class LanguageModelTraining(Comparison):
    """The text, the model, and what is measured, written and drawn in the end."""

    name, runs = "train_language_model", "demo or runs/language-model"
    # Two models of this size, trained for this long, take three minutes on one thread.
    full = dict(d_model=128, num_heads=8, num_layers=4, d_ff=512, length=128, batch_size=8, steps=260)
    smoke = dict(d_model=32, num_heads=4, num_layers=2, d_ff=64, length=32, batch_size=4, steps=20)
    learning_rate = 4e-3
    pictures = ("heads.png", "load.png")
    # Windows that are evaluated on the way, the same each time, and looked at for heads.png.
    evaluated: ClassVar[int] = 256
    examples = "validation text"

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--data", default=PYTHON_DOCS, metavar="TEXT", help=f"{PYTHON_DOCS} (default), tiny-shakespeare, or a file")
        add("--match-parameters", action="store_true", help="train only the plain model of --compare")
        size = parser.add_argument_group("model").add_argument
        size("--num-kv-heads", type=int, help="key/value heads (default: --num-heads)")
        size("--dropout", type=float, default=0.0)
        size("--activation", choices=FEED_FORWARD_ACTIVATIONS, help="default: the recipe's")
        size("--positions", choices=POSITIONS, default="rotary")
        add_parallel_flags(parser)

    def check(self) -> None:
        super().check()
        flags, self.parallel = self.flags, parallel_config(self.flags)
        if self._kind() == KINDS[False, False] and (flags.compare or flags.match_parameters):
            raise ValueError("Expected a head graph to compare with (got --sites none). Do add --sites or --router.")
        if flags.compare and flags.match_parameters:
            raise ValueError("Expected --compare or --match-parameters (got both). Do drop one: --compare trains both.")

    def run_name(self) -> str:
        return "demo" if self.flags.compare else "language-model"

    def models(self) -> dict[str, TransformerConfig]:
        config = self.load()
        if not (self.flags.compare or self.flags.match_parameters):
            return {self._kind()[0]: config}
        pair = with_plain(self.build, config)
        return ({self._kind()[0]: config} if self.flags.compare else {}) | {"plain": pair["plain"]}

    def shape(self) -> dict[str, Any]:
        shape = self.values() | self.values("num_kv_heads", "dropout", "positions")
        shape["max_length"] = self.flags.length + 1
        return shape if self.flags.activation is None else shape | {"activation": self.flags.activation}

    def load(self) -> TransformerConfig:
        self.corpus = load_corpus(self.flags.data)
        self.windows = self.values("batch_size", "length")
        # Windows that routers are looked at on.
        self.limit = 16 if self.flags.smoke else 256
        # Both refuse windows that are too long for the text, before there is a run folder.
        sample_batch(self.corpus.train, 0, **self.windows, seed=0)
        evaluation_batches(self.corpus.validation, **self.windows)
        crc32 = zlib.crc32(self.corpus.train.numpy().tobytes())
        self.data_settings = {"name": self.corpus.name, "crc32": crc32, **self.windows}
        return self.transformer(language.VOCAB_SIZE)

    def build(self, config: TransformerConfig) -> LanguageModel:
        return LanguageModel(config)

    def batches(self, seed: int) -> Callable[[int], Any]:
        return partial(sample_batch, self.corpus.train, seed=seed, **self.windows)

    loss = staticmethod(language.next_token_output)

    def tracking(self, model: LanguageModel, leaf: Path) -> dict[str, Any]:
        tracker = TensorBoard(leaf / "tensorboard") if find_spec("tensorboard") is not None else None
        # One rank alone cannot log a model that lies on several.
        can_log = has_head_graphs(model) and tracker is not None and not (self.parallel and self.parallel.is_sharded)

        def log(row: dict[str, Any]) -> None:
            log_head_graphs(there(tracker).writer(row["step"]), model, row["step"])

        return {"tracker": tracker, "on_evaluate": log if can_log else None, "parallel": self.parallel}

    def evaluate(self, model: LanguageModel) -> dict[str, float]:
        limit = min(self.limit, self.evaluated)
        losses = language.window_losses(model, self.corpus.validation, **self.windows, limit=limit)
        return {"validation_loss": losses.mean().item()}

    def measure(self, model: LanguageModel, leaf: Path) -> Result:
        text = self.corpus.validation
        losses = language.window_losses(model, text, **self.windows, limit=self.limit if self.flags.smoke else None)
        write_text(leaf / "sample.txt", language.sample_text(model, text, length=self.flags.length))
        # transformers loads the run's folder, and the model's alone.
        for folder in (leaf, leaf / "model"):
            save_byte_tokenizer(folder)
        result: Result = {
            "losses": losses, "validation_loss": losses.mean().item(), "standard_error": language.standard_error(losses)
        }  # fmt: skip
        graph = model.config.head_graph
        if graph is not None and graph.routing is not None:
            load = language.head_loads(model, text, **self.windows, limit=self.limit)  # [L, H]
            shared = graph.routing.num_shared
            cv, entropy = load_cv(load, shared).mean().item(), load_entropy(load, shared).mean().item()
            result |= {"load": load.tolist(), "load_cv": cv, "load_entropy": entropy}
            draw_load(load, leaf / "load.png", num_shared=shared, title="load of heads over validation text")
        return result

    def report(self, results: dict[tuple[int, str], Result]) -> None:
        named = {one["leaf"] if one["leaf"] != "." else self.folder.name: one for one in results.values()}
        width = max(16, *map(len, named))
        columns = {"parameters": 10, "validation loss": 17, "step [ms]": 9, "ratio": 6, "tokens/s": 8, "time [s]": 8}
        head = f"{'model':<{width}} " + " ".join(f"{name:>{size}}" for name, size in columns.items())
        print(f"\n{head}\n{'-' * len(head)}")
        for (seed, _), (name, one) in zip(results, named.items(), strict=True):
            ratio = _ratio(one, results[seed, "plain"]) if self.flags.compare else "-"
            loss = f"{one['validation_loss']:.4f} \u00b1 {one['standard_error']:.4f}"
            speed = self.flags.batch_size * self.flags.length / one["step_seconds"]
            cells = [f"{one['parameters']:,}", loss, f"{one['step_seconds'] * 1e3:.1f}", ratio, f"{speed:,.0f}"]
            sizes = zip([*cells, f"{one['seconds']:.1f}"], columns.values(), strict=True)
            print(f"{name:<{width}} " + " ".join(f"{cell:>{size}}" for cell, size in sizes))
        print(self._legend({name for _, name in results}))
        for name, one in named.items():
            if "load" in one:
                load = f"load CV {one['load_cv']:.3f}, load entropy {one['load_entropy']:.3f}"
                print(f"routing of {name}: {load} (balanced: 0 and 1)")
        self.conclude(results)

    def _legend(self, names: set[str]) -> str:
        """What the models of the table are, and what its columns say."""
        kinds = dict([self._kind(), KINDS[False, False]])
        models = "; ".join(f"{name}: {meaning}" for name, meaning in kinds.items() if name in names)
        lines = [f"{models}; loss in nats a byte \u00b1 standard error over the validation text, one line a run"]
        lines.append("step: median; time: of training alone, without evaluations")
        if self.flags.compare:
            lines.append("ratio: of a step to plain's of the same minute, as both train in turns; their median is")
            lines.append("steadier than the quotient of the medians in the table")
        return "\n".join([*lines, *filter(None, [too_short(self.flags.steps)])])

    def _kind(self) -> tuple[str, str]:
        return KINDS[self.flags.sites != "none", self.flags.router]


def _ratio(one: Result, plain: Result) -> str:
    """The median of the ratios of step times, between the rows of two logs."""
    pairs = zip(step_seconds(one["log"]), step_seconds(plain["log"]), strict=True)
    return f"{statistics.median(own / other for own, other in pairs):.3f}"



class Demo(LanguageModelTraining):
    """The comparison at its default size: head graphs beside plain attention, drawn in the end."""

    command, runs = "gohgraph demo", "demo"
    # Of three minutes, more would take a fifth; in the end both models are measured on the whole text.
    evaluated = 32

    @classmethod
    def parser(cls) -> ArgumentParser:
        """Returns the parser of all flags, with --compare on."""
        parser = super().parser()
        parser.description = ABOUT_DEMO
        parser.set_defaults(compare=True)
        return parser

    def conclude(self, results: dict[tuple[int, str], Result], what: str = "pictures") -> None:
        """Prints which model is better, where the pictures are, and how to look at the graph."""
        super().conclude(results, what)
        if name := next((name for _, name in results if name == "goh"), None):
            leaf = next(one["leaf"] for (_, other), one in results.items() if other == name)
            print(f"look at its graph: gohgraph draw {self.folder / leaf} --out heads.html")
