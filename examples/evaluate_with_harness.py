"""Evaluates a language model with lm-evaluation-harness, on a text of your own.

    python examples/evaluate_with_harness.py runs/first --data my.txt          # pip install 'gohgraph[eval]'

The model is the folder of a run of `train_language_model.py`, of a model that was saved, one of gohgraph's own or a
converted one of transformers, or the name of one on the hub. The task is local: bits per byte of the paragraphs of a
text, by loglikelihood over all of their tokens. Tasks of the harness by name (`--tasks lambada_openai`) take the same
way; they are downloaded.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import gohgraph as goh
from gohgraph.common.checks import check_int
from gohgraph.common.command_line import ArgumentParser, run
from gohgraph.common.packages import needs
from gohgraph.convert.saving import is_converted
from gohgraph.learning.data.corpus import PYTHON_DOCS

TASK = "paragraphs"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    return run(_parser(), evaluate, argv)


def evaluate(flags: argparse.Namespace) -> None:
    """Evaluates the model and prints the harness's own table."""
    for name in ("documents", "length", "batch_size"):
        check_int(f"--{name.replace('_', '-')}", getattr(flags, name), low=2 if name == "length" else 1)
    with needs("lm-eval", "eval"):
        from lm_eval import simple_evaluate
        from lm_eval.utils import make_table
    tasks = flags.tasks or [paragraphs(flags.data, flags.documents)]
    found = simple_evaluate(harness_model(flags.model, flags.length, flags.batch_size), tasks=tasks, device="cpu")
    print(make_table(found))


def harness_model(name: str, length: int, batch_size: int) -> Any:
    """Returns the model as the harness takes one: what transformers loads, in memory, beside its tokenizer."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = goh.load_converted(name) if is_converted(name) else AutoModelForCausalLM.from_pretrained(name)
    tokenizer = AutoTokenizer.from_pretrained(name)
    settings = {"max_length": length, "batch_size": batch_size, "device": str(model.device)}
    return HFLM(pretrained=model.eval(), tokenizer=tokenizer, backend="causal", **settings)


def paragraphs(data: str, most: int) -> dict[str, Any]:
    """The task: bits per byte of the first paragraphs of a text, each a document of its own.

    Raises:
        ValueError: a text without a paragraph.
    """
    text = _text(data)
    documents = [part.strip() for part in text.split("\n\n") if part.strip()][:most]
    if not documents:
        raise ValueError(f"Expected paragraphs in {data} (got none). Do name another text by --data.")

    def dataset(**_: Any) -> Any:
        from datasets import Dataset

        return {"test": Dataset.from_list([{"text": document} for document in documents])}

    return {
        "task": TASK, "custom_dataset": dataset, "test_split": "test", "output_type": "loglikelihood_rolling",
        "doc_to_text": "", "doc_to_target": "{{text}}", "metric_list": [{"metric": "bits_per_byte"}],
    }  # fmt: skip


def _text(data: str) -> str:
    if data == PYTHON_DOCS:
        from pydoc_data.topics import topics

        return "\n\n".join(topics.values())
    return Path(data).read_text(encoding="utf-8")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("model", help="folder of a run or a model, or a name on the hub")
    add("--data", default=PYTHON_DOCS, help="a text file (default: the documentation inside every CPython)")
    add("--documents", type=int, default=50, help="paragraphs that are read (default %(default)s)")
    add("--length", type=int, default=128, help="most tokens of a window (default %(default)s)")
    add("--batch-size", type=int, default=8, help="windows at once (default %(default)s)")
    add("--tasks", nargs="+", help="tasks of the harness by name, in place of the text")
    return parser


if __name__ == "__main__":
    sys.exit(main())
