from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from stock_models import NAMES, stock, stock_inputs
from test_attribution_graph import hooks_of, metric_of

import gohgraph as goh
from gohgraph.analysis.faithfulness import Circuit, Faithfulness, edge_minimality, strongest_share
from gohgraph.analysis.mib import save_mib_circuit
from gohgraph.analysis.traces import run

ALL = ("embedding", "mlp", "logits")


def task_of(name):
    model = stock(name)
    clean, other = (stock_inputs(name, model) for _ in range(2))
    return model, clean, {"against": other, "metric": metric_of(name)}


@pytest.mark.parametrize("name", NAMES)
def test_without_any_edge_a_model_is_the_other_run_and_with_all_it_is_itself(name):
    model, clean, task = task_of(name)
    network = goh.attribution_graph(model, clean, **task, nodes=ALL)
    circuit = Circuit(model, network, clean, task["against"], task["metric"])
    nothing = circuit.value(torch.zeros(network.num_edges, dtype=torch.bool))
    one_less = torch.ones(network.num_edges, dtype=torch.bool)
    one_less[network.mean.abs().argmax()] = False
    with torch.no_grad():
        here, there = (task["metric"](run(model, inputs)) for inputs in (clean, task["against"]))
    torch.testing.assert_close(circuit.everything, here, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(circuit.value(one_less), here)
    # Where norms stand on the stream, what biases become depends on the run and belongs to no node.
    if not circuit.wiring.norms:
        torch.testing.assert_close(nothing, there, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "t5"])
def test_an_edge_that_carries_a_little_of_the_other_run_moves_the_metric_by_its_attribution(name):
    model, clean, task = task_of(name)
    network, step = goh.attribution_graph(model, clean, **task), 1e-6
    circuit = Circuit(model, network, clean, task["against"], task["metric"])
    near = Circuit(model, network, clean, clean, task["metric"]).other
    heads = {unit: z.lerp(circuit.other.heads[unit], step) for unit, z in near.heads.items()}
    circuit.other = replace(near, heads=heads)
    for edge in network.mean.abs().argsort(descending=True)[:5].tolist():
        kept = torch.ones(network.num_edges, dtype=torch.bool)
        kept[edge] = False
        change = (circuit.everything - circuit.value(kept)).mean() / step
        assert change.item() == pytest.approx(network.mean[edge].item(), rel=1e-3)


def test_shares_orders_and_intervals():
    model, clean, task = task_of("llama")
    network = goh.attribution_graph(model, clean, **task)
    before = hooks_of(model)
    beside = {"composition": goh.composition_graph(model)}
    measured = goh.faithfulness(model, network, clean, **task, beside=beside, shares=(0.2, 0.5, 1), random=2)
    assert list(measured.values) == ["network", "composition", "random"] and measured.shares == (0.2, 0.5, 1)
    for order in measured.values:
        assert measured.at(1, order).value == pytest.approx(1)
        assert measured.values[order].shape == (3, 2)
        f = [point.value for point in measured.curve(order)]
        assert measured.cpr(order).value == pytest.approx(0.3 * (f[0] + f[1]) / 2 + 0.5 * (f[1] + f[2]) / 2)
    circuit = Circuit(model, network, clean, task["against"], task["metric"])
    kept = strongest_share(network.mean.abs(), 0.2)
    assert kept.sum() == round(0.2 * network.num_edges)
    torch.testing.assert_close(measured.values["network"][0], circuit.value(kept))
    assert hooks_of(model) == before and not any(m.training for m in model.modules())


def test_areas_and_bounds_by_hand():
    f = torch.tensor([[0.0, 0.0], [1.5, 1.5], [1.0, 1.0]]).double()
    measured = Faithfulness((0.0, 0.5, 1.0), {"network": f}, torch.ones(2).double(), torch.zeros(2).double())
    assert measured.cpr() == pytest.approx((1.0, 1.0, 1.0))
    assert measured.cmd().value == pytest.approx(0.5 * (1 + 0.5) / 2 + 0.5 * 0.5 / 2)
    spread = Faithfulness((0.5,), {"network": torch.tensor([[0.0, 1.0, 0.5, 0.7]]).double()},
                          torch.ones(4).double(), torch.zeros(4).double())  # fmt: skip
    value, low, high = spread.at(0.5)
    assert low < value < high and value == pytest.approx(0.55)


def test_minimality_is_the_fall_of_f_without_an_edge():
    model, clean, task = task_of("llama")
    network = goh.attribution_graph(model, clean, **task)
    edges, falls = edge_minimality(model, network, clean, **task, share=0.1)
    assert len(edges) == len(falls) == round(0.1 * network.num_edges)
    circuit = Circuit(model, network, clean, task["against"], task["metric"])
    kept = strongest_share(network.mean.abs(), 0.1)
    whole, none = circuit.value(kept).mean(), circuit.value(torch.zeros_like(kept)).mean()
    kept[edges[1]] = False
    expected = (whole - circuit.value(kept).mean()) / (circuit.everything.mean() - none)
    torch.testing.assert_close(falls[1], expected)


def test_networks_of_other_models_are_refused():
    model, clean, task = task_of("llama")
    network = goh.attribution_graph(stock("gpt2"), stock_inputs("gpt2", stock("gpt2")), against="zero",
                                    metric=metric_of("gpt2"))  # fmt: skip
    with pytest.raises(ValueError, match="network of this model .got 10 nodes and 75 edges"):
        goh.faithfulness(model, network, clean, **task)
    own = goh.attribution_graph(model, clean, **task)
    with pytest.raises(ValueError, match="the same edges as 'composition' has"):
        goh.faithfulness(model, own, clean, **task, beside={"composition": goh.composition_graph(model, "q")})
    with pytest.raises(ValueError, match="a share"):
        goh.faithfulness(model, own, clean, **task, shares=(2,))


def test_mib_reads_every_edge_of_a_circuit(tmp_path):
    model, clean, task = task_of("llama")
    network = goh.attribution_graph(model, clean, **task, nodes=ALL)
    save_mib_circuit(network, tmp_path / "circuit.json", share=0.1)
    saved = json.loads((tmp_path / "circuit.json").read_text())
    assert saved["cfg"]["n_layers"] == 2 and saved["cfg"]["n_heads"] == 6
    assert not saved["cfg"]["parallel_attn_mlp"] and saved["n_pos"] is None
    assert {"input", "a0.h0", "a1.h5", "m1", "logits"} <= set(saved["nodes"])
    # Key and value edges stand at every query head of their group: what MIB knows.
    writers = [1, 1 + 6 + 1]
    assert len(saved["edges"]) == sum(3 * 6 * w for w in writers) + (1 + 6) + (1 + 6 + 1 + 6) + (2 * 6 + 2 + 1)
    kept = [name for name, edge in saved["edges"].items() if edge["in_graph"]]
    assert kept and len(kept) >= round(0.1 * network.num_edges)
    edge = network.strongest(1)[0]
    assert any(e["score"] == pytest.approx(edge["mean"]) for e in saved["edges"].values())
    with pytest.raises(ValueError, match="embedding, mlp, logits"):
        save_mib_circuit(goh.attribution_graph(model, clean, **task), tmp_path / "x.json", share=0.1)
