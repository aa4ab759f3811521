from __future__ import annotations

import dataclasses
import json

import pytest
from helpers import GRAPHS, small_config

from gohgraph import ClassifierConfig, HeadGraphConfig, HeadGraphConv, RoutingConfig, SiteConfig, TransformerConfig

EDGES = ((0, 1), (1, 2), (2, 0))
CONFIGS = [
    *(small_config(graph) for graph in GRAPHS),
    small_config(norm="rms", dropout=0.1, positions="learned", bias=False, tie_embeddings=False, num_kv_heads=1),
    TransformerConfig(7, head_graph=HeadGraphConfig(SiteConfig(EDGES), SiteConfig("small-world", {"rewire": 0.5}))),
    ClassifierConfig(small_config("rounds"), num_classes=3, patch_size=2, channels=1),
    HeadGraphConfig(None, None),
    HeadGraphConfig.moh(1, (4, 1, 3), straight_through=True, balance_loss=0.5, z_loss=0.001, bias_rate=0.01),
    HeadGraphConfig.graph_experts(2, rounds=3, top_k=(1, 2, 3), alignment=0.2, rank=3),
    small_config("moh", num_layers=2),
    HeadGraphConfig(layers=(-2, -1)),
    RoutingConfig(2, 4),
    RoutingConfig(5, (0, 0)),
    SiteConfig(topology=()),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_round_trip_through_json(config):
    again = type(config).from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.to_dict() == config.to_dict()


def test_custom_edges_come_back_as_the_same_graph():
    site = SiteConfig.from_dict(json.loads(json.dumps(SiteConfig(topology=EDGES, self_loops=False).to_dict())))
    assert site.topology == EDGES
    assert HeadGraphConv.from_config(site, 3, 5, 7).edge_index.tolist() == [[2, 0, 1], [0, 1, 2]]


NEWER = ("kind", "num_shared", "keep_in_degree")
EARLIER = {"num_shared": None, "keyed": False, "in_degree": None}


@pytest.mark.parametrize(
    ("flags", "site"),
    [
        ({}, SiteConfig(rank=3)),
        ({"num_shared": 2}, SiteConfig(rank=3, kind="experts", num_shared=2)),
        ({"in_degree": 4}, SiteConfig(rank=3, kind="learned", keep_in_degree=4)),
        ({"keyed": True}, SiteConfig(rank=3, kind="keyed")),
    ],
    ids=str,
)
@pytest.mark.parametrize("whole", [True, False])
def test_dictionaries_without_a_kind_load(flags, site, whole):
    """Three flags said it before there was a kind; whole dictionaries had all of them, written by hand only some."""
    rest = {name: value for name, value in SiteConfig(rank=3).to_dict().items() if name not in NEWER}
    values = json.loads(json.dumps({**rest, **(EARLIER if whole else {}), **flags}))
    before = json.dumps(values)
    assert SiteConfig.from_dict(values) == site and json.dumps(values) == before
    for place in ("outputs", "scores"):
        assert getattr(HeadGraphConfig.from_dict({"outputs": None, place: values}), place) == site
        assert getattr(HeadGraphConfig.from_dict({"outputs": None, place: [values]}), place) == (site,)


@pytest.mark.parametrize("in_degree", [1, 2, 4])
def test_ring_counts_the_self_loop(in_degree):
    conv = HeadGraphConv.from_config(SiteConfig.ring(in_degree, rounds=3), 7, 5, 11)
    assert conv.edge_index[1].bincount().tolist() == [in_degree] * 7
    assert conv.rounds == 3


def test_configurations_cannot_be_changed():
    options = {"hops": 2}
    site = SiteConfig("ring", options)
    options["hops"] = 3
    site.to_dict()["options"]["hops"] = 4
    assert site.options == {"hops": 2}
    with pytest.raises(dataclasses.FrozenInstanceError):
        site.rank = 3


def test_repr_shows_what_differs_from_the_defaults():
    assert repr(SiteConfig()) == "SiteConfig()"
    site = SiteConfig("ring", {"hops": 2}, rank=3)
    assert eval(repr(site)) == site


def test_moh_is_routing_without_messages():
    config = HeadGraphConfig.moh(2, 3, z_loss=0.1)
    assert config.outputs is None and config.scores is None and config.alignment == 0
    assert config.routing == RoutingConfig(2, 3, z_loss=0.1)


def test_graph_experts_are_bipartite_between_kinds():
    config = HeadGraphConfig.graph_experts(3, top_k=2, alignment=0.1, edges="static")
    site = SiteConfig("bipartite", {"num_shared": 3}, rounds=2, kind="experts", num_shared=3, edges="static")
    assert config.outputs == site and config.scores is None and config.alignment == 0.1
    assert config.routing == RoutingConfig(3, 2)
    assert HeadGraphConfig.graph_experts(3).routing is None and HeadGraphConfig.graph_experts(3, 5).outputs.rounds == 5


def test_budgets_come_back_as_a_tuple():
    config = small_config("moh", num_layers=2)
    graphs = HeadGraphConfig.moh(1, [3, 4])
    assert graphs.routing.top_k == (3, 4) and hash(graphs.routing) == hash(RoutingConfig(1, (3, 4)))
    config = dataclasses.replace(config, head_graph=graphs)
    again = TransformerConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.head_graph.routing.top_k == (3, 4)


@pytest.mark.parametrize("shared,top_k", [(0, 5), (0, 1), (2, 3), (4, 1), (5, 0), (2, (1, 2, 3)), (5, (0, 0, 0))])
def test_every_possible_budget_is_accepted(shared, top_k):
    graphs = HeadGraphConfig.moh(shared, top_k)
    assert TransformerConfig(13, 30, 5, num_layers=3, head_graph=graphs).head_graph is graphs


@pytest.mark.parametrize(
    "shared,top_k",
    [(0, 6), (0, 0), (2, 4), (2, 0), (5, 1), (6, 0), (6, 1), (2, (1, 2)), (2, (1, 2, 3, 3)), (2, (1, 0, 3)),
     (2, (1, 4, 3)), (5, (0, 1, 0))],
)  # fmt: skip
def test_budgets_that_do_not_fit_heads_or_layers_are_refused(shared, top_k):
    graphs = HeadGraphConfig.moh(shared, top_k)
    with pytest.raises(ValueError, match=r"^Expected .*\(got .*\)\. Do "):
        TransformerConfig(13, 30, 5, num_layers=3, head_graph=graphs)


def test_dictionaries_without_layers_have_graphs_in_all():
    whole = HeadGraphConfig().to_dict()
    assert whole.pop("layers") is None and HeadGraphConfig.from_dict(whole) == HeadGraphConfig()


def test_layers_count_from_both_ends_and_leave_the_routing_everywhere():
    graphs = HeadGraphConfig.graph_experts(2, top_k=1, alignment=0.1)
    chosen = dataclasses.replace(graphs, layers=(0, -2))
    bare = HeadGraphConfig(None, routing=graphs.routing, layers=(0, -2))
    assert [chosen.at_layer(index, 4) for index in range(4)] == [chosen, bare, chosen, bare]
    assert [graphs.at_layer(index, 4) for index in range(4)] == [graphs] * 4


@pytest.mark.parametrize("layers", [(2,), (0, -3)])
def test_layers_that_the_stack_has_not_are_refused(layers):
    with pytest.raises(ValueError, match=r"^Expected layers among the 2 .* \(got .*(2|-3)\]\)\. Do "):
        HeadGraphConfig(layers=layers).at_layer(0, 2)


@pytest.mark.parametrize("site", [None, SiteConfig()])
def test_an_alignment_needs_experts(site):
    with pytest.raises(ValueError, match="^Expected graph experts at outputs for an alignment"):
        HeadGraphConfig(site, alignment=0.1)


def routing(**change):
    return RoutingConfig(**{"num_shared": 2, "top_k": 3, **change})


def transformer(**change):
    return TransformerConfig(**{"vocab_size": 13, "d_model": 30, "num_heads": 5, **change})


def classifier(**change):
    return ClassifierConfig(**{"transformer": transformer(), "num_classes": 3, **change})


def experts(**change):
    return SiteConfig(**{"topology": "bipartite", "kind": "experts", "num_shared": 2, **change})


def learned(**change):
    return SiteConfig(**{"kind": "learned", "keep_in_degree": 2, **change})


REFUSED = [
    (transformer, "d_model", [0, -5, 31, 2.5, True, "30", None]),
    (transformer, "vocab_size", [0, 2.5, None]),
    (transformer, "num_heads", [0, 7, True]),
    (transformer, "num_kv_heads", [0, 2, 10, 1.0, True]),
    (transformer, "num_layers", [0, -1, "6"]),
    (transformer, "d_ff", [0, 1.5]),
    (transformer, "max_length", [0, None]),
    (transformer, "activation", ["silu", None, []]),
    (transformer, "positions", ["alibi", None]),
    (transformer, "norm", ["batch", None]),
    (transformer, "norm_first", [1, None, "yes"]),
    (transformer, "residual", ["highway", None, 4]),
    (transformer, "bias", [0, None]),
    (transformer, "tie_embeddings", [1]),
    (transformer, "dropout", [-0.1, 1, 1.5, float("nan"), True, "0.1", None]),
    (transformer, "head_graph", ["ring", SiteConfig(), {}]),
    (classifier, "transformer", [None, {}]),
    (classifier, "num_classes", [0, 2.5]),
    (classifier, "patch_size", [0, 2.5, True]),
    (classifier, "channels", [0, None]),
    (HeadGraphConfig, "outputs", ["ring", {}, HeadGraphConfig()]),
    (HeadGraphConfig, "scores", ["ring"]),
    (HeadGraphConfig, "routing", ["moh", {}, (2, 3), HeadGraphConfig()]),
    (HeadGraphConfig, "layers", [(), 1, (1.0,), (True,), ("0",), {0: 1}]),
    (HeadGraphConfig, "alignment", [-0.1, float("nan"), float("inf"), True, "0.1", None]),
    (routing, "num_shared", [-1, 2.5, True, None]),
    (routing, "top_k", [-1, 2.5, True, None, "3", (), (3, -1), (3, 0.5), (3, True), ((3,),)]),
    (routing, "straight_through", [1, None]),
    (routing, "balance_loss", [-0.1, float("nan"), float("inf"), True, "0.1", None]),
    (routing, "z_loss", [-0.1, float("nan"), None]),
    (routing, "bias_rate", [-0.1, float("nan"), None]),
    (SiteConfig, "learning_rate_factor", [0, -1, float("nan"), True, "2", None]),
    (SiteConfig, "top_edges", [0, -1, 1.5, True, "2"]),
    (experts, "num_shared", [0, -1, 1.5, True, None]),
    (learned, "keep_in_degree", [0, -1, 1.5, True, None]),
    (SiteConfig, "kind", ["gate", None, True]),
    (SiteConfig, "num_shared", [2]),
    (SiteConfig, "keep_in_degree", [2]),
    (SiteConfig, "topology", [5, None, ((1, 2, 3),), ((0.5, 1),), ((True, 1),), (("0", "1"),), (3,), {"a": 1}]),
    (SiteConfig, "options", [None, [("hops", 3)], {3: 4}, {"hops": {1, 2}}]),
    (SiteConfig, "self_loops", [1, None]),
    (SiteConfig, "edges", ["gat", None]),
    (SiteConfig, "rank", [0, 1.5, True, "3"]),
    (SiteConfig, "activation", ["relu", "none"]),
    (SiteConfig, "rounds", [0, 1.5, True]),
    (SiteConfig, "cross_layer", [-1, 0.5, True]),
    (SiteConfig, "norm", [1, "rms"]),
    (SiteConfig, "backend", ["triton", None]),
]
CASES = [(build, name, value) for build, name, values in REFUSED for value in values]


@pytest.mark.parametrize("build,name,value", CASES, ids=[f"{name}={value!r}" for _, name, value in CASES])
def test_wrong_values_are_refused(build, name, value):
    build()
    with pytest.raises((TypeError, ValueError), match=r"^Expected .*\(got .*\)\. Do "):
        build(**{name: value})


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_unknown_keys_are_refused(config):
    with pytest.raises(ValueError, match=r"^Expected keys of .*\(got \['no_such_key'\]\)\. Do "):
        type(config).from_dict({**config.to_dict(), "no_such_key": 1})


@pytest.mark.parametrize("path", [("head_graph",), ("head_graph", "scores"), ("head_graph", "routing")])
def test_unknown_keys_are_refused_inside(path):
    values = small_config("moh-outputs").to_dict()
    inner = values
    for name in path:
        inner = inner[name]
    inner["no_such_key"] = 1
    with pytest.raises(ValueError, match="^Expected keys of "):
        TransformerConfig.from_dict(values)


@pytest.mark.parametrize(
    "kind,values",
    [
        (TransformerConfig, None), (TransformerConfig, {}), (TransformerConfig, {1: 2, "a": 3}),
        (TransformerConfig, {"vocab_size": 7, "head_graph": "ring"}), (ClassifierConfig, {"num_classes": 3}),
        (ClassifierConfig, {"num_classes": 3, "transformer": None}), (HeadGraphConfig, {"outputs": 5}),
        (SiteConfig, [1]), (HeadGraphConfig, {"routing": 5}), (HeadGraphConfig, {"routing": {"num_shared": 2}}),
        (RoutingConfig, {"num_shared": 2, "top_k": {"0": 3}}),
    ],
)  # fmt: skip
def test_dictionaries_of_another_form_are_refused(kind, values):
    with pytest.raises((TypeError, ValueError), match="^Expected .* Do "):
        kind.from_dict(values)
