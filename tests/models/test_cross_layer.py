"""Heads of earlier layers as senders at every site, against one slow reference that loops over layers, heads, edges."""

from __future__ import annotations

import copy
import json
import re

import numpy as np
import pytest
import torch
from helpers import (
    V,
    assert_equal_to,
    assert_same,
    gradients_of,
    inputs_for,
    model_of,
    moved,
    random_tokens,
    traced,
    trained_like,
    with_graphs,
)

import gohgraph as goh
from gohgraph import BaselineConfig, HeadGraphConfig, SiteConfig
from gohgraph.analysis.strength import edge_strength
from gohgraph.drawing.layered import arcs, layout_of
from gohgraph.graphs.baselines import BASELINES
from gohgraph.graphs.baselines.presets import VALUE_RESIDUAL
from gohgraph.graphs.cross_layer import CrossLayer
from gohgraph.graphs.protocol import SiteGraph, Traits
from gohgraph.models.stacks import Stack
from gohgraph.parallel.placement import reorder_heads

B = 2
SIZES = {
    "primes": {"d_model": 30, "num_heads": 5, "tokens": 7},
    "H = D = T, grouped": {"d_model": 36, "num_heads": 6, "num_kv_heads": 3, "tokens": 6},
    "G = T = layers": {"d_model": 32, "num_heads": 8, "num_kv_heads": 4, "tokens": 4},
}
PAIRS_SCALED = CrossLayer(1, "all-pairs", scale=0.1)
PAIRS, SAME = CrossLayer("first", "all-pairs"), CrossLayer("all", "same-head")


def sites(*names, **options):
    return HeadGraphConfig(**{"outputs": None, **dict.fromkeys(names, SiteConfig(**options))})


CASES = {
    "value residual": HeadGraphConfig(None, values=VALUE_RESIDUAL),
    "values, all pairs of the first": sites("values", topology="empty", self_loops=False, cross_layer=PAIRS),
    "values, same head of all": sites("values", cross_layer=SAME),
    "keys, two before, static": sites("keys", topology="ring", edges="static", cross_layer=2),
    "queries, the first, low rank": sites("queries", rank=3, cross_layer="first"),
    "outputs, all, rounds": sites("outputs", topology="ring", rounds=2, cross_layer="all"),
    "all sites": sites("outputs", "queries", "keys", "values", norm=True, cross_layer=PAIRS),
    "scaled": sites("values", "queries", cross_layer=PAIRS_SCALED),
    "from zero": sites("values", "outputs", edges="static", cross_layer=CrossLayer("first", "same-head", scale=0)),
    "chain": HeadGraphConfig(
        None, values=(SiteConfig(cross_layer="first"), SiteConfig("ring", cross_layer=1, activation=None))
    ),
    "pyg": sites("values", "keys", backend="pyg", cross_layer=SAME),
    "top edges": sites("values", top_edges=2, cross_layer=PAIRS),
    "mixed": HeadGraphConfig(SiteConfig(cross_layer=2), values=SiteConfig(cross_layer="first"), keys=SiteConfig()),
}
cases, sizes = pytest.mark.parametrize("case", CASES), pytest.mark.parametrize("size", SIZES)
ROUTING = goh.RoutingConfig(2, 2)


def config_of(graphs, size="primes", **settings):
    shape = {name: value for name, value in SIZES[size].items() if name != "tokens"}
    return with_graphs(graphs, **{"num_layers": 4, "tie_embeddings": False, **shape, **settings})


def language_model(case, size="primes", routing=None, **settings):
    graphs = copy.copy(CASES[case]) if routing is None else HeadGraphConfig.from_dict(
        {**CASES[case].to_dict(), "routing": routing.to_dict()}
    )  # fmt: skip
    return trained_like(goh.LanguageModel(config_of(graphs, size, **settings))).eval()


# The reference.


def weights_of(conv, x):
    """alpha `[B, T, R, E]` by its definition."""
    edges = conv.edges
    alpha = edges.bias
    if edges.weight is not None:
        low = x.unsqueeze(-2) if edges.down is None else torch.einsum("btm,rkm->btrk", x, edges.down)
        alpha = (low.unsqueeze(-2) * edges.weight).sum(-1) + edges.bias
    alpha = alpha.tanh() if edges.activation == "tanh" else alpha
    alpha = alpha.expand(*x.shape[:2], *alpha.shape[-2:])
    if edges.learned_scale is None:
        return alpha
    return torch.stack([
        alpha[..., e] * (edges.learned_scale if j >= conv.num_heads else 1.0)
        for e, j in enumerate(conv.edge_index[0].tolist())
    ], dim=-1)  # fmt: skip


def passed(conv, options, nodes, x, history, active=None):
    """Messages edge by edge, with the senders that `cross_layer` names, of all nodes there were at the site."""
    layers = CrossLayer.of(options.cross_layer).layers
    before = list(reversed(history))
    before = {"first": before[-1:], "all": before}.get(layers, before[: layers if isinstance(layers, int) else 0])
    alpha, result = weights_of(conv, x), nodes
    fusion = [0.0] * conv.rounds if conv.fusion is None else conv.fusion
    for index in range(conv.rounds):
        pool = torch.cat([nodes, *before], dim=2)
        if conv.gain is not None:
            pool = pool / (pool.square().mean(-1, keepdim=True) + torch.finfo(pool.dtype).eps).sqrt() * conv.gain
        message = [0.0] * conv.num_heads
        for e, (j, i) in enumerate(conv.edge_index.t().tolist()):
            weight = alpha[:, :, index, e]
            # What is left out has the gradient it would have.
            weight = weight - (weight * ~kept(conv, alpha[:, :, index], e)).detach()
            if active is not None:
                works = active[..., i] & (active[..., j] if j < conv.num_heads else True)
                weight = weight * works
            message[i] = message[i] + weight.unsqueeze(-1) * pool[:, :, j]
        message = torch.stack([m if torch.is_tensor(m) else torch.zeros_like(nodes[:, :, 0]) for m in message], dim=2)
        nodes, result = nodes + message, result + (1 + fusion[index]) * message
    return result


def kept(conv, alpha, edge):
    """Whether an edge is among the strongest of its receiver, bool `[B, T]`."""
    if conv.top_edges is None:
        return torch.ones(alpha.shape[:-1], dtype=torch.bool)
    receivers = conv.edge_index[1]
    rivals = alpha[..., receivers == receivers[edge]].abs()
    return (rivals > alpha[..., edge : edge + 1].abs()).sum(-1) < conv.top_edges


def at_site(block, graphs, site, nodes, x, history, routing=None):
    graph, active = block.graphs.get(site), None if routing is None else routing.active
    if graph is not None:
        parts = zip(graph, getattr(graphs, site), strict=True) if isinstance(graph, torch.nn.ModuleList) else [
            (graph, getattr(graphs, site))
        ]  # fmt: skip
        for part, options in parts:
            nodes = passed(part, options, nodes, x, history[site], active)
    # A head that is off sends nothing.
    history[site].append(nodes if active is None else nodes * active.unsqueeze(-1))
    return nodes


def slowly(model, tokens):
    """The logits by loops over layers and heads."""
    graphs, config = model.config.head_graph, model.config
    x = model.embedding(tokens, torch.arange(tokens.shape[1]))
    history = {site: [] for site in ("queries", "keys", "values", "outputs")}
    future = torch.ones(tokens.shape[1], tokens.shape[1]).triu(1).bool()
    for layer in model.decoder.layers:
        block, h = layer.attention.object, layer.attention.norm(x)
        routing = None if block.router is None else block.router(h)
        q, k, v = (f(h).unflatten(-1, (-1, config.head_dim)) for f in (block.query, block.key, block.value))
        q = block.rotary(at_site(block, graphs, "queries", q, h, history, routing), torch.arange(tokens.shape[1]))
        k = block.rotary(at_site(block, graphs, "keys", k, h, history), torch.arange(tokens.shape[1]))
        v = at_site(block, graphs, "values", v, h, history)
        heads = []
        for head in range(config.num_heads):
            group = head * k.shape[2] // config.num_heads
            scores = (q[:, :, head] @ k[:, :, group].mT * config.head_dim**-0.5).masked_fill(future, -torch.inf)
            heads.append(scores.softmax(-1) @ v[:, :, group])
        z = torch.stack(heads, dim=2)
        if block.output_graph is not None:
            z = at_site(block, graphs, "outputs", z, h, {"outputs": history["outputs"][:]}, routing)
        z = z if routing is None else z * routing.gates.unsqueeze(-1)
        history["outputs"].append(z)
        x = layer.feed_forward(x + block.output(z.flatten(-2)))
    return model.head(model.decoder.norm(x))


@sizes
@cases
def test_equals_the_reference_in_value_and_gradient(case, size):
    model, tokens = language_model(case, size), random_tokens(SIZES[size]["tokens"])
    outputs = [model(tokens).logits, slowly(model, tokens)]
    assert_equal_to(*outputs)
    weight = torch.randn(outputs[0].shape, dtype=torch.float64)
    assert_same(*(gradients_of((logits * weight).sum(), model) for logits in outputs))


@pytest.mark.parametrize("case", ["value residual", "all sites", "chain", "mixed", "scaled"])
def test_heads_that_are_off_send_nothing_to_later_layers(case):
    model, tokens = language_model(case, routing=ROUTING), random_tokens(7)
    outputs = [model(tokens).logits, slowly(model, tokens)]
    assert_equal_to(*outputs)
    assert_same(*(gradients_of(logits.square().sum(), model) for logits in outputs))


def test_the_value_residual_is_its_formula():
    """v_l = a v_l + b v_1, two numbers a head, of layer 1 as its attention used it (arXiv 2410.17897)."""
    model, tokens, seen = language_model("value residual"), random_tokens(7), []
    graphs = [layer.attention.object.inner_graphs["value"] for layer in model.decoder.layers]
    for layer in model.decoder.layers:
        layer.attention.object.value.register_forward_hook(lambda module, args, v: seen.append(v))
    for graph in graphs:
        graph.register_forward_hook(lambda module, args, v: seen.append(v))
    model(tokens)
    first = None
    for layer, graph in enumerate(graphs):
        a, *b = graph.edges.bias.view(-1, 1 + (layer > 0)).unbind(-1)
        v = (1 + a).unsqueeze(-1) * seen[2 * layer].unflatten(-1, (5, 6))
        first = v if first is None else first
        v = v + b[0].unsqueeze(-1) * first if layer else v
        assert_equal_to(seen[2 * layer + 1], v)
    assert sum(parameter.numel() for graph in graphs for parameter in graph.parameters()) == 5 * (1 + 2 + 2 + 2)


# The start.


@cases
def test_a_new_graph_is_plain_attention(case):
    plain, own = (goh.LanguageModel(config_of(graphs)) for graphs in (None, CASES[case]))
    assert not own.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    tokens = random_tokens(7)
    if case in ("pyg", "top edges", "all sites", "outputs, all, rounds"):
        torch.testing.assert_close(own(tokens).logits, plain(tokens).logits)
    else:
        assert torch.equal(own(tokens).logits, plain(tokens).logits)


@pytest.mark.parametrize("scale", [0, 0.0, 0.1])
@pytest.mark.parametrize("edges", ["static", "token"])
def test_a_learned_scale_opens_from_either_start(scale, edges):
    cross = CrossLayer("first", "all-pairs", scale)
    model = goh.LanguageModel(config_of(sites("values", edges=edges, cross_layer=cross)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(2):
        tokens = random_tokens(7)
        optimizer.zero_grad()
        model(tokens, targets=tokens).loss.backward()
        optimizer.step()
    for layer in model.decoder.layers[1:]:
        own = layer.attention.object.inner_graphs["value"].edges
        crosses = own.scaled
        assert own.learned_scale.grad.abs() > 0 and own.bias.grad[:, crosses].abs().amin() > 0
        assert crosses.sum() == 25 and own.bias.shape[1] == 50


def test_resetting_returns_to_the_start():
    cross = CrossLayer(1, "same-head", scale=0)
    conv = goh.HeadGraphConv(goh.head_graph(5), 6, 30, cross_layer=cross)
    before = copy.deepcopy(conv.state_dict())
    assert before["edges.bias"].count_nonzero() == 5 and before["edges.learned_scale"] == 0
    moved(conv)
    conv.edges.learned_scale.data.fill_(3)
    conv.reset_parameters()
    assert all(torch.equal(value, before[name]) for name, value in conv.state_dict().items())


# Running.


@pytest.mark.parametrize(("size", "routing"), [("primes", None), ("H = D = T, grouped", ROUTING)])
@cases
@torch.no_grad()
def test_a_cache_changes_nothing(case, size, routing):
    model, tokens = language_model(case, size, routing), random_tokens(11)
    caches = model.decoder.new_caches()
    pieces = [model(tokens[:, a:b], caches=caches).logits for a, b in ((0, 6), (6, 7), (7, 10), (10, 11))]
    assert_equal_to(torch.cat(pieces, dim=1), model(tokens).logits)


@cases
def test_later_tokens_never_reach_earlier_ones(case):
    model, before = language_model(case), random_tokens(9)
    after = before.clone()
    after[:, 5:] = (after[:, 5:] + 1) % V
    first, second = model(before).logits, model(after).logits
    assert (first - second)[:, :5].abs().max() < 1e-12 and (first - second)[:, 5:].abs().max() > 1e-3


@pytest.mark.parametrize("case", ["all sites", "values, same head of all", "chain"])
def test_recomputing_layers_changes_no_gradient(case):
    model, tokens = language_model(case).train(), random_tokens(7)
    gradients = []
    for model.decoder.recompute in (False, True):
        gradients.append(gradients_of(model(tokens, targets=tokens).loss, model))
    assert_same(*gradients)


@pytest.mark.parametrize("kind", ["language", "translation", "classes"])
def test_every_kind_of_model_learns(kind):
    model, *inputs = trained_like(model_of(kind, config_of(CASES["mixed"]))), *inputs_for(kind)
    model(*inputs[:-1], targets=inputs[-1]).loss.backward()
    graphs = {name: module for name, module in model.named_modules() if isinstance(module, goh.HeadGraphConv)}
    assert all(p.grad is not None and p.grad.any() for graph in graphs.values() for p in graph.parameters())
    # Cross attention is handed nothing of earlier layers, and its graphs have no such edges.
    assert {conv.cross_layer for name, conv in graphs.items() if "cross" in name} <= {0}


@torch.no_grad()
def test_a_translator_decodes_as_it_prefills():
    model = trained_like(goh.Transformer(config_of(CASES["all sites"]))).eval()
    source, target = random_tokens(5), random_tokens(7)
    memory, caches = model.encode(source).x, model.decoder.new_caches()
    pieces = [model.decode(target[:, a:b], memory, caches=caches).x for a, b in ((0, 2), (2, 3), (3, 7))]
    assert_equal_to(torch.cat(pieces, dim=1), model.decode(target, memory).x)


@pytest.mark.compiles
def test_a_stack_runs_under_the_compiler():
    stack = moved(Stack(config_of(CASES["mixed"], num_layers=2), "causal")).eval()
    x = torch.randn(B, 7, 30)
    torch.testing.assert_close(traced(stack)(x).x, stack(x).x)


def test_nodes_are_kept_until_their_last_reader_and_no_others():
    graphs = HeadGraphConfig(SiteConfig(cross_layer=1), values=SiteConfig(cross_layer="first"))
    stack, seen = Stack(config_of(graphs), "causal"), []
    for layer in stack.layers:
        layer.register_forward_pre_hook(lambda module, args, given: seen.append(given["earlier"]), with_kwargs=True)
    stack(torch.randn(B, 7, 30))
    assert [[node is not None for node in earlier["outputs"]] for earlier in seen] == [
        [], [True], [True, False], [True, False, False]
    ]  # fmt: skip
    assert [[node is not None for node in earlier["values"]] for earlier in seen] == [
        [], [True], [False, True], [False, False, True]
    ]  # fmt: skip
    assert all(set(earlier) == {"outputs", "values"} for earlier in seen)
    stack = Stack(config_of(None), "causal")
    assert stack.readers.nothing() == {}


class Echo(SiteGraph):
    """A graph of one's own that reads the first layer and all others, and does not know its layer."""

    def __init__(self, num_heads, head_dim, context_dim, reach="all"):
        super().__init__()
        self.traits, self.share = Traits(num_heads, reach=reach), torch.nn.Parameter(torch.ones(()))

    def forward(self, nodes, context=None, earlier=(), active=None, *, keys=None, losses=None):
        self.seen = len(earlier)
        return nodes + self.share * sum(earlier) if earlier else nodes


@pytest.mark.parametrize(("reach", "seen"), [("all", [0, 1, 2, 3]), ("first", [0, 1, 1, 1]), (2, [0, 1, 2, 2])])
def test_a_graph_of_ones_own_is_handed_what_it_reads(reach, seen, monkeypatch):
    monkeypatch.setitem(BASELINES, "echo", Echo)
    echo = BaselineConfig("echo", {"reach": reach})
    model = goh.LanguageModel(config_of(HeadGraphConfig(echo, values=echo)))
    model(random_tokens(7))
    blocks = [layer.attention.object for layer in model.decoder.layers]
    assert [block.output_graph.seen for block in blocks] == seen
    assert [block.inner_graphs["value"].seen for block in blocks] == seen


# Configurations, files, recordings.


def test_a_model_built_on_meta_knows_what_is_scaled():
    model, tokens = language_model("scaled"), random_tokens(7)
    with torch.device("meta"):
        other = goh.LanguageModel(model.config).double()
    other.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert torch.equal(other(tokens).logits, model(tokens).logits)


@torch.no_grad()
def test_reordered_heads_keep_their_senders():
    cross = CrossLayer("first", "all-pairs", scale=0.1)
    graphs = HeadGraphConfig(SiteConfig("ring", cross_layer=cross, norm=True))
    model, tokens = trained_like(goh.LanguageModel(config_of(graphs))), random_tokens(7)
    before = model(tokens).logits
    assert_equal_to(reorder_heads(model, [3, 0, 4, 1, 2])(tokens).logits, before)
    again = goh.LanguageModel(model.config).double()
    again.load_state_dict(model.state_dict())
    assert_equal_to(again(tokens).logits, before)


@cases
def test_saved_models_come_back(case, tmp_path):
    model, tokens = language_model(case).float(), random_tokens(7)
    model.save_pretrained(tmp_path)
    again = goh.LanguageModel.from_pretrained(tmp_path).eval()
    assert again.config == model.config and torch.equal(again(tokens).logits, model(tokens).logits)
    assert goh.TransformerConfig.from_dict(json.loads(json.dumps(model.config.to_dict()))) == model.config


def test_a_configuration_written_with_a_number_of_layers_means_the_same():
    old = {"topology": "ring", "cross_layer": 2, "keyed": False, "in_degree": None}
    assert SiteConfig.from_dict(old) == SiteConfig("ring", cross_layer=2)
    assert SiteConfig("ring", cross_layer=2).to_dict()["cross_layer"] == 2
    # The edges are those of the layer, again for each layer before.
    conv = goh.HeadGraphConv.from_config(SiteConfig("ring", cross_layer=2), 5, 6, 30, layer=3)
    own = goh.head_graph(5, "ring").edge_index
    shifted = torch.cat([own + torch.tensor([[layer * 5], [0]]) for layer in range(3)], dim=1)
    assert {tuple(edge) for edge in conv.edge_index.t().tolist()} == {tuple(edge) for edge in shifted.t().tolist()}


@pytest.mark.parametrize("case", ["value residual", "values, all pairs of the first", "mixed", "all sites"])
@pytest.mark.parametrize("size", ["primes", "H = D = T, grouped"])
def test_networks_put_senders_into_their_layers(case, size):
    model, tokens = language_model(case, size), random_tokens(7)
    with torch.no_grad(), goh.record(model) as heads:
        model(tokens)
    heads_of = {"values": SIZES[size].get("num_kv_heads", model.config.num_heads)}
    heads_of["keys"] = heads_of["values"]
    for source in (heads, model):
        network = goh.head_graph_of(source)
        assert network.validate() and network.layer.unique().tolist() == [0, 1, 2, 3]
        senders, receivers = network.edge_index
        place = 0
        for name, recording in heads.items():
            layer, count = int(re.search(r"layers\.(\d)", name)[1]), recording.num_heads
            edges = slice(place, place := place + recording.mean.numel())
            of_first = {"first": [0] * 9, 2: [layer - 1, layer - 2]}.get(recording.reach, [layer - 1])
            for j, s, r in zip(recording.edge_index[0].tolist(), senders[edges], receivers[edges], strict=True):
                back, head = divmod(j, count)
                expected = layer if back == 0 else of_first[back - 1]
                assert (network.layer[s], network.head[s], network.layer[r]) == (expected, head, layer), name
                assert network.kind[s] == network.kind[r]
            if network.site[edges.start] in heads_of:
                assert count == heads_of[network.site[edges.start]]
        assert place == network.num_edges


@torch.no_grad()
def test_what_is_recorded_and_drawn_is_scaled(tmp_path):
    model = language_model("scaled", num_layers=2)
    static = goh.HeadGraphConv(goh.head_graph(5), 6, 30, edges="static", activation=None, cross_layer=PAIRS_SCALED)
    static.edges.bias.fill_(2.0)
    strength = edge_strength(static)[""].view(5, 10)
    torch.testing.assert_close(strength, torch.tensor([2.0] * 5 + [0.2] * 5).double().expand(5, -1))
    with goh.record(model, every_token=True) as heads:
        model(random_tokens(7))
    for name, recording in heads.items():
        conv = model.get_submodule(name)
        x = torch.zeros(1, 1, 30).double()
        with goh.record(conv) as alone:
            conv.edges(x)
        torch.testing.assert_close(alone[""].mean, weights_of(conv, x)[0, 0].double())
        assert recording.every["weights"].shape[1:] == conv.edges.bias.shape
    goh.draw_network(goh.head_graph_of(heads), tmp_path / "network.svg")
    goh.draw_matrices(heads, tmp_path / "matrices.svg")
    figure = goh.draw(heads, tmp_path / "heads.svg")
    assert "\u22121" in {text.get_text() for axis in figure.axes for text in axis.texts}


@torch.no_grad()
def test_the_first_layer_is_drawn_by_its_name(tmp_path):
    model = language_model("values, all pairs of the first")
    with goh.record(model) as heads:
        model(random_tokens(7))
    assert [recording.reach for recording in heads.values()] == ["first"] * 3
    figure = goh.draw(heads)
    assert {"layer 0"} == {text.get_text() for axis in figure.axes for text in axis.texts if len(text.get_text()) > 1}
    network = goh.head_graph_of(heads)
    drawn, edges = goh.draw_network(network), torch.arange(network.num_edges)
    layout = layout_of(network)
    curves, _ = arcs(network, layout, edges.numpy(), *(np.zeros(n) for n in (network.num_nodes, network.num_edges)))
    # An edge that passes by a layer does not run through its heads.
    skips = (network.layer[network.edge_index[1]] > 1) & (network.head[network.edge_index].diff(dim=0)[0] == 0)
    assert skips.sum() == 10 and (curves[skips, 12, 0] - curves[skips, 0, 0] > layout.radius).all()
    assert [text.get_text() for text in drawn.axes[0].texts if "layer" in text.get_text()] == [
        f"layer {layer}" for layer in range(4)
    ]
    goh.save_page(heads, tmp_path / "page.html")
    changes = goh.draw_difference(heads, heads)
    assert any(text.get_text() == "layer 0" for text in changes.axes[0].texts)
    nearest = language_model("scaled")
    with goh.record(nearest) as others:
        nearest(random_tokens(7))
    with pytest.raises(ValueError, match="^Expected two recordings of the same head graphs"):
        goh.draw_difference(heads, {name: others[name] for name in heads})


def test_pruning_keeps_what_is_scaled():
    model, tokens = language_model("scaled"), random_tokens(7)
    graphs = {name: graph for name, graph in model.named_modules() if isinstance(graph, goh.HeadGraphConv)}
    pruned = goh.prune(model, 0.5, {name: torch.rand(graph.edges.num_edges) for name, graph in graphs.items()})
    left = [pruned.get_submodule(name).edges.scaled for name in graphs]
    assert all(0 < mask.sum() < 25 for mask in left if mask is not None) and len([m for m in left if m is None]) == 2
    assert_equal_to(pruned.eval()(tokens).logits, slowly(pruned, tokens))


# What does not go.


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"cross_layer": "last"}, ValueError, "Expected cross_layer to be a number of layers, 'first' or 'all'"),
        ({"cross_layer": None}, TypeError, "Expected cross_layer to be an int"),
        ({"cross_layer": -2}, ValueError, "Expected cross_layer to be an int >= 0"),
        ({"cross_layer": {"layers": 1}}, TypeError, "Expected cross_layer to be an int"),
    ],
    ids=str,
)
def test_other_senders_are_refused(options, error, said):
    for build in (SiteConfig, lambda **options: goh.HeadGraphConv(goh.head_graph(5), 6, 30, **options)):
        with pytest.raises(error, match=f"^{said}.*Do "):
            build(**options)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"edges": "none"}, ValueError, "Expected edges of cross_layer of"),
        ({"scale": float("nan")}, ValueError, "Expected scale of cross_layer to be a finite number"),
        ({"scale": True}, TypeError, "Expected scale of cross_layer to be a finite number"),
    ],
    ids=str,
)
def test_other_edges_and_scales_are_refused(options, error, said):
    with pytest.raises(error, match=f"^{said}.*Do "):
        CrossLayer("first", **options)


def test_all_layers_need_a_layer():
    for build in (
        lambda: goh.HeadGraphConv(goh.head_graph(5), 6, 30, cross_layer="all"),
        lambda: goh.HeadGraphConv.from_config(SiteConfig(cross_layer="all"), 5, 6, 30),
    ):
        with pytest.raises(ValueError, match=r"^Expected a number of earlier layers.*cross_layer='all'.*Do "):
            build()


@pytest.mark.parametrize("cross_layer", [1, "first", "all", PAIRS])
def test_converted_models_and_maps_have_no_earlier_layers(cross_layer):
    encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(30, 5, batch_first=True), 2, None, False)
    before = list(encoder.state_dict())
    with pytest.raises(ValueError, match=r"^Expected .*\(got .*cross_layer=.*\)\. Do "):
        goh.convert(encoder, HeadGraphConfig(SiteConfig(cross_layer=cross_layer)))
    assert list(encoder.state_dict()) == before
    for site in ("scores", "weights"):
        with pytest.raises(ValueError, match=r"^Expected .*\(got .*cross_layer=.*\)\. Do "):
            goh.LanguageModel(config_of(sites(site, cross_layer=cross_layer)))


def test_a_block_by_itself_asks_for_what_it_reads():
    conv = goh.HeadGraphConv(goh.head_graph(5), 6, 30, cross_layer="first")
    attention = moved(goh.MultiHeadAttention(30, 5, causal=True, inner_graphs={"value": conv}))
    x, first, nearest = torch.randn(B, 7, 30), torch.randn(B, 7, 5, 6), torch.randn(B, 7, 5, 6)
    with pytest.raises(ValueError, match="^Expected the nodes of 1 layers before"):
        attention(x)
    y, heads = attention(x, earlier={"values": (first,)})
    assert torch.equal(attention(x, earlier={"values": (nearest, first)})[0], y)
    assert not torch.equal(attention(x, earlier={"values": (nearest,)})[0], y)
    assert list(heads.nodes) == ["values"] and heads.nodes["values"].shape == (B, 7, 5, 6)
    assert torch.equal(heads.nodes["values"], conv(attention.value(x).unflatten(-1, (5, 6)), x, (first,)))
