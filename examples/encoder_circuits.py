"""Which edges of an encoder tell one input from another, and how few of them carry it.

    python examples/encoder_circuits.py all-MiniLM-L6-v2 --out runs/minilm
    python examples/encoder_circuits.py dinov2-small --pictures china.jpg flower.jpg --out runs/dinov2

Sentences that differ in one word are compared, or crops of two pictures. The metric is how far the embedding has come
from the other input's to this one's: of texts the mean over tokens, of pictures the first token. Nodes are heads,
feed-forwards, the embedding and the end of the stream, so that nothing of the other input is left without any edge. It
prints the strongest edges and, on other sentences or crops, the faithfulness of the strongest beside random edges, and
draws the network. The model is any encoder of transformers, in a folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gohgraph as goh
from gohgraph.analysis.metrics import embedding_share
from gohgraph.analysis.prompts import Task
from gohgraph.analysis.unit_network import OTHERS
from gohgraph.common.checks import check_int
from gohgraph.common.command_line import ArgumentParser, run
from gohgraph.common.files import write_whole
from gohgraph.common.hub import local_folder

# The first half finds the circuit, the other measures it.
SENTENCES = (
    "The {} waited near the old bridge.", "A photo of a {} in the rain.",
    "She wrote a long letter about her {}.", "Nobody knew why the {} had left the town.",
)  # fmt: skip
WORDS = (
    ("dog", "cat"), ("king", "farmer"), ("teacher", "soldier"), ("horse", "ship"), ("river", "garden"),
    ("doctor", "singer"), ("train", "piano"), ("mountain", "window"), ("father", "pilot"), ("lion", "rabbit"),
)  # fmt: skip
# Mean and standard deviation of colours that models of pictures are trained with (ImageNet's).
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHOWN, CROP = 10, 0.5


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    return run(_parser(), study, argv)


def study(flags: argparse.Namespace) -> None:
    """Finds the circuit, measures it on other examples, and writes what was found."""
    for name in ("examples", "size", "threads"):
        check_int(f"--{name}", getattr(flags, name), low=1)
    torch.set_num_threads(flags.threads)
    from transformers import AutoModel

    flags.model = local_folder(flags.model, {})
    model = AutoModel.from_pretrained(flags.model, dtype=torch.float32).eval().requires_grad_(False)
    found, held_out = (
        _pictures(model, flags, seed) if flags.pictures else _sentences(model, flags, seed) for seed in (0, 1)
    )
    cpu = time.process_time()
    network = goh.attribution_graph(model, **found._asdict(), nodes=OTHERS)
    took = time.process_time() - cpu
    print(f"{network.num_edges:,} edges of {network.num_nodes} nodes in {took:.1f} s of CPU\n")
    for edge in network.strongest(SHOWN):
        print(f"{edge['sender']:>9} -> {edge['receiver']:<6} {edge['site']:<8} {edge['mean']:+.4f}")
    flags.out.mkdir(parents=True, exist_ok=True)
    goh.save_head_graph(network, flags.out / "circuit.json")
    name = Path(flags.model).resolve().name
    goh.draw_network(
        network, flags.out / "circuit.png", title=f"{name}: attribution of edges", threshold=flags.threshold
    )
    measured = goh.faithfulness(model, network, **held_out._asdict(), random=flags.random)
    print(f"\n{measured.table()}")
    goh.draw_faithfulness(measured, flags.out / "faithfulness.png")
    numbers = {
        order: {"f": measured.curve(order), "cpr": measured.cpr(order), "cmd": measured.cmd(order)}
        for order in measured.values
    }
    results = {"cpu_seconds": took, "shares": measured.shares, "faithfulness": numbers}
    write_whole(flags.out / "results.json", lambda path: path.write_text(json.dumps(results, indent=1)))


def _task(model: nn.Module, inputs: Any, against: Any, pool: Callable[[Any], Tensor]) -> Task:
    with torch.no_grad():
        own, other = (pool(model(**batch)) for batch in (inputs, against))  # [B, M]
    return Task(inputs, against, embedding_share(own, other, pool))


def _sentences(model: nn.Module, flags: argparse.Namespace, seed: int) -> Task:
    """Sentences with one word of each pair, against the other; pairs of other numbers of tokens are left out."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(flags.model)
    half = SENTENCES[:2] if seed == 0 else SENTENCES[2:]
    texts = [(text.format(one), text.format(other)) for text in half for one, other in WORDS]
    same = [pair for pair in texts if len({len(tokenizer(text)["input_ids"]) for text in pair}) == 1][: flags.examples]
    if not same:
        raise ValueError(
            "Expected sentences of as many tokens (got none of this tokenizer). Do pass a model of English."
        )
    batches = [tokenizer(list(side), padding=True, return_tensors="pt") for side in zip(*same, strict=True)]
    mask = batches[0]["attention_mask"].unsqueeze(-1)  # [B, T, 1]
    pool = lambda output: (output.last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1)  # noqa: E731
    return _task(model, dict(batches[0]), dict(batches[1]), pool)


def _pictures(model: nn.Module, flags: argparse.Namespace, seed: int) -> Task:
    """Crops of one picture, against crops of the other."""
    generator = torch.Generator().manual_seed(seed)
    inputs, against = ({"pixel_values": _crops(path, flags, generator)} for path in flags.pictures)
    return _task(model, inputs, against, lambda output: output.last_hidden_state[:, 0])


def _crops(path: Path, flags: argparse.Namespace, generator: torch.Generator) -> Tensor:
    """Squares of half the shorter side anywhere in a picture, `[B, 3, S, S]`."""
    import numpy
    from PIL import Image

    picture, crops = Image.open(path).convert("RGB"), []
    side = int(min(picture.size) * CROP)
    for x, y in torch.rand(flags.examples, 2, generator=generator).tolist():
        left, top = int(x * (picture.width - side)), int(y * (picture.height - side))
        crop = picture.crop((left, top, left + side, top + side)).resize((flags.size, flags.size))
        crops.append(torch.from_numpy(numpy.array(crop)).permute(2, 0, 1) / 255)  # [3, S, S]
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    return (torch.stack(crops) - mean) / deviation


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("model", help="folder of an encoder of transformers")
    add("--pictures", type=Path, nargs=2, metavar=("OWN", "OTHER"), help="crops of these instead of sentences")
    add("--size", type=int, default=224, help="pixels of a crop's side (default: %(default)s)")
    add("--out", type=Path, default=Path("runs/encoder"), help="folder to write to (default: %(default)s)")
    add("--examples", type=int, default=20, help="at most, to find the circuit, as many to measure it (%(default)s)")
    add("--random", type=int, default=1, help="random orders of edges beside (%(default)s)")
    add("--threshold", type=float, default=0.01, help="edges of less are not drawn (default: %(default)s)")
    add("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
