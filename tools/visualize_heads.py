"""Draw the learned head graphs of a checkpoint: mean edge weights over a text, one circle of heads per layer and site.

python tools/visualize_heads.py runs/demo/goh --out heads.svg
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from gohgraph import LanguageModel, draw, record
from gohgraph.command_line import ArgumentParser, run
from gohgraph.drawing import graph_titles
from gohgraph.learning.corpus import PYTHON_DOCS, load_corpus
from gohgraph.record import Recording

BATCH = 8
STRONGEST = 5


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    return run(_parser(), visualize, argv)


def visualize(flags: argparse.Namespace) -> None:
    """Records the checkpoint's head graphs over the text, draws them and prints the strongest edges."""
    torch.set_num_threads(_positive("--threads", flags.threads))
    folder = _checkpoint(Path(flags.checkpoint))
    model = LanguageModel.from_pretrained(folder).eval()
    sequences = _sequences(model, _text(flags.text), flags.tokens, flags.length)
    heads = _recorded(model, sequences)
    name, tokens = Path(flags.checkpoint).resolve().name, sum(map(torch.numel, sequences))
    title = f"{name}: mean edge weights over {tokens:,} tokens"
    draw(heads, flags.out, title=title if flags.title is None else flags.title)
    print(f"picture: {flags.out}")
    print(f"strongest edges of {folder}:")
    print("\n".join(_strongest(heads)))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a folder written by save_pretrained, or a run folder with such folders")
    parser.add_argument("--text", help="a file, or words in quotes (default: the built-in corpus, validation part)")
    parser.add_argument("--out", default="heads.svg", help="the picture, .svg, .png or .pdf (default: %(default)s)")
    parser.add_argument("--title", help="a line above the picture; '' for none (default: checkpoint and tokens)")
    parser.add_argument("--tokens", type=int, default=4096, help="bytes of the text to run (default: %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="bytes per sequence (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    return parser


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"Expected {name} of at least 1 (got {value}). Do pass a positive number.")
    return value


def _checkpoint(folder: Path) -> Path:
    """The folder itself, or the checkpoint with head graphs written last in a run folder; the loader refuses others."""
    if (folder / "model.safetensors").is_file():
        return folder
    found = [path for depth in ("*", "*/*", "*/*/*") for path in folder.glob(f"{depth}/model.safetensors")]
    # A comparison's folder holds plain models too: nothing is to be drawn of those.
    return max(found, key=lambda path: (_has_graph(path.parent), path.stat().st_mtime)).parent if found else folder


def _has_graph(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]["head_graph"])
    # Checkpoints of the training state have no such file, and a damaged one is the loader's to name.
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _text(source: str | None) -> torch.Tensor:
    """The bytes to run, uint8 `[N]`."""
    if source is None:
        return load_corpus(PYTHON_DOCS).validation
    if len(source.split()) > 1:
        data = source.encode()
    elif Path(source).is_file():
        data = Path(source).read_bytes()
    else:
        # One word is taken for a file name: a mistyped path must not become the text.
        raise ValueError(f"Expected --text to be a file or several words (got {source!r}). Do check the path.")
    if not data:
        raise ValueError(f"Expected a text of at least one byte (got {source}, empty). Do pass another file.")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _sequences(model: LanguageModel, text: torch.Tensor, tokens: int, length: int) -> list[torch.Tensor]:
    """Batches `[B, T]` of the text's first bytes; the last one may be shorter."""
    text = text[: _positive("--tokens", tokens)].long()
    config = model.config
    if config.vocab_size < 256:
        raise ValueError(
            f"Expected a byte-level model (got a vocabulary of {config.vocab_size}). Do pass one of at least 256."
        )
    if _positive("--length", length) > config.max_length and config.positions == "learned":
        raise ValueError(
            f"Expected --length of at most the model's max_length {config.max_length} (got {length}). Do lower it."
        )
    whole = len(text) // length * length
    batches = list(text[:whole].view(-1, length).split(BATCH)) if whole else []  # each [B, T]
    return batches + ([text[None, whole:]] if whole < len(text) else [])


def _recorded(model: LanguageModel, sequences: list[torch.Tensor]) -> dict[str, Recording]:
    """What every head graph did; `record` refuses a model without one."""
    with record(model) as heads, torch.inference_mode():
        for tokens in sequences:
            model(tokens)
    return heads


def _strongest(heads: dict[str, Recording]) -> list[str]:
    """One line for each of the strongest edges of all graphs: where, j -> i, signed mean and standard deviation."""
    edges = [
        (mean, std, title, j, i, number, recording)
        for title, recording in zip(graph_titles(list(heads)), heads.values(), strict=True)
        for number, (means, stds) in enumerate(zip(recording.mean.tolist(), recording.std.tolist(), strict=True))
        for j, i, mean, std in zip(*recording.edge_index.tolist(), means, stds, strict=True)
    ]
    lines = []
    for mean, std, title, j, i, number, recording in sorted(edges, key=lambda edge: -abs(edge[0]))[:STRONGEST]:
        before, head = divmod(j, recording.num_heads)
        sender = f"{head}" if before == 0 else f"{head} ({before} before)"
        rounds = f" round {number + 1}" if len(recording.mean) > 1 else ""
        lines.append(f"  {title}{rounds}: {sender} -> {i}  mean {mean:+.4f}  sd {std:.4f}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
