from __future__ import annotations

import pytest
import torch
from stock_models import NAMES, ByHand, by_hand, linear_part, stock, stock_inputs

import gohgraph as goh
from gohgraph.analysis.architectures import wiring_of
from gohgraph.analysis.module_names import block_of
from gohgraph.analysis.parts import Weights, Where, written
from gohgraph.analysis.traces import run, trace
from gohgraph.analysis.unit_network import UnitNodes

STREAMS = ("", "encoder", "decoder")


def metric_of(name):
    """One number for each example."""
    if name in ("vit", "dinov2"):
        return lambda output: output.logits[:, 3] - output.logits[:, 5]
    return lambda output: output.logits[:, -1, 5] - output.logits[:, -1, 7] + output.logits[:, 2, 3]


class Captured(dict):
    """What went into modules in one run."""

    def __init__(self, model, modules, inputs):
        super().__init__()
        hooks = [m.register_forward_pre_hook(lambda m, args: self.__setitem__(m, args[0].detach())) for m in modules]
        with torch.no_grad():
            run(model, inputs)
        for hook in hooks:
            hook.remove()


def written_to(blocks, sender: ByHand, reader: ByHand, site: str, seen: Captured):
    """The parts `[H, B, T, M]` of a sender in what a reader reads, by hand."""
    heads = len(sender.queries[1])
    z = seen[sender.output].unflatten(-1, (heads, -1))
    weight = sender.output.weight if type(sender.output).__name__ != "Conv1D" else sender.output.weight.t()
    parts = torch.einsum("bthd,mhd->hbtm", z, weight.unflatten(1, (heads, -1)))
    if sender.post_norm is not None:
        parts = linear_part(sender.post_norm, seen[sender.post_norm], parts)
    on_stream = [b for b in blocks if b.stream == sender.stream]
    is_own = reader in on_stream and (site == "queries" or reader.source_norm is False)
    until = on_stream.index(reader) if is_own else None
    for block in on_stream[on_stream.index(sender) : until]:
        for norm in block.stream_norms:
            parts = linear_part(norm, seen[norm], parts)
    return parts


def expected_edges(name, model, clean, other, metric):
    """Every edge's slope: of the metric, when a part of the change stands in one reader's input alone; dense, slow."""
    blocks = by_hand(name, model)
    modules = {m for b in blocks for m in (b.output, b.post_norm, *b.stream_norms) if m is not None}
    runs = [Captured(model, modules, inputs) for inputs in (clean, other)]
    inputs_at, hooks, shares = {}, [], {}
    for reader in blocks:
        for site, (module, rows) in zip(("queries", "keys", "values"), reader[2:5], strict=True):
            cross = site != "queries" and reader.source_norm is not False
            norm = reader.source_norm if cross else reader.norm
            stream = "encoder" if cross else reader.stream
            before = [b for b in blocks if b.stream == stream]
            before = before if cross else before[: before.index(reader)]
            if not before:
                continue
            parts = [[written_to(blocks, b, reader, site, seen) for seen in runs] for b in before]
            change = torch.cat([first - second for first, second in parts])
            share = torch.zeros(len(rows), len(change), dtype=torch.double, requires_grad=True)
            shares[blocks.index(reader), site] = share
            watched = norm if norm is not None else module
            hooks.append(watched.register_forward_pre_hook(lambda m, args: inputs_at.__setitem__(m, args[0].detach())))

            def edit(m, args, out, rows=rows, norm=norm, watched=watched, change=change, share=share):
                x = inputs_at[watched]
                moved = x + torch.einsum("rw,wbtm->rbtm", share, change)
                first, second = (x, moved) if norm is None else (norm.forward(x), norm.forward(moved))
                weight = m.weight if type(m).__name__ != "Conv1D" else m.weight.t()
                add = torch.einsum("rbtm,rdm->btrd", second - first, weight[rows])
                return out.index_add(-1, rows.flatten(), add.flatten(-2))

            hooks.append(module.register_forward_hook(edit))
    value = metric(run(model, clean)).sum()
    slopes = torch.autograd.grad(value, list(shares.values()))
    for hook in hooks:
        hook.remove()
    return blocks, dict(zip(shares, slopes, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_attribution_is_the_slope_of_one_reader_with_one_part_changed(name):
    model = stock(name)
    clean, other = (stock_inputs(name, model) for _ in range(2))
    network = goh.attribution_graph(model, clean, against=other, metric=metric_of(name))
    blocks, slopes = expected_edges(name, model, clean, other, metric_of(name))
    names = {id(module): name for name, module in model.named_modules()}
    titles = [names[id(block.output)] for block in blocks]
    found = 0
    for (number, site), slope in slopes.items():
        graph = next(g for g in dict.fromkeys(network.graph) if titles[number].startswith(f"{g}."))
        chosen = torch.tensor([g == graph and s == site for g, s in zip(network.graph, network.site, strict=True)])
        own = 2 * network.mean[chosen].view(-1, len(slope)).T  # mean over two examples
        torch.testing.assert_close(own, slope, rtol=1e-9, atol=1e-9 * float(slope.abs().max()))
        assert slope.abs().max() > 1e-6
        found += slope.numel()
    assert found == sum(block_of(graph) == graph for graph in network.graph)


def tiny(name="llama"):
    model = stock(name)
    return model, *(stock_inputs(name, model) for _ in range(2))


def test_the_sum_of_all_parts_read_is_the_change_of_what_is_read():
    """With all nodes, a linear metric of the end of the stream changes by the sum of the edges into it."""
    model, clean, other = tiny()
    model.model.norm.forward = lambda x: x
    direction = torch.randn(97, dtype=torch.double)
    metric = lambda output: (output.logits @ direction).sum(dim=1)  # noqa: E731
    nodes = ("embedding", "mlp", "logits")
    network = goh.attribution_graph(model, clean, against=other, metric=metric, nodes=nodes)
    with torch.no_grad():
        change = metric(model(**clean)) - metric(model(**other))
    into = torch.tensor([site == "logits" for site in network.site])
    assert network.mean[into].sum().item() == pytest.approx(change.mean().item(), rel=1e-9)
    # Heads, feed-forwards and the embedding: every writer once.
    assert into.sum() == 2 * 6 + 2 + 1
    assert sorted(set(network.kind)) == ["embedding", "head", "key/value", "logits", "mlp"]
    assert network.blocks == ["embedding", "layer 0", "layer 1", "logits"]


@pytest.mark.parametrize("name", ["gemma2", "gpt_neox", "t5"])
def test_parts_add_up_in_every_kind_of_block(name):
    model, clean, other = tiny(name)
    watched = {
        "gemma2": lambda: model.model.layers[-1].input_layernorm,
        "gpt_neox": lambda: model.gpt_neox.layers[-1].input_layernorm,
        "t5": lambda: model.decoder.block[-1].layer[0].layer_norm,
    }[name]()  # fmt: skip
    reads = []
    hook = watched.register_forward_pre_hook(lambda m, args: reads.append(args[0].detach()))
    for inputs in (clean, other):
        run(model, inputs)
    hook.remove()
    change = reads[0] - reads[1]
    wiring = wiring_of(model)
    table, weights = UnitNodes(wiring, ("embedding", "mlp")), Weights(model, wiring, change.shape[-1])
    seen = [trace(model, wiring, inputs)[0] for inputs in (clean, other)]
    reader = [r for r in table.readers if r.site == "queries"][-1 if name != "t5" else -2]
    where = Where(1, torch.arange(change.shape[1]))
    total = 0
    for writer in table.edges_into(reader):
        first, second = (written(writer, one, weights, where) for one in seen)
        total = total + (first - second).sum(dim=0)
    torch.testing.assert_close(total, change[1], rtol=1e-9, atol=1e-9)


def test_padding_changes_nothing():
    model, clean, other = tiny()
    metric = metric_of("llama")
    expected = goh.attribution_graph(model, clean, against=other, metric=metric)
    pad = torch.zeros(2, 3, dtype=torch.long)
    mask = torch.cat([pad, torch.ones(2, 7, dtype=torch.long)], dim=1)
    padded = [{"input_ids": torch.cat([pad, x["input_ids"]], 1), "attention_mask": mask} for x in (clean, other)]
    positions = {"position_ids": torch.cat([pad, torch.arange(7).expand(2, -1)], dim=1)}
    shifted = lambda output: metric(type(output)(logits=output.logits[:, 3:]))  # noqa: E731
    network = goh.attribution_graph(model, padded[0] | positions, against=padded[1] | positions, metric=shifted)
    torch.testing.assert_close(network.mean, expected.mean, rtol=1e-6, atol=1e-8)
    # The mean over the batch leaves padding out.
    alone = goh.attribution_graph(model, clean, against="mean", metric=metric)
    network = goh.attribution_graph(model, padded[0] | positions, against="mean", metric=shifted)
    torch.testing.assert_close(network.mean, alone.mean, rtol=1e-6, atol=1e-8)


def test_zero_and_mean_take_the_place_of_another_input():
    model, clean, _ = tiny()
    zero = goh.attribution_graph(model, clean, against="zero", metric=metric_of("llama"))
    mean = goh.attribution_graph(model, clean, against="mean", metric=metric_of("llama"))
    assert not torch.allclose(zero.mean, mean.mean)
    twice = {"input_ids": clean["input_ids"][:1].expand(2, -1)}
    same = goh.attribution_graph(model, twice, against="mean", metric=metric_of("llama"))
    assert same.mean.abs().max() < 1e-12 and same.std.abs().max() < 1e-12
    # One example is its own mean: every edge would be 0.
    one = {"input_ids": clean["input_ids"][:1]}
    for measure in (goh.attribution_graph, lambda model, *args, **on: goh.faithfulness(model, zero, *args, **on)):
        with pytest.raises(ValueError, match="Expected several examples for against='mean' .got 1"):
            measure(model, one, against="mean", metric=metric_of("llama"))


def test_steps_integrate_the_slope_along_the_way():
    model, clean, other = tiny()
    metric, middle = metric_of("llama"), []
    norm = model.model.layers[0].input_layernorm
    hook = norm.register_forward_pre_hook(lambda m, args: middle.append(args[0].detach()))
    two = goh.attribution_graph(model, clean, against=other, metric=metric, steps=2)
    hook.remove()
    start, end = (model.model.embed_tokens(x["input_ids"]) for x in (other, clean))
    assert any(torch.allclose(x, (start + end) / 2) for x in middle) and any(torch.allclose(x, end) for x in middle)
    one = goh.attribution_graph(model, clean, against=other, metric=metric)
    assert not torch.allclose(one.mean, two.mean)


def test_tokens_add_up_to_the_whole():
    model, clean, other = tiny()
    network = goh.attribution_graph(model, clean, against=other, metric=metric_of("llama"), every_token=True)
    assert network.by_token.shape == (network.num_edges, 7)
    torch.testing.assert_close(network.by_token.sum(dim=1), network.mean)


def hooks_of(model):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def test_nothing_stays_behind_also_after_an_error():
    model, clean, other = tiny()
    model.train()
    model.model.layers[0].eval()
    parameters = list(model.parameters())
    parameters[3].requires_grad_(False)
    before = [m.training for m in model.modules()], hooks_of(model), [p.requires_grad for p in parameters]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    goh.attribution_graph(model, clean, against=other, metric=metric_of("llama"))

    def fails(output):
        raise RuntimeError("metric")

    with pytest.raises(RuntimeError, match="metric"):
        goh.attribution_graph(model, clean, against=other, metric=fails)
    with pytest.raises(ValueError, match="input_ids"):
        goh.attribution_graph(model, {"nonsense": 1}, against=other, metric=metric_of("llama"))
    assert ([m.training for m in model.modules()], hooks_of(model), [p.requires_grad for p in parameters]) == before
    assert all(p.grad is None for p in parameters) and model.config._attn_implementation == "sdpa"
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_what_does_not_fit_is_refused():
    model, clean, other = tiny()
    metric = metric_of("llama")
    with pytest.raises(ValueError, match="one number for each of 2 examples .got ..."):
        goh.attribution_graph(model, clean, against=other, metric=lambda output: output.logits.mean())
    with pytest.raises(ValueError, match="against of .*got 'nothing'"):
        goh.attribution_graph(model, clean, against="nothing", metric=metric)
    with pytest.raises(ValueError, match="same tokens and padding"):
        goh.attribution_graph(model, clean, against={"input_ids": other["input_ids"][:, :5]}, metric=metric)
    with pytest.raises(ValueError, match="nodes of"):
        goh.attribution_graph(model, clean, against=other, metric=metric, nodes=("neurons",))
    layer = model.model.layers[1]
    plain = layer.self_attn.forward
    layer.self_attn.forward = lambda *args, **kwargs: (0.1 * plain(*args, **kwargs)[0], None)
    with pytest.raises(ValueError, match="residual connections are scaled"):
        goh.attribution_graph(model, clean, against=other, metric=metric)


def test_the_network_is_drawn_saved_and_read(tmp_path):
    model, clean, other = tiny()
    network = goh.attribution_graph(model, clean, against=other, metric=metric_of("llama"), nodes=("mlp", "logits"))
    for suffix in (".json", ".graphml", ".gexf", ".csv"):
        goh.save_head_graph(network, tmp_path / f"heads{suffix}")
        again = goh.load_head_graph(tmp_path / f"heads{suffix}")
        torch.testing.assert_close(again.mean, network.mean)
        assert again.site == network.site and again.label == network.label
    assert network.to_networkx().number_of_edges() == network.num_edges
    goh.draw_network(network, tmp_path / "network.png")
    assert network.strongest(1)[0]["site"] in ("queries", "keys", "values", "mlp", "logits")
