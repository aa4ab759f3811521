"""Learned edges and those of the residual stream in one network."""

from __future__ import annotations

import pytest
import torch
from helpers import language_model, trained_like, translator, with_graphs
from stock_models import STOCK
from test_attribution_graph import hooks_of

import gohgraph as goh
from gohgraph.analysis.faithfulness import Circuit
from gohgraph.analysis.mib import save_mib_circuit
from gohgraph.analysis.module_names import block_of, site_of
from gohgraph.analysis.strength import edge_strength

GRAPHS = goh.HeadGraphConfig(goh.SiteConfig.ring(2), goh.SiteConfig(), values=goh.SiteConfig())


def metric(output):
    """One number for each example."""
    return output.logits[:, -1, 5] - output.logits[:, -1, 7] + output.logits[:, 2, 3]


def task_of(name):
    if name == "translator":
        tokens = [tuple(torch.randint(3, 13, (2, length)) for length in (5, 7)) for _ in range(2)]
        return translator("outputs").eval(), *tokens
    settings = {"sites": {"num_kv_heads": 1}, "cross-layer": {}}.get(name, {})
    graphs = {"sites": GRAPHS, "cross-layer": goh.HeadGraphConfig(goh.SiteConfig(cross_layer="first"))}.get(name)
    model = language_model(name) if graphs is None else trained_like(goh.LanguageModel(with_graphs(graphs, **settings)))
    return model.eval(), *(torch.randint(3, 13, (2, 7)) for _ in range(2))


def is_learned(network):
    return torch.tensor([block_of(name) != name for name in network.graph])


class Messages:
    """What a graph was given and gave in one run, and the messages of its edges by hand, `[B, T, E, F]`."""

    def __init__(self, conv):
        self.conv, self.share = conv, None

    def __call__(self, conv, args, kwargs, out):
        nodes, context, earlier, active = (*args, *(None, None, (), None)[len(args) :])
        alpha = conv.edge_weight(context, 0, active)
        senders = torch.cat([nodes, *list(earlier)[-1:]], dim=2) if conv.cross_layer else nodes
        self.seen = torch.stack(
            [alpha[..., e, None] * senders[:, :, j] for e, j in enumerate(conv.edge_index[0].tolist())], dim=2
        ).detach()
        if self.share is None:
            return None
        for e, i in enumerate(conv.edge_index[1].tolist()):
            moved = torch.zeros_like(out)
            moved[:, :, i] = self.share[e] * self.change[:, :, e]
            out = out + moved
        return out


@pytest.mark.parametrize("name", ["outputs", "scores-ring", "sites", "cross-layer", "moh-outputs", "translator"])
def test_a_learned_edge_is_worth_the_slope_of_its_message(name):
    """Float64: the derivative of the metric when one message is the other run's in what its receiver receives."""
    model, clean, other = task_of(name)
    network = goh.attribution_graph(model, clean, against=other, metric=metric)
    graphs = {graph: model.get_submodule(graph) for graph in dict.fromkeys(network.graph) if block_of(graph) != graph}
    for graph in graphs:
        if site_of(graph) == "scores":
            model.get_submodule(block_of(graph)).form = "maps"
    run = lambda inputs: model(*inputs) if isinstance(inputs, tuple) else model(inputs)  # noqa: E731
    messages = {graph: Messages(conv) for graph, conv in graphs.items()}
    for graph, conv in graphs.items():
        conv.register_forward_hook(messages[graph], with_kwargs=True)
    seen = []
    for inputs in (clean, other):
        with torch.no_grad():
            run(inputs)
        seen.append({graph: one.seen for graph, one in messages.items()})
    for graph, one in messages.items():
        one.change = seen[0][graph] - seen[1][graph]
        one.share = torch.zeros(one.change.shape[2], dtype=torch.double, requires_grad=True)
    slopes = torch.autograd.grad(metric(run(clean)).sum(), [one.share for one in messages.values()])
    for graph, slope in zip(graphs, slopes, strict=True):
        chosen = torch.tensor([one == graph for one in network.graph])
        torch.testing.assert_close(2 * network.mean[chosen], slope, rtol=1e-9, atol=1e-9 * float(slope.abs().max()))
        assert slope.abs().max() > 1e-6
        heads = graphs[graph].num_heads
        senders, receivers = network.edge_index[:, chosen]
        assert (network.head[receivers] == graphs[graph].edge_index[1]).all()
        assert (network.head[senders] == graphs[graph].edge_index[0] % heads).all()
        if site_of(graph) != "values":
            assert {network.kind[node] for node in senders.tolist()} == {"head"}
    assert is_learned(network).sum() == sum(conv.edge_index.shape[1] for conv in graphs.values())


def test_messages_of_the_same_run_change_nothing_and_all_is_as_it_was():
    model, clean, other = task_of("scores-ring")
    network = goh.attribution_graph(model, clean, against=other, metric=metric)
    before = hooks_of(model), [block.form for block in model.modules() if hasattr(block, "form")]
    # Patched with this run's own messages, a model is itself.
    same = Circuit(model, network, clean, clean, metric)
    torch.testing.assert_close(same.value(~is_learned(network)), same.everything, rtol=1e-12, atol=1e-12)
    assert before == (hooks_of(model), [block.form for block in model.modules() if hasattr(block, "form")])
    measured = goh.faithfulness(
        model, network, clean, against=other, metric=metric, shares=(0.5, 1.0), random=1,
        beside={"composition": goh.composition_graph(model)},
    )  # fmt: skip
    assert measured.at(1.0).value == pytest.approx(1) and list(measured.values)[1] == "composition"


@pytest.mark.parametrize("against", ["other", "mean", "zero"])
def test_a_message_that_is_a_little_of_another_moves_the_metric_by_its_attribution(against):
    model, clean, other = task_of("outputs")
    against = other if against == "other" else against
    network = goh.attribution_graph(model, clean, against=against, metric=metric, every_token=True)
    torch.testing.assert_close(network.by_token.sum(dim=1), network.mean)
    # One layer, one edge: its receiver's output is linear in the message, so that the whole is not far from the slope.
    last = [name for name in dict.fromkeys(network.graph) if block_of(name) != name][-1]
    conv, circuit = model.get_submodule(last), Circuit(model, network, clean, against, metric)
    real, step = circuit.other.sent[last], 1e-6
    hears = Circuit(model, network, clean, clean, metric)
    mine = hears.other.sent[last]
    for edge in network.mean.abs().argsort(descending=True).tolist():
        if network.graph[edge] != last:
            continue
        number = edge - network.graph.index(last)
        ours = mine.received(conv.edge_index[1], 5, torch.arange(len(mine.senders)) == number)
        theirs = real.received(conv.edge_index[1], 5, torch.arange(len(real.senders)) == number)
        hook = conv.register_forward_hook(lambda m, a, out, change=ours - theirs: out - step * change)
        with torch.no_grad():
            moved = metric(model(clean))
        hook.remove()
        change = (circuit.everything - moved).mean() / step
        assert change.item() == pytest.approx(network.mean[edge].item(), rel=1e-3, abs=1e-7)
        break


def test_without_learned_edges_messages_are_part_of_what_heads_write(tmp_path):
    model, clean, other = task_of("outputs")
    whole = goh.attribution_graph(model, clean, against=other, metric=metric)
    alone = goh.attribution_graph(model, clean, against=other, metric=metric, learned=False)
    assert alone.num_edges == int((~is_learned(whole)).sum())
    torch.testing.assert_close(alone.mean, whole.mean[~is_learned(whole)], rtol=0, atol=0)
    Circuit(model, alone, clean, other, metric)
    weights = goh.composition_graph(model)
    strengths = torch.cat(list(edge_strength(model).values()))
    torch.testing.assert_close(weights.mean[is_learned(weights)], strengths, rtol=0, atol=0)
    assert torch.equal(weights.edge_index, whole.edge_index) and weights.site == whole.site
    assert goh.composition_graph(model, learned=False).num_edges == alone.num_edges
    everything = {"nodes": ("embedding", "mlp", "logits")}
    with pytest.raises(ValueError, match="the residual stream alone .got those of 3 head graphs"):
        network = goh.attribution_graph(model, clean, against=other, metric=metric, **everything)
        save_mib_circuit(network, tmp_path / "circuit.json", share=0.1)
    goh.save_head_graph(whole, tmp_path / "heads.json")
    torch.testing.assert_close(goh.load_head_graph(tmp_path / "heads.json").mean, whole.mean)


# BERT's attention module is inside of the block.
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_converted_model_has_both(name):
    model = STOCK[name]().eval()
    goh.convert(model, goh.HeadGraphConfig())
    convs = [m for m in model.modules() if isinstance(m, goh.HeadGraphConv)]
    for conv in convs:
        torch.nn.init.normal_(conv.edges.bias)
    clean, other = (torch.randint(3, 90, (2, 7)) for _ in range(2))
    network = goh.attribution_graph(model, clean, against=other, metric=metric)
    assert is_learned(network).sum() == sum(conv.edge_index.shape[1] for conv in convs)
    assert network.mean[is_learned(network)].abs().max() > 1e-6
    assert goh.faithfulness(model, network, clean, against=other, metric=metric, shares=(1.0,)).at(1.0).value == 1


def test_graphs_whose_edges_do_not_add_up_are_refused():
    for name, reason in (("rounds", "2 rounds"), ("cross-layer", "norm=True"), ("experts", "2 rounds")):
        model, clean, other = language_model(name).eval(), *(torch.randint(3, 13, (2, 7)) for _ in range(2))
        with pytest.raises(ValueError, match=f"sum of their edges' messages in one round .got {reason}"):
            goh.attribution_graph(model, clean, against=other, metric=metric)
        with pytest.raises(ValueError, match="Do pass learned=False"):
            goh.composition_graph(model)
        assert goh.attribution_graph(model, clean, against=other, metric=metric, learned=False).num_edges
    model = STOCK["llama"]().eval()
    goh.convert(model, goh.HeadGraphConfig(None, goh.SiteConfig.ring(2)))
    with pytest.raises(ValueError, match="messages between scores in a converted model"):
        goh.attribution_graph(model, torch.ones(1, 3).long(), against="zero", metric=metric)
