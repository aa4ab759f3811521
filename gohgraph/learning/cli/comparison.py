"""A training script of a model with head graphs, alone or beside plain attention of as many parameters."""

import statistics
from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from gohgraph.analysis.record import record, recordable
from gohgraph.common.command_line import ArgumentParser
from gohgraph.drawing import draw
from gohgraph.learning.cli.contest_script import ContestScript
from gohgraph.learning.cli.graph_flags import add_graph_flags, graph_from_flags
from gohgraph.learning.contests.contest import Result, results_table, verdict
from gohgraph.learning.contests.matching import count_parameters, with_plain
from gohgraph.learning.contests.results import about_table, too_short
from gohgraph.learning.loop import Training
from gohgraph.learning.run_folder import step_seconds
from gohgraph.models.config import TransformerConfig


class Comparison(ContestScript):
    """A `ContestScript` with `--compare` and the flags of head graphs and routing.

    A subclass fills the slots `load`, `build`, `batches`, `evaluate` and `measure`.

    Attributes:
        loss: `(model, batch)`, what is trained on.
        columns: of the table, as in `results_table`.
        pictures: files in the folders of runs, to be named in the end.
        examples: what the edge weights in heads.png are means over.
        data_settings: what defines the data, as JSON values.
    """

    loss: Callable[..., Any]
    columns: ClassVar[Mapping[str, tuple[str, int, float]]]
    pictures: ClassVar[tuple[str, ...]]
    examples: ClassVar[str]
    data_settings: dict[str, Any]

    @classmethod
    def parser(cls) -> ArgumentParser:
        """Returns the parser of all flags."""
        parser = super().parser()
        about = "also train plain attention of as many parameters, in turns"
        parser.add_argument("--compare", action="store_true", help=about)
        add_graph_flags(parser)
        return parser

    def check(self) -> None:
        """Raises `ValueError` for flags of training, model and head graphs that do not fit."""
        for rate in self.flags.learning_rates:
            self.config(self.flags.seeds[0], rate, **self.schedule())
        self.transformer(1)

    def shape(self) -> dict[str, Any]:
        """Returns the fields of `TransformerConfig` that flags alone give."""
        return self.values()

    def transformer(self, vocab_size: int, **more: Any) -> TransformerConfig:
        """Returns the configuration of the flags for so many tokens; `more` goes over it."""
        graph = graph_from_flags(self.flags, self.flags.num_heads)
        return TransformerConfig(vocab_size, **(self.shape() | more), head_graph=graph)

    def models(self) -> dict[str, TransformerConfig]:
        """The configuration of the flags, and that of plain attention to compare it with."""
        config = self.load()
        if self.flags.compare:
            return with_plain(self.build, config)
        return {"plain" if config.head_graph is None else "goh": config}

    @abstractmethod
    def load(self) -> TransformerConfig:
        """Reads the data, sets `data_settings`, and returns the configuration of the flags."""

    @abstractmethod
    def build(self, config: TransformerConfig) -> Any:
        """Returns a new model."""

    @abstractmethod
    def batches(self, seed: int) -> Callable[[int], Any]:
        """Returns the data of training, as `Training` takes it."""

    @abstractmethod
    def evaluate(self, model: Any) -> dict[str, float]:
        """Returns measures of a model by name, its `validation_loss` among them."""

    @abstractmethod
    def measure(self, model: Any, leaf: Path) -> Result:
        """Returns those of the trained model, with `losses` `[examples]` in nats, and draws it."""

    def schedule(self) -> dict[str, Any]:
        """Returns settings of `TrainConfig` that are the script's own; none by default."""
        return {}

    def tracking(self, model: Any, leaf: Path) -> dict[str, Any]:
        """Returns arguments of `Training` that are the script's own; none by default."""
        return {}

    def start(self, config: TransformerConfig, seed: int, rate: float, leaf: Path) -> Training:
        """Returns the training of a model in its folder."""
        model = self.build(config)
        # The plain side has no heads to leave out.
        anneal = (self.flags.anneal_top_k or 0) if config.head_graph is not None else 0
        settings = {"model_type": model.model_type, "model": model.config.to_dict(), "data": self.data_settings}
        return self.training(
            model, self.batches(seed), self.loss, self.config(seed, rate, anneal_top_k=anneal, **self.schedule()), leaf,
            evaluate=self.evaluate, settings=settings, **self.tracking(model, leaf),
        )  # fmt: skip

    def finish(self, training: Training, leaf: Path) -> Result:
        """Saves the model, and measures and draws it as it was saved."""
        trained = training.accelerator.unwrap_model(training.model)
        trained.save_pretrained(leaf / "model")
        model = type(trained).from_pretrained(leaf / "model").eval().to(training.accelerator.device)
        result = {
            "parameters": count_parameters(model),
            **self.measure(model, leaf),
            "seconds": training.seconds,
            "step_seconds": statistics.median(step_seconds(training.folder.rows)),
        }
        if has_head_graphs(model):
            with record(model) as heads:
                self.evaluate(model)
            draw(heads, leaf / "heads.png", title=f"mean edge weights over {self.examples}")
        return result

    def report(self, results: dict[tuple[int, str], Result]) -> None:
        """Prints the table, which is better, and where the pictures are."""
        self.write_table(results_table(results, self.columns))
        print(about_table(results, self.flags.steps))
        self.conclude(results)

    def conclude(self, results: dict[tuple[int, str], Result], what: str = "pictures") -> None:
        """Prints which model is better, and where the pictures are."""
        if self.flags.compare and not too_short(self.flags.steps):
            print(verdict(results))
        files = [self.folder / "curves.png"]
        files += [path for name in self.pictures for path in sorted(self.folder.rglob(name))]
        print(f"{what}: " + ", ".join(map(str, files)))


def has_head_graphs(model: nn.Module) -> bool:
    """Returns whether heads of the model send messages."""
    return bool(recordable(model)[0])
