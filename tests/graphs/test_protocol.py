"""What may stand at a site of attention: the checks, chains, wrapped modules, graphs of one's own, and matrices."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_equal_to, trained_like
from torch import nn

import gohgraph as goh
from gohgraph.graphs.baselines import BASELINES, Composition, HeadNorm, OwnContext, SigmoidGate, SoftmaxMessages
from gohgraph.graphs.chain import Chain
from gohgraph.graphs.experts import GraphExperts
from gohgraph.graphs.keyed import KeyedGraphConv
from gohgraph.graphs.protocol import FEATURES, MAPS, SiteGraph, Traits, check_site
from gohgraph.graphs.wrapped import WrappedModule, as_site_graph

B, T, S, H, D, M = 2, 7, 11, 5, 6, 30
ALL = {"whole", "reach", "keyed", "nonlinear"}


def conv(topology="ring", **settings):
    return trained_like(goh.HeadGraphConv(goh.head_graph(H, topology), D, M, **settings))


def keyed():
    return trained_like(KeyedGraphConv(goh.head_graph(H, "ring"), D, M))


def experts():
    return trained_like(GraphExperts(goh.head_graph(H), D, M, num_shared=2))


def nodes(features=D, heads=H):
    return torch.randn(B, T, heads, features).double()


def contexts(tokens=T):
    return torch.randn(B, tokens, M).double()


def some_active():
    active = torch.rand(B, T, H) < 0.6
    active[0, 0], active[0, 1] = True, False
    return active


class Mean(SiteGraph):
    """A user's graph: a learned share of the mean of all heads, and a training loss of its own."""

    def __init__(self, num_heads):
        super().__init__()
        self.traits = Traits(num_heads, sites=FEATURES, losses=("spread",))
        self.share = nn.Parameter(torch.zeros(()))

    def forward(self, nodes, context=None, earlier=(), active=None, *, keys=None, losses=None):
        if losses is not None and "spread" in losses:
            losses["spread"].append(self.share * nodes.var(dim=-1))
        return nodes + self.share * nodes.mean(dim=-2, keepdim=True)


class Talk(nn.Module):
    """A plain module over heads: a matrix between them, and a shift by the context."""

    def __init__(self, heads=H):
        super().__init__()
        self.mix = nn.Linear(heads, heads, bias=False)
        self.gain = nn.Parameter(torch.randn(()))

    def forward(self, nodes, context):
        return self.mix(nodes.transpose(-1, -2)).transpose(-1, -2) * (1 + self.gain * context.mean(-1)[..., None, None])


@pytest.mark.parametrize(
    ("site", "graph", "allowed", "named"),
    [
        ("outputs", lambda: goh.HeadGraphConv(goh.head_graph(3), D, M), ALL, r"over 5 heads at outputs .*over 3\)"),
        ("scores", lambda: conv(norm=True), ALL, "scores .*HeadGraphConv with norm=True, which is for keys, outputs"),
        ("weights", experts, ALL, 'weights .*GraphExperts with kind="experts"'),
        ("outputs", keyed, ALL, 'outputs .*KeyedGraphConv with kind="keyed", which is for scores'),
        ("values", lambda: Composition(H, D, M), ALL, r"values .*Composition, which is for scores, weights\)"),
        ("outputs", lambda: conv(cross_layer=2), ALL - {"reach"}, r"outputs here \(got cross_layer=2\)"),
        ("scores", keyed, ALL - {"keyed"}, "scores here .*KeyedGraphConv, which reads the keys' tokens"),
        ("scores", lambda: WrappedModule(Talk(), H), ALL - {"nonlinear"}, "linear .* scores here .*Wrapped"),
        ("outputs", experts, ALL - {"whole"}, "HeadGraphConv at outputs, whose heads .*several ranks .*GraphExperts"),
    ],
)
def test_what_does_not_fit_is_named(site, graph, allowed, named):
    with pytest.raises(ValueError, match=rf"^Expected .*{named}.*\. Do "):
        check_site(site, graph(), H, allowed)


def test_what_fits_is_let_through():
    for site in FEATURES | MAPS:
        check_site(site, conv(rounds=2), H)
    for site in FEATURES:
        for graph in (conv(norm=True), experts(), HeadNorm(H, D, M), WrappedModule(Talk(), H)):
            check_site(site, graph, H)
    check_site("outputs", conv(cross_layer=2), H, {"reach"})
    check_site("outputs", conv(), H, ())
    check_site("scores", keyed(), H, {"whole", "keyed", "nonlinear"})
    check_site("weights", WrappedModule(Talk(), H), H, {"whole", "nonlinear"})


def test_a_site_holds_modules_only():
    with pytest.raises(TypeError, match=r"^Expected a module at a site of attention \(got 'ring'\)\. Do "):
        goh.MultiHeadAttention(M, H, output_graph="ring")
    graph = conv()
    assert as_site_graph(graph, H) is graph


# Matrices.


def gate(**settings):
    return trained_like(SigmoidGate(H, D, M, grain="head", **settings))


LINEAR = {
    "ring": lambda: conv("ring"),
    "rounds": lambda: conv("complete", rounds=2),
    "pyg": lambda: conv("ring", backend="pyg"),
    "static": lambda: conv("complete", edges="static"),
    "top edges": lambda: conv("complete", top_edges=2),
    "softmax": lambda: trained_like(SoftmaxMessages(H, D, M)),
    "gate": lambda: gate(rank=3),
    "chain": lambda: Chain([conv("ring"), gate(), conv("complete")]),
}


@pytest.mark.parametrize("is_routed", [False, True])
@pytest.mark.parametrize("graph", LINEAR)
def test_the_matrix_of_a_linear_graph_is_its_forward(graph, is_routed):
    graph, x = LINEAR[graph](), contexts()
    active = some_active() if is_routed else None
    assert graph.traits.linear
    for features in (S, H):
        z = nodes(features)
        assert_equal_to(graph.matrix(x, active) @ z, graph(z, x, (), active))


@pytest.mark.parametrize("is_routed", [False, True])
@pytest.mark.parametrize("graph", LINEAR)
def test_few_senders_and_their_weights_are_the_matrix(graph, is_routed):
    graph, x = LINEAR[graph](), contexts()
    active = some_active() if is_routed else None
    senders, weights, key_weights = graph.sparse(x, active)
    assert senders.shape == (H, graph.traits.most_senders) and key_weights is None
    rows = torch.zeros(B, T, H, H).double()
    for i in range(H):
        rows[:, :, i].index_add_(-1, senders[i], weights.expand(B, T, -1, -1)[:, :, i])
    assert_equal_to(rows, graph.matrix(x, active).expand(B, T, H, H))


def test_static_graphs_have_one_matrix_for_all_tokens():
    for graph in (conv(edges="static"), Chain([conv(edges="static"), conv("complete", edges="static", rounds=2)])):
        assert graph.traits.static and graph.matrix().shape == (H, H)
        z = nodes()
        assert_equal_to(graph.matrix() @ z, graph(z, contexts()))
    assert not conv().traits.static and not conv(edges="static", norm=True).traits.static


@pytest.mark.parametrize("kind", BASELINES)
def test_baselines_say_of_themselves_what_they_do(kind):
    heads = H + 1 if kind in ("differential", "paired") else H
    graph, x = trained_like(BASELINES[kind](heads, D, M)), contexts()
    if graph.traits.linear:
        z = nodes(heads=heads)
        assert_equal_to(graph.matrix(x) @ z, graph(z, x))
    else:
        with pytest.raises(ValueError, match=f"linear in the nodes .got {type(graph).__name__}"):
            graph.matrix(x)
    state = graph.key_state(contexts(S))
    assert (state is not None) == graph.traits.keyed
    losses = {name: [] for name in ("alignment", *graph.traits.losses)}
    z, own = nodes(S if graph.traits.sites <= MAPS else D, heads), {"keys": state}
    own |= {"values": nodes()} if graph.traits.reads_values else {}
    assert torch.equal(graph(z, x, losses=losses, **own), graph(z, x, **own)) and losses == {"alignment": []}
    if graph.traits.static:
        assert_equal_to(graph(z, contexts()), graph(z, x))


def wrapped():
    return WrappedModule(Talk(), H)


@pytest.mark.parametrize(
    "graph", [lambda: conv(norm=True), lambda: conv(cross_layer=1), experts, keyed, lambda: Mean(H), wrapped]
)
def test_what_is_not_linear_has_no_matrix(graph):
    graph = graph()
    assert not graph.traits.linear
    with pytest.raises(ValueError, match=r"^Expected a graph that is linear in the nodes .*\. Do "):
        graph.matrix(contexts())


# Chains.


@pytest.mark.parametrize(
    ("graphs", "named"),
    [
        (lambda: [conv(), HeadNorm(3, D, M)], r"graphs over one number of heads in a chain \(got \[5, 3\]\)"),
        (lambda: [keyed(), conv(), keyed()], r"at most one graph of a chain .*keys' tokens \(got 2\)"),
        (lambda: [Composition(H, D, M), keyed()], r"at most one graph of a chain .*keys' tokens \(got 2\)"),
    ],
)
def test_graphs_that_make_no_chain_are_refused(graphs, named):
    with pytest.raises(ValueError, match=f"^Expected {named}"):
        Chain(graphs())


def test_a_chain_has_what_all_its_graphs_have():
    assert Chain([conv(), conv("complete")]).traits.linear
    assert not Chain([conv(), HeadNorm(H, D, M)]).traits.linear
    assert Chain([conv(edges="static"), conv(edges="static")]).traits.static
    assert not Chain([conv(edges="static"), conv()]).traits.static
    # Two sparse graphs after one another are as one of other edges, which nobody has listed.
    two = Chain([conv(), conv()]).traits
    assert conv().traits.in_degree == 2 and two.in_degree == 0 and two.most_senders == H
    assert Chain([conv(), HeadNorm(H, D, M)]).traits.sites == FEATURES
    assert Chain([conv(), Composition(H, D, M)]).traits.sites == MAPS
    assert Chain([keyed(), conv()]).traits.keyed and not Chain([conv()]).traits.keyed
    assert Chain([conv(cross_layer=1), conv(cross_layer=2), conv()]).traits.reach == 2
    assert Chain([experts(), Mean(H), experts()]).traits.losses == ("alignment", "spread")


def test_a_chain_hands_every_graph_what_it_reads():
    first, second, third = experts(), conv(cross_layer=2), Mean(H).double()
    chain, z, x, active = Chain([first, second, third]), nodes(), contexts(), some_active()
    earlier, losses = [nodes(), nodes()], {"alignment": [], "spread": []}
    nn.init.constant_(third.share, 0.3)
    expected = third(second(first(z, x, (), active), x, earlier, active), x)
    assert torch.equal(chain(z, x, earlier, active, losses=losses), expected)
    assert [len(found) for found in losses.values()] == [1, 1]
    graph, maps, source = Chain([conv("complete"), keyed()]), nodes(S), contexts(S)
    state = graph.key_state(source)
    assert torch.equal(state, graph[1].key_state(source))
    assert torch.equal(graph(maps, x, keys=state), graph[1](graph[0](maps, x), x, keys=state))


@torch.no_grad()
def test_a_chain_with_a_keyed_graph_in_attention_through_a_cache():
    module = trained_like(goh.MultiHeadAttention(M, H, causal=True, score_graph=Chain([conv("complete"), keyed()])))
    x, cache = contexts(), goh.attention.cache.KeyValueCache()
    steps = [module(x[:, a:b], cache=cache)[0] for a, b in ((0, 3), (3, 4), (4, T))]
    assert_equal_to(torch.cat(steps, dim=1), module(x)[0])


# Plain modules.


@pytest.mark.parametrize("site", ["outputs", "scores", "query", "key", "value", "weight"])
@pytest.mark.parametrize("is_routed", [False, True])
@pytest.mark.parametrize("kv_heads", [H, 1])
def test_a_plain_module_runs_at_every_site(site, is_routed, kv_heads):
    heads = kv_heads if site in ("key", "value") else H
    talk = Talk(heads)
    slot = {f"{site[:-1]}_graph": talk} if site in ("outputs", "scores") else {"inner_graphs": {site: talk}}
    router = goh.HeadRouter(M, H, 2, 2) if is_routed else None
    settings = {"num_kv_heads": kv_heads, "causal": True, "router": router}
    module = trained_like(goh.MultiHeadAttention(M, H, **settings, **slot))
    empty = goh.MultiHeadAttention(M, H, **copy.deepcopy(settings)).double()
    own = empty.load_state_dict(module.state_dict(), strict=False)
    assert not own.missing_keys and len(own.unexpected_keys) == 2
    x = contexts().requires_grad_()
    y = module(x)[0]
    assert (y - empty(x)[0]).abs().max() > 1e-3
    parameters = [parameter for name, parameter in module.named_parameters() if ".module." in name]
    gradients = torch.autograd.grad(y.square().sum(), [x, *parameters])
    assert len(parameters) == 2 and all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


def test_a_state_dict_of_the_unwrapped_module_loads():
    talk = Talk()
    attention = goh.MultiHeadAttention(M, H, output_graph=copy.deepcopy(talk), inner_graphs={"query": Talk()})
    state = attention.state_dict()
    earlier = {name.replace("output_graph.module.", "output_graph."): value for name, value in state.items()}
    assert "output_graph.mix.weight" in earlier and "output_graph.mix.weight" not in state
    names = list(earlier)
    again = goh.MultiHeadAttention(M, H, output_graph=Talk(), inner_graphs={"query": Talk()})
    again.load_state_dict(earlier)
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items()) and list(earlier) == names
    fresh = WrappedModule(Talk(), H)
    fresh.load_state_dict(talk.state_dict())
    assert torch.equal(fresh.module.mix.weight, talk.mix.weight)
    fresh.load_state_dict(WrappedModule(talk, H).state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        fresh.load_state_dict({"mix.weight": talk.mix.weight})


def test_heads_that_are_off_send_nothing_to_a_plain_module_and_receive_nothing():
    graph, z, x, active = WrappedModule(Talk().double(), H), nodes(), contexts(), some_active()
    y = graph(z, x, (), active)
    on = active.unsqueeze(-1)
    assert torch.equal(y[~active], z[~active])
    assert_equal_to(y[active], graph.module(z * on, x)[active])
    assert torch.equal(graph(torch.where(on, z, float("nan")), x, (), active)[active], y[active])
    assert torch.equal(graph(z, x), graph.module(z, x))


# Graphs of one's own.


def test_a_users_graph_gives_a_loss_under_its_own_name():
    graph = Mean(H).double()
    nn.init.constant_(graph.share, 0.3)
    router = trained_like(goh.HeadRouter(M, H, 2, 2))
    module = goh.MultiHeadAttention(M, H, output_graph=graph, router=router).double()
    x, seen = contexts(), []
    graph.register_forward_hook(lambda module, inputs, z: seen.append(inputs[0]))
    real = torch.arange(T) < torch.tensor([[T], [4]])
    losses = {"spread": [torch.zeros(())], "alignment": []}
    heads = module(x, token_mask=real, losses=losses)[1]
    counted = heads.routing.active & real.unsqueeze(-1)
    assert losses["alignment"] == [] and len(losses["spread"]) == 2
    assert_equal_to(losses["spread"][1], 0.3 * seen[0].var(dim=-1)[counted].mean())
    losses["spread"][1].backward()
    assert graph.share.grad != 0
    asked = {"alignment": []}
    assert torch.equal(module(x, losses=asked)[0], module(x)[0]) and asked == {"alignment": []}


def test_a_users_graph_over_other_heads_or_at_another_site_is_refused():
    with pytest.raises(ValueError, match=r"over 5 heads at outputs \(got Mean over 3\)"):
        goh.MultiHeadAttention(M, H, output_graph=Mean(3))
    with pytest.raises(ValueError, match="can stand at scores .got Mean, which is for keys, outputs, queries, values"):
        goh.MultiHeadAttention(M, H, score_graph=Mean(H))
    with pytest.raises(ValueError, match="over 1 heads at keys"):
        goh.MultiHeadAttention(M, H, num_kv_heads=1, inner_graphs={"key": Mean(H)})
    assert isinstance(OwnContext(H, D, M), SiteGraph)
