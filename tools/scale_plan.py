"""Plans head graphs past this machine: what they add to a model on a cluster, by topology.

    python tools/scale_plan.py --heads 32 --layers 32 --d-model 4096 --tensor 8 --data 16 --fsdp
    python tools/scale_plan.py --topologies ring groups --in-degree 4 --site both --router --tensor 4 --pipeline 2
    torchrun --nproc-per-node 2 -- tools/scale_plan.py --count --heads 8 --layers 2 --d-model 64 --length 64 --tensor 2

Bytes are what one rank sends in a step, by ring algorithms; times are those of a step where nothing overlaps, so the
overhead is an upper end. Nothing is measured here: give the speeds your cluster reaches. With --count, ranks that
torchrun has started run a step of the model itself and count what they send, beside what the plan says.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from planning.cost import Cluster, Cost, Workload, graph_cost, plain_cost
from planning.counting import count_step

from gohgraph import HeadGraphConfig, RoutingConfig, SiteConfig
from gohgraph.common.checks import check_number
from gohgraph.common.command_line import ArgumentParser, run
from gohgraph.common.files import write_text_whole
from gohgraph.common.tables import markdown_table
from gohgraph.graphs.topologies import TOPOLOGIES
from gohgraph.parallel import ParallelConfig, process_group

HEAD = ("head graph", "parameters", "FLOPs", "tensor MB", "pipeline MB", "data MB", "step [ms]", "overhead")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    return run(_parser(), plan, argv)


def plan(flags: argparse.Namespace) -> None:
    """Prints the table, and writes it as JSON where it is asked to."""
    model = Workload(
        flags.heads, flags.layers, flags.d_model, flags.d_ff or 4 * flags.d_model, flags.vocabulary, flags.length,
        flags.batch_size, flags.bytes,
    )  # fmt: skip
    cluster = Cluster(
        flags.tensor, flags.pipeline, flags.data, flags.fsdp, flags.tflops, flags.tensor_bandwidth,
        flags.pipeline_bandwidth, flags.data_bandwidth,
    )  # fmt: skip
    _check(model, cluster)
    if flags.count:
        with process_group("cpu"):
            count(model, cluster, flags)
        return
    plain = plain_cost(model, cluster)
    costs = {name: graph_cost(_graphs(name, flags), model, cluster) for name in flags.topologies}
    rows = [_row(name, cost, plain, cluster, model) for name, cost in {"none": plain, **costs}.items()]
    print(_title(model, cluster) + "\n")
    print(markdown_table([HEAD, *rows]))
    print("\nAll but the first line: what is added. Bytes are sent by one rank in a step; nothing overlaps.")
    if flags.json:
        found = {"none": plain, **costs}
        numbers = {name: vars(cost) | {"seconds": cost.seconds(cluster)} for name, cost in found.items()}
        document = {"model": vars(model), "cluster": vars(cluster), "costs": numbers}
        write_text_whole(flags.json, json.dumps(document, indent=2))


def count(model: Workload, cluster: Cluster, flags: argparse.Namespace) -> None:
    """Prints counted bytes beside the plan's; every rank runs the steps."""
    ranks = cluster.tensor * cluster.data
    started = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 0
    if started != ranks:
        raise ValueError(
            f"Expected {ranks} ranks for --count (got {started}). Do run torchrun --nproc-per-node {ranks}."
        )
    if cluster.pipeline > 1:
        raise ValueError(f"Expected no pipeline to count (got --pipeline {cluster.pipeline}). Do drop it.")
    if cluster.data > 1 and not cluster.is_sharded:
        raise ValueError(f"Expected --fsdp to count (got --data {cluster.data} without it). Do add --fsdp.")
    torch.set_num_threads(1)
    modes = ("tp",) * (cluster.tensor > 1) + ("fsdp",) * (cluster.data > 1)
    parallel = ParallelConfig(modes or ("tp",), cluster.tensor if cluster.tensor > 1 else None)
    plain, rows = count_step(None, model, parallel), []
    for name in flags.topologies:
        graphs = _graphs(name, flags)
        cost, costs_of = graph_cost(graphs, model, cluster), count_step(graphs, model, parallel)
        added, planned = costs_of - plain, cost.tensor_bytes + cost.data_bytes
        apart = f"{100 * (planned / added - 1):+.1f} %" if added else "equal" if not planned else "-"
        rows.append([name, f"{added:,}", f"{planned:,.0f}", apart, f"{100 * added / plain:.1f} %"])
    if torch.distributed.get_rank() == 0:
        print(_title(model, cluster) + f"; plain: {plain:,} bytes\n")
        print(markdown_table([("head graph", "bytes counted", "planned", "apart", "of plain's"), *rows]))


def _graphs(name: str, flags: argparse.Namespace) -> HeadGraphConfig:
    options: dict[str, Any] = {}
    if name in ("ring", "random") and flags.in_degree is not None:
        options = {"hops" if name == "ring" else "in_degree": flags.in_degree - 1}
    if name == "groups":
        options = {"ranks": max(2, flags.tensor)}
    site = SiteConfig(name, options, edges=flags.edges, rank=flags.rank, rounds=flags.rounds)
    sites = {"outputs": (site, None), "scores": (None, site), "both": (site, site)}[flags.site]
    shared = flags.heads // 4
    routing = RoutingConfig(shared, flags.heads // 2) if flags.router else None
    return HeadGraphConfig(*sites, routing)


def _row(name: str, cost: Cost, plain: Cost, cluster: Cluster, model: Workload) -> list[str]:
    seconds, base = cost.seconds(cluster), plain.seconds(cluster)
    share = "-" if cost is plain else f"{100 * seconds / base:.2f} %"
    sent = (cost.tensor_bytes, cost.pipeline_bytes, cost.data_bytes)
    of_all = "" if cost is plain else f" ({100 * cost.parameters / model.parameters:.2f} %)"
    return [
        name, f"{cost.parameters / 1e6:,.2f} M{of_all}", f"{cost.flops:.2e}", *(f"{part / 1e6:,.1f}" for part in sent),
        f"{1e3 * seconds:,.2f}", share,
    ]  # fmt: skip


def _title(model: Workload, cluster: Cluster) -> str:
    kind = "FSDP" if cluster.is_sharded else "DDP"
    return (
        f"{model.num_layers} layers of {model.num_heads} heads, d_model {model.d_model}, {model.tokens:,} tokens "
        f"a step and data-parallel rank; TP {cluster.tensor}, PP {cluster.pipeline}, {kind} {cluster.data}; "
        f"{cluster.tflops:g} TFLOPS, links of {cluster.tensor_gigabytes:g} / {cluster.pipeline_gigabytes:g} / "
        f"{cluster.data_gigabytes:g} GB/s"
    )


def _check(model: Workload, cluster: Cluster) -> None:
    for name, value in {**vars(model), **vars(cluster)}.items():
        if not isinstance(value, bool):
            check_number(name, value, above=0)
    for size, by in (("d_model", model.num_heads), ("num_heads", cluster.tensor), ("num_layers", cluster.pipeline)):
        value = getattr(model, size)
        if value % by:
            raise ValueError(f"Expected {size} to be a multiple of {by} (got {value}). Do change either.")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    model = parser.add_argument_group("model").add_argument
    model("--heads", type=int, default=32, help="heads of a layer")
    model("--layers", type=int, default=32, help="layers")
    model("--d-model", type=int, default=4096, help="width")
    model("--d-ff", type=int, help="inner width of the feed-forward, 4 times d_model without it")
    model("--vocabulary", type=int, default=32_000, help="token ids")
    model("--length", type=int, default=4096, help="tokens of a sequence")
    model("--batch-size", type=int, default=4, help="sequences a step on each data-parallel rank")
    model("--bytes", type=float, default=2, help="of an activation and a gradient")
    graph = parser.add_argument_group("head graph").add_argument
    graph("--topologies", nargs="+", choices=sorted(TOPOLOGIES), default=sorted(TOPOLOGIES), help="a line each")
    graph("--site", choices=("outputs", "scores", "both"), default="outputs", help="where heads send messages")
    graph("--in-degree", type=int, help="senders of each head, itself included (ring: 2, random: 3 without it)")
    graph("--edges", choices=("token", "static", "frozen"), default="token", help="how edges are weighted")
    graph("--rank", type=int, help="low rank of token edges, full without it")
    graph("--rounds", type=int, default=1, help="rounds of messages")
    graph("--router", action="store_true", help="with Mixture-of-Head routing")
    ranks = parser.add_argument_group("cluster").add_argument
    ranks("--tensor", type=int, default=1, help="tensor-parallel ranks")
    ranks("--pipeline", type=int, default=1, help="pipeline-parallel ranks")
    ranks("--data", type=int, default=1, help="data-parallel ranks")
    ranks("--fsdp", action="store_true", help="data-parallel ranks shard parameters")
    ranks("--tflops", type=float, default=400, help="that a rank reaches in training")
    ranks("--tensor-bandwidth", type=float, default=400, help="GB/s that a rank sends to its tensor-parallel peers")
    ranks("--pipeline-bandwidth", type=float, default=50, help="GB/s to the next pipeline rank")
    ranks("--data-bandwidth", type=float, default=50, help="GB/s to its data-parallel peers")
    parser.add_argument("--count", action="store_true", help="count on the ranks that torchrun has started")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
