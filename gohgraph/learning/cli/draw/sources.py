"""Where the network that is drawn comes from: the model's own graph, attribution on a text, or weights alone."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from gohgraph.analysis.attribution_graph import attribution_graph
from gohgraph.analysis.composition import composition_graph
from gohgraph.analysis.record import record, recordable
from gohgraph.analysis.recording import Recordings
from gohgraph.common.hub import local_folder
from gohgraph.convert import load_converted
from gohgraph.convert.saving import is_converted
from gohgraph.learning.checkpoints import find_model, load_own_model
from gohgraph.learning.cli.draw.flags import LENGTH, check_source
from gohgraph.learning.data.corpus import PYTHON_DOCS, load_corpus
from gohgraph.learning.readers.loading import is_stock, kind_in, load_reader, of_bytes, stock_class
from gohgraph.learning.readers.reader import Batch, Inputs, Reader, Task
from gohgraph.learning.readers.tokens import NoTokenizerError
from gohgraph.learning.regimes.demo import demo_model

if TYPE_CHECKING:
    from gohgraph.analysis.network import HeadNetwork

WORDS = ("mean", "zero")
# Letters of a text in a title.
SHOWN = 40
# Bytes that hold a token, of the built-in text, with room to spare.
BYTES_A_TOKEN = 40


class Chosen(NamedTuple):
    """What is drawn.

    Attributes:
        source: of `SOURCES`.
        reader: the model and how it reads, `None` where weights alone are looked at.
        folder: on this machine, `None` for the demo.
        why: what its own graph lacks, "" where it is shown as it should be.
    """

    source: str
    reader: Reader | None
    folder: Path | None
    why: str = ""


class Network(NamedTuple):
    """A network by attribution or by weights.

    Attributes:
        network: of all heads.
        said: the line that says what it shows.
        notes: what else is to be said.
        inputs: what the model was given, `None` where it was not run.
    """

    network: HeadNetwork
    said: str
    notes: tuple[str, ...] = ()
    inputs: Inputs | None = None


def chosen(flags: argparse.Namespace) -> Chosen:
    """Returns what to draw, by the flags or by what the model has; flags that do not go with it are errors."""
    if flags.demo:
        check_source(flags, "graph")
        return Chosen("graph", of_bytes(demo_model()), None)
    folder = local_folder(flags.model, {})
    if is_stock(folder):
        return _of_stock(flags, folder)
    if flags.source == "weights":
        return Chosen("weights", None, folder)
    reader = load_reader(folder, flags.tokenizer)
    why = _no_graph(reader, flags) if flags.source in (None, "graph") else ""
    if flags.source is not None:
        return Chosen(flags.source, reader, folder, why)
    if not why:
        check_source(flags, "graph")
        return Chosen("graph", reader, folder)
    try:
        check_source(flags, "attribution")
    except ValueError as error:
        raise ValueError(f"{error} {flags.model}: {why}, so that it is shown --from attribution.") from error
    return Chosen("attribution", reader, folder, why)


def newest_of(folder: Path | None) -> list[str]:
    """Returns what is to be said where a folder holds several runs or checkpoints, of which one is shown."""
    if folder is None or is_stock(folder) or is_converted(folder):
        return []
    inside = find_model(folder).relative_to(folder)
    return [] if str(inside) in (".", "model") else [f"it is the newest model in the folder, {inside}"]


def text_of(flags: argparse.Namespace, reader: Reader) -> bytes | None:
    """Returns the text to run; `None` for examples of the model's own run."""
    if flags.text is not None:
        return flags.text.encode()
    if flags.text_file is not None:
        return Path(flags.text_file).read_bytes()
    return None if reader.has_data else bytes(load_corpus(PYTHON_DOCS).validation.tolist())


def named(flags: argparse.Namespace, reader: Reader) -> str:
    """Returns what a title calls the text that is run."""
    if flags.text is not None:
        return quoted(flags.text)
    if flags.text_file is not None:
        return Path(flags.text_file).name
    return "its run's examples" if reader.has_data else "Python's documentation"


def quoted(text: str) -> str:
    """Returns a text between quotation marks, its beginning where it is long.

    Example:
        >>> quoted("heads talk"), len(quoted("heads" * 99))
        ('“heads talk”', 42)
    """
    return f"“{text if len(text) <= SHOWN else text[: SHOWN - 1] + '…'}”"


def length_of(flags: argparse.Namespace, reader: Reader) -> int:
    """Returns the tokens of a window; `ValueError` where the model does not read so many."""
    if flags.length is None:
        return min(LENGTH, reader.longest or LENGTH)
    if reader.longest is not None and flags.length > reader.longest:
        raise ValueError(
            f"Expected --length up to the model's max_length {reader.longest} (got {flags.length}). Do lower it."
        )
    return flags.length


def recorded(
    reader: Reader, model: torch.nn.Module, batches: list[Batch], every_token: bool = False, attention: bool = False
) -> Recordings:  # fmt: skip
    """Returns what every head graph of a model did on batches, and what its heads attended to there if asked.

    `record` refuses a model without either. Tokens are named where they are of one text.
    """
    strings = reader.strings(batches[0]) if every_token else None
    recording = record(model, every_token=every_token, token_strings=strings, attention=attention)
    with recording as heads, torch.inference_mode():
        for batch in batches:
            reader.loss(model, batch)
    return heads


def attended(reader: Reader, inputs: Inputs) -> Recordings:
    """Returns what a model's heads attend to on one batch."""
    tokens = inputs.get("input_ids")
    is_text = tokens is not None and len(tokens) == 1 and reader.strings_known
    strings = reader.tokens.strings(tokens[0]) if tokens is not None and is_text else None
    with record(reader.model, attention=True, token_strings=strings) as heads, torch.inference_mode():
        reader.model(**inputs)
    return heads


def task_of(flags: argparse.Namespace, reader: Reader) -> Task:
    """Returns the one text that the model reads, all its tokens, and what is to be attributed to."""
    text, length = text_of(flags, reader), length_of(flags, reader)
    if flags.text is None and text is not None and flags.text_file is None:
        text = text[: BYTES_A_TOKEN * length]
    return reader.task(text, length, flags.target)


def said_of_cut(flags: argparse.Namespace, reader: Reader, task: Task) -> list[str]:
    """Returns what is to be said where the model reads less than the text that it is given."""
    text = None if flags.text is None and flags.text_file is None else text_of(flags, reader)
    whole = 0 if text is None else len(reader.tokens.known(text)[0])
    return [f"the first {task.words} of the text's {whole} tokens are read"] if task.words < whole else []


def attributed(flags: argparse.Namespace, reader: Reader, name: str) -> Network:
    """Returns the network of a model by attribution."""
    task = task_of(flags, reader)
    against = flags.against or "zero"
    said_against, metric = against, task.metric
    if against in WORDS:
        other = against
    elif not task.words:
        raise ValueError(f"Expected --against mean or zero for examples of a run (got {against}). Do change it.")
    else:
        file = Path(against)
        other = reader.other(file.read_bytes() if file.is_file() else against.encode(), task)
        said_against = file.name if file.is_file() else quoted(against)
        metric = reader.metric_beside(task, other)
    learned = not flags.no_learned
    network = attribution_graph(reader.model, task.inputs, against=other, metric=metric, learned=learned)
    tokens = next(iter(task.inputs.values()))
    count = f"{tokens.shape[1]} tokens" if tokens.dim() == 2 and len(tokens) == 1 else f"{len(tokens)} examples"
    said = f"{name}: attribution to {task.said}, {count} of {named(flags, reader)} against {said_against}"
    return Network(network, said, (*said_of_cut(flags, reader, task), *task.notes), task.inputs)


def of_weights(folder: Path, name: str, learned: bool = True) -> Network:
    """Returns the network of a model by its weights alone."""
    if is_stock(folder):
        network = composition_graph(folder)
    else:
        model = load_converted(folder) if is_converted(folder) else load_own_model(folder)
        network = composition_graph(model, learned=learned)
    return Network(network, f"{name}: composition of weights, in [0, 1]")


def _of_stock(flags: argparse.Namespace, folder: Path) -> Chosen:
    if flags.source == "graph":
        raise ValueError(
            f"Expected --from weights or attribution for {flags.model} (got graph: it has none). Do leave --from out."
        )
    if flags.no_learned:
        raise ValueError(f"Expected --no-learned with head graphs (got {flags.model}, which has none). Do drop it.")
    kind, no_graph = stock_class(folder), "it has no head graph"
    if flags.source == "weights":
        check_source(flags, "weights")
        return Chosen("weights", None, folder)
    if flags.source is None and kind_in(folder) is None:
        try:
            check_source(flags, "weights")
        except ValueError as error:
            why = f"{kind} is not given one text, so that its weights alone are shown"
            raise ValueError(f"{error} {flags.model}: {why}.") from error
        return Chosen("weights", None, folder, f"{no_graph}, and {kind} is not given one text")
    check_source(flags, "attribution")
    try:
        reader = load_reader(folder, flags.tokenizer)
    except NoTokenizerError:
        wanted = (flags.source, flags.text, flags.text_file, flags.against, flags.target, flags.tokenizer)
        if flags.attention or any(flag is not None for flag in wanted):
            raise
        return Chosen("weights", None, folder, f"{no_graph}, and no tokenizer to read a text with")
    return Chosen("attribution", reader, folder, "" if flags.source else no_graph)


def _no_graph(reader: Reader, flags: argparse.Namespace) -> str:
    """Why a model's own graph shows nothing, "" where it does."""
    if not recordable(reader.model)[0]:
        return "it has no head graph"
    text = None if reader.has_data else b"heads talk to heads, and some of them listen"
    heads = recorded(reader, reader.model, reader.batches(text, min(8, length_of(flags, reader)), 1))
    if any(bool(one.mean.any() or one.std.any()) for one in heads.values()):
        return ""
    return "its head graph is untrained, every weight is 0"
