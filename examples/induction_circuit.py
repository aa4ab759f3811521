"""The induction circuit of a pretrained language model, and how much of the behaviour it carries.

    python examples/induction_circuit.py SmolLM2-135M --out runs/induction

Random tokens that come twice are compared with another first half: which head of the model reads which, so that it can
tell what comes next? It prints the strongest edges beside what kind of heads they join, the faithfulness of the
strongest edges on other examples beside composition scores and random edges, what is lost without the first
previous-token head, and draws the network. The model is any decoder of transformers, in a folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

import gohgraph as goh
from gohgraph.analysis.faithfulness import Circuit, Faithfulness
from gohgraph.analysis.prompts import Task, repeated_tokens
from gohgraph.common.checks import check_int
from gohgraph.common.command_line import ArgumentParser, run
from gohgraph.common.files import write_whole
from gohgraph.common.hub import local_folder

SHOWN = 12


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    return run(_parser(), study, argv)


def study(flags: argparse.Namespace) -> None:
    """Finds the circuit, measures it on other examples, and writes what was found."""
    for name in ("examples", "length", "steps", "threads"):
        check_int(f"--{name}", getattr(flags, name), low=2 if name == "length" else 1)
    torch.set_num_threads(flags.threads)
    from transformers import AutoModelForCausalLM

    options = {} if flags.gguf is None else {"gguf_file": flags.gguf}
    folder = local_folder(flags.model, {})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    model.eval().requires_grad_(False)
    vocabulary = model.config.vocab_size
    shape = {"length": flags.length, "examples": flags.examples, "first": min(1000, vocabulary // 2)}
    found, held_out = (repeated_tokens(vocabulary, **shape, seed=seed) for seed in (0, 1))
    flags.out.mkdir(parents=True, exist_ok=True)
    start, cpu = time.perf_counter(), time.process_time()
    network = goh.attribution_graph(model, **found._asdict(), steps=flags.steps)
    took = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    title = f"{Path(flags.model).resolve().name}: attribution of edges, random tokens that come twice"
    drawn = network if flags.layers is None else _of_layers(network, *flags.layers)
    goh.draw_network(drawn, flags.out / "circuit.png", title=title, threshold=0.03, limit=flags.limit)
    took |= {"drawn_seconds": time.perf_counter() - start, "drawn_cpu_seconds": time.process_time() - cpu}
    print(
        f"{network.num_edges:,} edges in {took['seconds']:.1f} s ({took['cpu_seconds']:.1f} s of CPU), drawn after "
        f"{took['drawn_seconds']:.1f} s ({took['drawn_cpu_seconds']:.1f} s of CPU)\n"
    )
    network = goh.label_heads(model, network)
    print(_strongest(network))
    goh.save_head_graph(network, flags.out / "circuit.json")
    beside = {"composition": goh.composition_graph(model)}
    measured = goh.faithfulness(model, network, **held_out._asdict(), beside=beside, random=flags.random)
    print(f"\n{measured.table()}")
    goh.draw_faithfulness(measured, flags.out / "faithfulness.png")
    if flags.page:
        with torch.no_grad(), goh.record(model, attention=True) as heads:
            model(found.inputs)
        goh.save_page(network, flags.out / "circuit.html", title=title, patterns=heads, faithfulness=measured)
    lost = _without(model, network, held_out)
    print(
        f"\nfall of the log probability ({lost['metric']:.3f} nats, {lost['all']:.3f} without any edge): without the "
        f"first previous-token head {lost['head']} {lost['first']:.3f}, without another, mean of {len(lost['of'])} "
        f"drawn, {lost['random']:.3f}"
    )
    results = {"took": took, "faithfulness": _numbers(measured), "ablation": lost}
    write_whole(flags.out / "results.json", lambda path: path.write_text(json.dumps(results, indent=1)))


def _of_layers(network: goh.HeadNetwork, first: int, last: int) -> goh.HeadNetwork:
    kept = [node for node, layer in enumerate(network.layer.tolist()) if first <= layer <= last]
    return goh.HeadNetwork.from_networkx(network.to_networkx().subgraph(kept))


def _strongest(network: goh.HeadNetwork) -> str:
    """The strongest edges, and the known kind of head of their senders."""
    lines = [f"{'edge':<18} {'site':<8} {'attribution':>11}   sender: previous  induction  first"]
    for edge in network.strongest(SHOWN):
        node = network.label.index(edge["sender"])
        scores = (network[name][node].item() for name in ("previous_token", "induction", "first_token"))
        numbers = "  ".join(f"{score:>8.2f}" for score in scores)
        ends = f"{edge['sender']} -> {edge['receiver']}"
        lines.append(f"{ends:<18} {edge['site']:<8} {edge['mean']:>+11.3f}           {numbers}")
    return "\n".join(lines)


def _numbers(measured: Faithfulness) -> dict:
    return {
        name: {"f": measured.curve(name), "cpr": measured.cpr(name), "cmd": measured.cmd(name)}
        for name in measured.values
    } | {"shares": list(measured.shares)}


def _without(model: torch.nn.Module, network: goh.HeadNetwork, task: Task) -> dict:
    """The fall of the metric without the edges of a head: the first previous-token head, and others."""
    circuit = Circuit(model, network, task.inputs, task.against, task.metric)
    sends = network.edge_index[0].unique().tolist()
    first = max(sends, key=lambda node: network.previous_token[node].item())
    others = [node for node in sends if node != first]
    drawn = [others[i] for i in torch.randperm(len(others), generator=torch.Generator().manual_seed(0))[:4].tolist()]

    def fall(node: int) -> float:
        return (circuit.everything - circuit.value(network.edge_index[0] != node)).mean().item()

    falls = [fall(node) for node in drawn]
    nothing = circuit.value(torch.zeros(network.num_edges, dtype=torch.bool))
    return {
        "head": network.label[first], "first": fall(first), "random": sum(falls) / len(falls), "of": falls,
        "all": (circuit.everything - nothing).mean().item(), "metric": circuit.everything.mean().item(),
    }  # fmt: skip


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("model", help="folder of a decoder of transformers")
    add("--gguf", metavar="FILE", help="name of a GGUF file in the folder to load (needs the package gguf)")
    add("--out", type=Path, default=Path("runs/induction"), help="folder to write to (default: %(default)s)")
    add("--examples", type=int, default=20, help="examples to find the circuit on, as many to measure it (%(default)s)")
    add("--length", type=int, default=12, help="random tokens of an example, which come twice (%(default)s)")
    add("--steps", type=int, default=1, help="points between both inputs where slopes are taken (default: %(default)s)")
    add("--random", type=int, default=1, help="random orders of edges beside (%(default)s)")
    add("--layers", type=int, nargs=2, metavar=("FIRST", "LAST"), help="draw these layers alone")
    add("--limit", type=float, help="end of the picture's colour range")
    add("--page", action="store_true", help="also an interactive page, the curve under it (extra interactive)")
    add("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
