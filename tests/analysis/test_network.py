from __future__ import annotations

import os

import networkx as nx
import pytest
import torch
from helpers import small_config, trained_like
from torch_geometric.data import Data

import gohgraph as goh
from gohgraph.analysis.network import EDGE_ATTRIBUTES, HEAD_SCORES, NODE_ATTRIBUTES, WORDS
from gohgraph.analysis.network_columns import residual_edges


def recorded(graph="outputs", model_class=goh.LanguageModel, **settings):
    model = trained_like(model_class(small_config(graph, **settings)))
    with torch.no_grad(), goh.record(model) as heads:
        tokens = [torch.randint(0, 13, (2, 7)) for _ in range(1 + (model_class is goh.Transformer))]
        model(*tokens)
    return model, heads


def assert_same(first, second):
    assert torch.equal(first.edge_index, second.edge_index) and first.num_nodes == second.num_nodes
    assert first.attributes() == second.attributes()
    for name in (*first.attributes()[0], *first.attributes()[1]):
        if name in WORDS:
            assert first[name] == second[name], name
        else:
            torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("graph", ["outputs", "scores-ring", "rounds", "cross-layer", "top-edges", "moh-outputs"])
def test_every_edge_of_every_graph_is_there(graph):
    _, heads = recorded(graph)
    network = goh.head_graph_of(heads)
    assert isinstance(network, Data) and network.validate()
    assert network.num_nodes == 15 and network.label[7] == "1.2"
    expected = []
    for name, recording in heads.items():
        layer = int(name.split(".")[2])
        for number in range(len(recording.mean)):
            for e, (j, i) in enumerate(recording.edge_index.t().tolist()):
                statistics = (recording.mean, recording.std, recording.share)
                numbers = [statistic[number, e].item() for statistic in statistics]
                expected.append(((layer - j // 5) * 5 + j % 5, layer * 5 + i, name, number + 1, *numbers))
    columns = [*network.edge_index.tolist(), network.graph]
    columns += [network[name].tolist() for name in ("round", "mean", "std", "share")]
    assert list(zip(*columns, strict=True)) == expected
    if graph == "cross-layer":
        assert (network.layer[network.edge_index[0]] < network.layer[network.edge_index[1]]).any()


def test_nodes_know_their_kind_and_load():
    model, heads = recorded("moh-outputs")
    network = goh.head_graph_of(heads)
    assert network.kind == ["shared", "shared", "routed", "routed", "routed"] * 3
    loads = torch.cat([heads[f"decoder.layers.{layer}.attention.object.output_graph"].load for layer in range(3)])
    assert torch.equal(network.load, loads)
    assert torch.allclose(goh.head_graph_of(model).load, torch.tensor([1.0, 1.0, 2 / 3, 2 / 3, 2 / 3] * 3).double())
    assert set(goh.head_graph_of(recorded()[1]).kind) == {"head"}


@torch.no_grad()
def test_a_model_alone_gives_its_weights_at_a_context_of_zero():
    model, _ = recorded("rounds")
    network = goh.head_graph_of(model)
    expected = torch.cat([m.edges.bias.tanh().flatten() for m in model.modules() if isinstance(m, goh.HeadGraphConv)])
    assert torch.equal(network.mean, expected) and not network.std.any()


def test_importances_are_attached():
    _, heads = recorded("outputs")
    blocks = {name.rpartition(".")[0]: torch.rand(5) for name in heads}
    edges = {name: torch.rand(25) for name in list(heads)[:2]}
    network = goh.head_graph_of(heads, importance=blocks, edge_importance=edges)
    torch.testing.assert_close(network.importance, torch.cat([*blocks.values()]).double())
    torch.testing.assert_close(network.edge_importance[:50], torch.cat([*edges.values()]).double())
    assert network.edge_importance[50:].isnan().all()
    assert "importance" not in goh.head_graph_of(heads)


def test_a_translator_and_fewer_key_value_heads():
    _, heads = recorded("rounds", goh.Transformer, num_layers=2)
    network = goh.head_graph_of(heads)
    assert network.num_nodes == 30 and len(set(network.label)) == 30
    assert network.blocks[:3] == ["encoder layer 0", "encoder layer 1", "decoder layer 0"]
    graphs = goh.HeadGraphConfig(keys=goh.SiteConfig())
    config = goh.TransformerConfig(13, d_model=24, num_heads=6, num_kv_heads=3, num_layers=1, head_graph=graphs)
    network = goh.head_graph_of(goh.LanguageModel(config))
    assert network.kind == ["head"] * 6 + ["key/value"] * 3 and network.num_edges == 36 + 9
    assert network.edge_index[:, 36:].min() == 6


def test_networkx_and_back():
    _, heads = recorded("moh-outputs")
    network = goh.head_graph_of(heads, importance={name.rpartition(".")[0]: torch.rand(5) for name in heads})
    graph = network.to_networkx()
    assert isinstance(graph, nx.MultiDiGraph) and graph.number_of_edges() == network.num_edges
    assert graph.nodes[7]["label"] == "1.2" and graph.nodes[7]["kind"] == "routed"
    assert_same(goh.HeadNetwork.from_networkx(graph), network)
    del graph.nodes[3]["load"]
    with pytest.raises(ValueError, match="Expected the attribute 'load'"):
        goh.HeadNetwork.from_networkx(graph)


@pytest.mark.parametrize("suffix", ["graphml", "gexf", "json", "csv", "JSON"])
@pytest.mark.parametrize("graph", ["moh-outputs", "rounds", "cross-layer"])
def test_files_round_trip(tmp_path, suffix, graph):
    _, heads = recorded(graph)
    first = next(iter(heads))
    network = goh.head_graph_of(
        heads,
        importance={first.rpartition(".")[0]: torch.rand(5)},
        edge_importance={first: torch.rand(heads[first].edge_index.shape[1])},
    )
    path = tmp_path / f"heads.{suffix}"
    goh.save_head_graph(network, path)
    assert_same(goh.load_head_graph(path), network)
    assert {*NODE_ATTRIBUTES, *EDGE_ATTRIBUTES} - set(HEAD_SCORES) <= set(network.keys())
    assert sorted(os.listdir(tmp_path)) == [f"heads.{suffix}"] + ["heads.nodes.csv"] * (suffix == "csv")


@pytest.mark.parametrize("suffix", ["graphml", "gexf", "json", "csv"])
def test_damaged_files_are_refused(tmp_path, suffix):
    path = tmp_path / f"heads.{suffix}"
    goh.save_head_graph(goh.head_graph_of(recorded()[1]), path)
    path.write_text(path.read_text()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="^Expected a head graph written by save_head_graph"):
        goh.load_head_graph(path)


def test_bad_files(tmp_path):
    network = goh.head_graph_of(recorded()[1])
    with pytest.raises(ValueError, match=r"Expected a file name that ends in \.graphml, .*got .*heads\.txt"):
        goh.save_head_graph(network, tmp_path / "heads.txt")
    with pytest.raises(ValueError, match="Expected a file that ends in"):
        goh.load_head_graph(tmp_path / "heads.txt")
    with pytest.raises(OSError):
        goh.load_head_graph(tmp_path / "heads.json")
    with pytest.raises(ValueError, match="Expected a recording of at least one token"):
        goh.head_graph_of({})
    with pytest.raises(ValueError, match="Expected a model with head graphs"):
        goh.head_graph_of(torch.nn.Linear(2, 2))


def test_senders_without_a_graph_of_their_own_are_there():
    _, heads = recorded("cross-layer")
    name = list(heads)[-2]
    network = goh.head_graph_of({name: heads[name]})
    assert network.blocks == ["layer 1", "layer 2"] and network.layer.tolist() == [1] * 5 + [2] * 5
    assert torch.equal(network.edge_index[0], (heads[name].edge_index[0] + 5) % 10)
    heads[name].reach = 0
    with pytest.raises(ValueError, match=r"^Expected 1 layers before decoder.layers.2.*got 0.*Do record"):
        goh.head_graph_of({name: heads[name]})


def test_strongest_edges_by_weight_and_by_importance():
    _, heads = recorded("outputs")
    name = list(heads)[1]
    network = goh.head_graph_of(heads, edge_importance={n: torch.arange(25.0) * (n == name) for n in heads})
    means = [edge["mean"] for edge in network.strongest(7)]
    assert [abs(mean) for mean in means] == sorted(network.mean.abs().tolist(), reverse=True)[:7]
    best = network.strongest(1, by="edge_importance")[0]
    assert best["edge_importance"] == 24 and (best["sender"], best["receiver"]) == ("1.4", "1.4")


@pytest.mark.parametrize("suffix, read", [("gexf", nx.read_gexf), ("graphml", nx.read_graphml)])
def test_gephi_is_given_weights_places_and_what_holds_layers_together(tmp_path, suffix, read):
    network = goh.head_graph_of(recorded("outputs")[1])
    network.mean[3] = float("nan")
    goh.save_head_graph(network, path := tmp_path / f"heads.{suffix}")
    assert_same(goh.load_head_graph(path), network)
    graph = read(path, node_type=int)
    assert nx.is_weakly_connected(graph)
    edges = [values for *_, values in graph.edges(data=True)]
    own = [values for values in edges if values["site"] != "residual"]
    assert len(edges) - len(own) == 10 and all(values["weight"] > 0 for values in edges if values not in own)
    assert sorted(values["weight"] for values in own) == sorted(network.mean.abs().nan_to_num().tolist())
    seen = graph.nodes[7]
    place = seen if suffix == "graphml" else seen["viz"]["position"] | {"size": seen["viz"]["size"]}
    assert (place["x"], place["y"], place["size"], seen["label"]) == (80.0, 60.0, 24.0, "1.2")


def test_layers_that_edges_join_have_no_residual_edges():
    assert residual_edges(goh.head_graph_of(recorded("cross-layer")[1])) == []
    assert len(residual_edges(goh.head_graph_of(recorded("rounds", goh.Transformer, num_layers=2)[1]))) == 20


def test_an_empty_network_and_odd_numbers_are_written(tmp_path):
    network = goh.head_graph_of(recorded("outputs")[1])
    network.mean[0], network.std[1] = float("inf"), float("-inf")
    for suffix in ("gexf", "graphml", "json", "csv"):
        goh.save_head_graph(network, tmp_path / f"odd.{suffix}")
        assert_same(goh.load_head_graph(tmp_path / f"odd.{suffix}"), network)
