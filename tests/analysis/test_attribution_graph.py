from __future__ import annotations

import pytest
import torch
from stock_models import NAMES, ByHand, by_hand, linear_part, stock, stock_inputs

import gohgraph as goh
from gohgraph.analysis.traces import run

STREAMS = ("", "encoder", "decoder")


def metric_of(name):
    """One number for each example."""
    if name == "vit":
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
    assert found == network.num_edges
