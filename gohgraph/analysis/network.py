"""The head graphs of a whole model as one graph: its nodes are the heads of all layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.utils import to_networkx

from gohgraph.analysis.module_names import block_of, block_titles, family_of, layer_of, site_of
from gohgraph.analysis.record import OF_KEYS, head_graphs, record
from gohgraph.analysis.recording import Recording
from gohgraph.analysis.summary import html_of_network
from gohgraph.graphs.cross_layer import layers_read

# What `label_heads` gives heads.
HEAD_SCORES = ("previous_token", "induction", "duplicate_token", "first_token")
NODE_ATTRIBUTES = ("label", "block", "layer", "head", "kind", "load", "importance", *HEAD_SCORES)
EDGE_ATTRIBUTES = ("edge", "graph", "site", "round", "mean", "std", "share", "edge_importance")
# What a network may lack, and NaN where a node or an edge has none.
OPTIONAL = ("importance", "edge_importance", *HEAD_SCORES)
INTEGERS, WORDS = ("layer", "head", "round", "edge"), ("label", "block", "kind", "graph", "site")


class HeadNetwork(Data):
    """All heads and edges of a model in one PyG `Data`, by `head_graph_of`, `composition_graph`, `attribution_graph`.

    Two heads have several edges where several sites or rounds connect them.

    Attributes:
        edge_index: `[2, E]`, senders in row 0; edges of earlier layers' heads cross layers.
        label: of every head, its layer and number: "2.5"; a list, as the other words are.
        block: title of the attention block a head belongs to, e.g. "layer 2".
        layer, head: int64 `[N]`.
        kind: "head"; with a router "shared" or "routed"; "key/value" where these are fewer than the query heads.
        load: share of tokens a head is active for, `[N]`.
        importance: of heads, `[N]`, if it was given.
        previous_token, induction, duplicate_token, first_token: of heads, `[N]`, after `label_heads`.
        edge: number of the edge, `[E]`: files and networkx may order them anew.
        graph: of every edge, the module name of its head graph.
        site: "outputs", "scores", ...
        round: int64 `[E]`, from 1.
        mean, std: of the edge's weight over tokens, `[E]`.
        share: of tokens that use the edge, `[E]`.
        edge_importance: of edges, `[E]`, if it was given.

    Example:
        >>> import gohgraph as goh
        >>> model = goh.LanguageModel(goh.TransformerConfig(9, d_model=8, num_heads=2, num_layers=2, d_ff=8))
        >>> network = goh.composition_graph(model)
        >>> network.blocks, network.num_nodes, len(network.strongest(3))
        (['layer 0', 'layer 1'], 4, 3)
    """

    def to_networkx(self):
        """Returns a `networkx.MultiDiGraph` with all attributes; nodes are 0..N-1."""
        nodes, edges = self.attributes()
        return to_networkx(self, node_attrs=nodes, edge_attrs=edges, to_multi=True)

    @classmethod
    def from_networkx(cls, graph: Any) -> HeadNetwork:
        """Returns the network of a graph that `to_networkx` made, with the attributes it knows, all of them needed."""
        nodes = sorted(graph.nodes(data=True), key=lambda node: int(node[0]))
        place = {node: number for number, (node, _) in enumerate(nodes)}
        edges = [(place[j], place[i], values) for j, i, values in graph.edges(data=True)]
        if all("edge" in values for *_, values in edges):
            edges.sort(key=lambda edge: int(edge[2]["edge"]))
        network = cls(
            edge_index=torch.tensor([edge[:2] for edge in edges], dtype=torch.long).reshape(-1, 2).t().contiguous(),
            num_nodes=len(nodes),
        )
        for names, rows in ((NODE_ATTRIBUTES, [v for _, v in nodes]), (EDGE_ATTRIBUTES, [e[2] for e in edges])):
            for name in names:
                if name in OPTIONAL and not all(name in row for row in rows):
                    continue
                network[name] = _column(name, rows)
        return network

    def _repr_html_(self) -> str:
        return html_of_network(self)

    def only(self, chosen: Tensor) -> HeadNetwork:
        """Returns a network of the same nodes with the edges of a bool mask `[E]` alone.

        Example:
            >>> import gohgraph as goh
            >>> model = goh.LanguageModel(goh.TransformerConfig(9, d_model=8, num_heads=2, num_layers=2, d_ff=8))
            >>> network = goh.composition_graph(model)
            >>> network.only(torch.tensor([site == "keys" for site in network.site])).num_edges
            4
        """
        places, kept = chosen.nonzero().flatten(), copy.copy(self)
        for name in (*self.attributes()[1], *(["by_token"] if "by_token" in self else [])):
            values = self[name]
            kept[name] = values[places] if isinstance(values, Tensor) else [values[place] for place in places.tolist()]
        kept.edge_index = self.edge_index[:, places]
        return kept

    def attributes(self) -> tuple[list[str], list[str]]:
        """Returns the names of the node and of the edge attributes that are there."""
        return [n for n in NODE_ATTRIBUTES if n in self], [n for n in EDGE_ATTRIBUTES if n in self]

    @property
    def blocks(self) -> list[str]:
        """Titles of the attention blocks, in model order."""
        return list(dict.fromkeys(self.block))

    def strongest(self, count: int, by: str = "mean") -> list[dict[str, Any]]:
        """Returns the `count` edges of the largest |mean|, or of the highest other attribute, as dictionaries.
        """
        values = self[by].abs() if by == "mean" else self[by].nan_to_num(-torch.inf)
        names = self.attributes()[1]
        strongest = []
        for edge in values.argsort(descending=True, stable=True)[:count].tolist():
            sender, receiver = (self.label[head] for head in self.edge_index[:, edge])
            columns = {name: self[name][edge] for name in names}
            numbers = {name: v.item() if isinstance(v, Tensor) else v for name, v in columns.items()}
            strongest.append({"sender": sender, "receiver": receiver, **numbers})
        return strongest


def head_graph_of(
    source: nn.Module | Mapping[str, Recording],
    *,
    importance: Mapping[str, Tensor] | None = None,
    edge_importance: Mapping[str, Tensor] | None = None,
) -> HeadNetwork:
    """Returns the head graphs of all layers as one graph, layers x heads, with edges within and across layers.

    Args:
        source: a recording, for means over its tokens; or a model, for the weights its edges have at a context of zero
            (std 0), and the load that balanced routing would give.
        importance: of heads, `[H]` by attention block, as `head_importance` returns it.
        edge_importance: of edges, `[E]` by head graph, as `edge_ablation` and `edge_attribution` return it.

    Raises:
        ValueError: a model without head graphs, or a recording of no token.

    Example:
        >>> import gohgraph as goh
        >>> shape = dict(d_model=8, num_heads=2, num_layers=2, d_ff=8)
        >>> model = goh.LanguageModel(goh.TransformerConfig(9, **shape, head_graph=goh.HeadGraphConfig()))
        >>> network = head_graph_of(model)
        >>> network.num_nodes, network.num_edges, network.label
        (4, 8, ['0.0', '0.1', '1.0', '1.1'])
        >>> network.to_networkx().number_of_edges()
        8
    """
    heads = at_rest(source) if isinstance(source, nn.Module) else source
    if not any(recording.tokens for recording in heads.values()):
        raise ValueError("Expected a recording of at least one token (got none). Do record a forward pass.")
    places = {name: _place(name, recording, heads) for name, recording in heads.items()}
    numbers, nodes = _nodes(heads, places, importance or {})
    columns: dict[str, Any] = {name: [] for name in EDGE_ATTRIBUTES}
    index = []
    for name, recording in heads.items():
        importances = (edge_importance or {}).get(name)
        for number in range(len(recording.mean)):
            index.append(_numbered(recording, places[name], numbers))
            count = recording.edge_index.shape[1]
            columns["graph"] += [name] * count
            columns["site"] += [site_of(name)] * count
            columns["round"].append(torch.full((count,), number + 1))
            columns["edge_importance"].append(torch.full((count,), torch.nan) if importances is None else importances)
            for statistic in ("mean", "std", "share"):
                columns[statistic].append(getattr(recording, statistic)[number])
    columns["edge"] = [torch.arange(len(columns["graph"]))]
    if edge_importance is None:
        del columns["edge_importance"]
    joined = {n: values if n in WORDS else _joined(n, values) for n, values in columns.items()}
    return HeadNetwork(edge_index=torch.cat(index, dim=1), num_nodes=len(nodes["label"]), **nodes, **joined)


def _joined(name: str, values: list[Tensor]) -> Tensor:
    return torch.cat([value.detach().cpu() for value in values]).to(torch.long if name in INTEGERS else torch.double)


def at_rest(model: nn.Module) -> dict[str, Recording]:
    """Returns what a recording of one token of context zero would hold, without running the model."""
    graphs = head_graphs(model)
    with record(model) as heads, torch.no_grad():
        for conv in graphs.values():
            conv.edges(conv.edges.bias.new_zeros(conv.edges.context_dim))
    return heads


# A block, and whether its key/value heads are meant, where they are fewer than its query heads.
Place = tuple[str, bool]


def _place(name: str, recording: Recording, heads: Mapping[str, Recording]) -> Place:
    """The place of a graph's heads."""
    block = block_of(name)
    others = [other.num_heads for graph, other in heads.items() if family_of(block_of(graph)) == family_of(block)]
    return block, site_of(name) in OF_KEYS and recording.num_heads < max(others)


def _senders(recording: Recording, place: Place) -> list[Place]:
    """The places of the earlier layers that send to a graph, in the order of its senders."""
    block, is_key = place
    count = int(recording.edge_index[0].max()) // recording.num_heads if recording.edge_index.numel() else 0
    layer = layer_of(block)
    before = () if layer is None else layers_read(getattr(recording, "reach", count), layer)
    if count > len(before):
        raise ValueError(
            f"Expected {count} layers before {block}, whose heads send to it (got {len(before)}). Do record the model "
            "it is part of."
        )
    return [(family_of(block).replace("*", str(index)), is_key) for index in before[:count]]


def _nodes(
    heads: Mapping[str, Recording], places: Mapping[str, Place], importance: Mapping[str, Tensor]
) -> tuple[dict[Place, int], dict[str, Any]]:
    """The first node of every place, and the node attributes."""
    # Heads that send are there with or without a graph in their own layer.
    sizes: dict[Place, int] = {}
    for name, recording in heads.items():
        for place in (*reversed(_senders(recording, places[name])), places[name]):
            sizes.setdefault(place, recording.num_heads)
    titles = dict(zip(blocks := list(dict.fromkeys(b for b, _ in sizes)), block_titles(blocks), strict=True))
    numbers: dict[Place, int] = {}
    columns: dict[str, Any] = {name: [] for name in NODE_ATTRIBUTES if name not in HEAD_SCORES}
    for block in blocks:
        for place in ((block, False), (block, True)):
            if place not in sizes:
                continue
            numbers[place] = len(columns["label"])
            recordings = [recording for name, recording in heads.items() if places[name] == place]
            routed = [recording for recording in recordings if recording.num_shared is not None]
            shown = next(iter(routed or recordings), None)
            layer, nothing = layer_of(block), torch.full((sizes[place],), torch.nan)
            for head in range(sizes[place]):
                columns["label"].append(f"{titles[block].replace('layer ', '')}.{head}" + ("kv" if place[1] else ""))
                columns["block"].append(titles[block])
                columns["layer"].append(blocks.index(block) if layer is None else layer)
                columns["head"].append(head)
                columns["kind"].append(_kind(shown, head, place[1]))
            columns["load"].append(torch.ones(sizes[place]) if shown is None else shown.load)
            scores = nothing if place[1] else importance.get(block)
            columns["importance"].append(nothing if scores is None else scores)
    for name in ("load", "importance"):
        columns[name] = _joined(name, columns[name])
    for name in ("layer", "head"):
        columns[name] = torch.tensor(columns[name], dtype=torch.long)
    if not importance:
        del columns["importance"]
    return numbers, columns


def _kind(recording: Recording | None, head: int, is_key: bool) -> str:
    if is_key or recording is None or recording.num_shared is None:
        return "key/value" if is_key else "head"
    return "shared" if head < recording.num_shared else "routed"


def _numbered(recording: Recording, place: Place, numbers: Mapping[Place, int]) -> Tensor:
    """The edges `[2, E]` of one graph as nodes of the network; senders of earlier layers stand in their own block."""
    back, head = recording.edge_index // recording.num_heads, recording.edge_index % recording.num_heads
    starts = [numbers[each] for each in (place, *_senders(recording, place))]
    return torch.tensor(starts)[back] + head


def _column(name: str, rows: list[dict[str, Any]]) -> Any:
    missing = [row for row in rows if name not in row]
    if missing:
        raise ValueError(f"Expected the attribute {name!r} of every node or edge (got {missing[0]}). Do save it again.")
    values = [row[name] for row in rows]
    if name in WORDS:
        return [str(value) for value in values]
    if name in INTEGERS:
        return torch.tensor([int(value) for value in values], dtype=torch.long)
    return torch.tensor([float(value) for value in values], dtype=torch.double)
