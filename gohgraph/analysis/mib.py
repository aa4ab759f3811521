"""A circuit as the JSON that the Mechanistic Interpretability Benchmark reads."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from gohgraph.analysis.faithfulness import strongest_share
from gohgraph.analysis.module_names import block_of
from gohgraph.analysis.unit_network import OTHERS
from gohgraph.common.checks import check_probability
from gohgraph.common.files import checked_path, write_whole

if TYPE_CHECKING:
    from gohgraph.analysis.network import HeadNetwork

LETTERS = {"queries": "<q>", "keys": "<k>", "values": "<v>"}


def save_mib_circuit(network: HeadNetwork, path: str | os.PathLike[str], *, share: float) -> None:
    """Writes a circuit as MIB's JSON: nodes "input", "a0.h1", "m0", "logits", and edges "a0.h1->a1.h0<q>" and so on.

    An edge to a key/value head of a group stands at every query head of it. Every edge has its score; those of the
    share of largest |mean| are in the circuit.

    Source: the format of EAP-IG's `Graph.to_json`, which MIB takes (Mueller et al. 2025, arXiv 2504.13151).

    Args:
        network: of `attribution_graph` with `nodes=("embedding", "mlp", "logits")`, of a decoder.
        path: a file that ends in .json.
        share: of edges in the circuit.
    """
    file = checked_path(path, (".json",))
    check_probability("share", share)
    if missing := [kind for kind in OTHERS if network.kind.count(kind) < 1] or "encoder" in " ".join(network.block):
        raise ValueError(
            f"Expected a decoder's network with the nodes {', '.join(OTHERS)} (got {missing or network.blocks}). Do "
            "pass them to attribution_graph."
        )
    if learned := sorted({graph for graph in network.graph if block_of(graph) != graph}):
        raise ValueError(
            f"Expected edges of the residual stream alone (got those of {len(learned)} head graphs, {learned[0]} the "
            "first). Do pass learned=False to attribution_graph."
        )
    heads = max(head for head, kind in zip(network.head.tolist(), network.kind, strict=True) if kind == "head") + 1
    groups = max((h for h, k in zip(network.head.tolist(), network.kind, strict=True) if k == "key/value"), default=-1)
    size = heads // (groups + 1) if groups >= 0 else 1
    names = [_names(network, node, size) for node in range(network.num_nodes)]
    kept, edges = strongest_share(network.mean.abs(), share).tolist(), {}
    for number, (sender, receiver) in enumerate(network.edge_index.T.tolist()):
        value = {"score": network.mean[number].item(), "in_graph": kept[number]}
        for name in names[receiver]:
            edges[f"{names[sender][0]}->{name}{LETTERS.get(network.site[number], '')}"] = value
    known = {name for edge, value in edges.items() if value["in_graph"] for name in edge.split("<")[0].split("->")}
    config = {
        "n_layers": network.kind.count("mlp"), "n_heads": heads,
        "parallel_attn_mlp": not any(edge.startswith("a0.") and edge.endswith("->m0") for edge in edges),
    }  # fmt: skip
    data = {"cfg": config, "nodes": {n: n in known for of in names for n in of}, "edges": edges, "n_pos": None}
    write_whole(file, lambda pending: pending.write_text(json.dumps(data), encoding="utf-8"))


def _names(network: HeadNetwork, node: int, size: int) -> list[str]:
    kind, layer, head = network.kind[node], int(network.layer[node]), int(network.head[node])
    if kind == "key/value":
        return [f"a{layer}.h{number}" for number in range(head * size, (head + 1) * size)]
    return [{"embedding": "input", "logits": "logits", "mlp": f"m{layer}", "head": f"a{layer}.h{head}"}[kind]]
