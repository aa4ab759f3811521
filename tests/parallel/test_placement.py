from __future__ import annotations

import pytest
import torch
from helpers import GRAPHS, assert_equal_to, small_config, trained_like

from gohgraph import HeadGraphConfig, LanguageModel, SiteConfig, TransformerConfig, head_graph
from gohgraph.parallel import cut_weight, place_heads, plan_exchange, reorder_heads

ORDER = [1, 0, 4, 2, 3]
REORDERED = [name for name in GRAPHS if name != "experts"]


@pytest.mark.parametrize("name", REORDERED)
def test_another_order_of_heads_computes_the_same(name, tmp_path):
    model = trained_like(LanguageModel(small_config(name))).eval()
    tokens = torch.randint(13, (2, 7))
    expected = model(tokens).logits
    reorder_heads(model, ORDER)
    assert_equal_to(model(tokens).logits, expected)
    model.save_pretrained(tmp_path)
    assert_equal_to(LanguageModel.from_pretrained(tmp_path).eval()(tokens).logits, expected)


def test_heads_in_shuffled_groups_are_brought_together():
    torch.manual_seed(1)
    shuffled = torch.randperm(12)
    graph = head_graph(12, shuffled[head_graph(12, "groups", ranks=3).edge_index], self_loops=False)
    order, pairs = place_heads(graph, ranks=3), graph.edge_index.t().tolist()
    assert sorted(order) == list(range(12)) and cut_weight(graph, 3) > 0 == cut_weight(graph, 3, order)
    config = TransformerConfig(
        13, d_model=48, num_heads=12, num_layers=1, d_ff=8, head_graph=HeadGraphConfig(SiteConfig(pairs))
    )
    model = reorder_heads(LanguageModel(config), order)
    edges = model.decoder.layers[0].attention.object.output_graph.edge_index.t().tolist()
    assert plan_exchange(12, 3, edges).kind == "nothing"


def test_weights_decide_which_edges_are_cut():
    graph = head_graph(4, [(0, 1), (1, 2), (2, 3), (3, 0)], self_loops=False)
    weights = torch.where((graph.edge_index == torch.tensor([[1], [2]])).all(dim=0), 5.0, 1.0)
    assert cut_weight(graph, 2, weights=weights) == 6
    assert cut_weight(graph, 2, place_heads(graph, 2, weights), weights) == 2


def test_the_order_as_it_is_stays_where_none_is_better():
    assert place_heads(head_graph(8, "groups", ranks=4), 4) == list(range(8))
    assert place_heads(head_graph(6, "complete"), 3) == list(range(6))


@pytest.mark.parametrize(
    ("name", "order", "told"),
    [
        ("moh", [2, 0, 1, 3, 4], "shares"),
        ("experts", ORDER, "HeadGraphConv"),
        ("outputs", [0, 0, 1, 2, 3], "permutation"),
    ],
)
def test_orders_that_would_change_the_model_are_refused(name, order, told):
    model = LanguageModel(small_config(name))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=told):
        reorder_heads(model, order)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_ranks_divide_the_heads():
    with pytest.raises(ValueError, match="Expected ranks to divide 8 heads"):
        place_heads(head_graph(8), 3)
