"""Pairs of heads: maps that are subtracted, and keys in one softmax, each against loops over pairs."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_equal_to, trained_like

import gohgraph as goh
from gohgraph.attention.cache import KeyValueCache
from gohgraph.attention.call import NO_MASK, Call, Mask
from gohgraph.attention.forms import FORMS, attend, explain
from gohgraph.graphs.baselines import DifferentialPairs, ExclusiveHeads, PairedHeads, SigmoidGate
from gohgraph.graphs.chain import Chain
from gohgraph.graphs.protocol import Messages
from gohgraph.models.embeddings import RotaryPositions

B, D, M = 2, 3, 13
# T, S, H, G.
SIZES = {"cached": (7, 11, 6, 6), "shared": (7, 7, 6, 3), "four share": (5, 5, 4, 1), "alike": (4, 4, 4, 4),
         "one query": (1, 5, 4, 2)}  # fmt: skip


def call_of(graph, site, tokens, keys, heads, groups, mask=NO_MASK):
    """A call under messages at one site, and what wants gradients."""
    shapes = ((tokens, heads, D), (keys, groups, D), (keys, groups, D), (tokens, M))
    q, k, v, x = (torch.randn(B, *shape).double().requires_grad_() for shape in shapes)
    call = Call(q, k, v, mask, **{site: Messages(trained_like(graph(heads, D, M)), x)})
    return call, (q, k, v, x)


def masks(tokens, keys, heads):
    keep = torch.rand(B, 1, tokens, keys) < 0.7
    keep[..., 0], keep[0, :, -1] = True, False
    bias = torch.randn(B, heads, tokens, keys).double()
    return [Mask(mask, causal) for mask in (None, keep, keep[:, :, :1], bias) for causal in (False, True)]


def scores_of(call, query, key):
    """Scores `[B, T, S]` of one head's queries on another's keys."""
    groups = call.q.shape[2] // call.k.shape[2]
    return torch.einsum("btd,bsd->bts", call.q[:, :, query], call.k[:, :, key // groups]) * D**-0.5


def masked(call, scores, head):
    tokens, keys = scores.shape[1:]
    if call.mask.keep is not None:
        keep = call.mask.keep.expand(B, call.q.shape[2], tokens, keys)[:, head]
        scores = scores + keep if call.mask.is_float else scores.masked_fill(~keep, float("-inf"))
    if call.mask.causal:
        scores = scores.masked_fill(torch.ones(tokens, keys).triu(keys - tokens + 1).bool(), float("-inf"))
    return scores


def rows(scores):
    """The softmax of rows, zeros where a row has no key."""
    some = scores.isfinite().any(dim=-1, keepdim=True)
    return torch.where(some, torch.where(some, scores, 0.0).softmax(dim=-1), 0.0)


def subtracted(call):
    weight, groups = call.weights.graph.weight, call.q.shape[2] // call.k.shape[2]
    z = []
    for head in range(call.q.shape[2]):
        pair = (head // 2 * 2, head // 2 * 2 + 1)
        first, second = (rows(masked(call, scores_of(call, one, one), one)) for one in pair)
        factor = (call.weights.context @ weight[head // 2]).sigmoid().unsqueeze(-1)  # [B, T, 1]
        z.append((first - factor * second) @ call.v[:, :, head // groups])
    return torch.stack(z, dim=2)


def joined(call):
    z = []
    for head in range(call.q.shape[2]):
        pair = (head // 2 * 2, head // 2 * 2 + 1)
        maps = [masked(call, scores_of(call, head, key), head) for key in pair]
        if call.mask.causal and head == pair[0]:
            tokens, keys = maps[1].shape[1:]
            itself = torch.eye(keys)[keys - tokens :].bool()
            maps[1] = maps[1].masked_fill(itself, float("-inf"))
        weights = rows(torch.cat(maps, dim=-1))
        z.append(weights @ torch.cat([call.v[:, :, key] for key in pair], dim=1))
    return torch.stack(z, dim=2)


CASES = [(DifferentialPairs, "weights", subtracted, name) for name in SIZES]
CASES += [(PairedHeads, "scores", joined, name) for name, sizes in SIZES.items() if sizes[2] == sizes[3]]


@pytest.mark.parametrize(("graph", "site", "slowly", "name"), CASES)
def test_every_form_that_takes_pairs_equals_the_loop_over_pairs(graph, site, slowly, name):
    tokens, keys, heads, groups = SIZES[name]
    ran = set()
    for mask in masks(tokens, keys, heads):
        call, inputs = call_of(graph, site, *SIZES[name], mask)
        wanted = slowly(call)
        parameters = [*inputs[:3], *((inputs[3], getattr(call, site).graph.weight) if site == "weights" else ())]
        cotangent = torch.randn_like(wanted)
        gradients = torch.autograd.grad((wanted * cotangent).sum(), parameters)
        for form in FORMS:
            if not form.refuses(call):
                ran.add(form.name)
                z = attend(call, form.name)[0]
                assert_equal_to(z, wanted)
                found = torch.autograd.grad((z * cotangent).sum(), parameters)
                for gradient, expected in zip(found, gradients, strict=True):
                    assert_equal_to(gradient, expected)
    expected = {"paired"} if site == "scores" else {"maps"} | ({"tiled"} if tokens > 1 else set())
    assert ran == expected | ({"shared"} if site == "weights" and heads // groups % 2 == 0 else set())
    call, _ = call_of(graph, site, *SIZES[name])
    assert explain(call)["paired" if site == "scores" else "shared" if heads != groups else "maps"] == "taken"


@pytest.mark.parametrize("active", [False, True])
def test_the_matrix_of_differential_pairs_and_its_senders_are_what_it_does(active):
    pairs = trained_like(DifferentialPairs(6, D, M))
    z, x = torch.randn(B, 7, 6, 11).double(), torch.randn(B, 7, M).double()
    works = torch.rand(B, 7, 6) < 0.6 if active else None
    found = pairs(z, x, active=works)
    assert_equal_to(pairs.matrix(x, works) @ z, found)
    senders, weights, _ = pairs.sparse(x, works)
    assert_equal_to((weights.unsqueeze(-1) * z[:, :, senders]).sum(-2), found)
    if active:
        other = torch.where(works.unsqueeze(-1), z, torch.randn_like(z))
        assert torch.equal(found[~works], z[~works])
        assert_equal_to(pairs(other, x, active=works)[works], found[works])


def test_pairs_that_share_values_are_published_differential_attention():
    """2h queries, h key/value heads: outputs of odd heads are taken from those of even ones, then read out."""
    heads, width = 6, 6 * D
    model = trained_like(goh.MultiHeadAttention(
        width, heads, num_kv_heads=3, causal=True, inner_graphs={"weight": DifferentialPairs(heads, D, width)}
    ))  # fmt: skip
    x = torch.randn(B, 7, width).double()
    y, z = model(x)
    plain = trained_like(goh.MultiHeadAttention(width, heads, num_kv_heads=3, causal=True))
    plain.load_state_dict(model.state_dict(), strict=False)
    outputs = plain(x)[1].outputs
    factor = (x @ model.inner_graphs["weight"].weight.T).sigmoid().unsqueeze(-1)  # [B, T, h, 1]
    difference = outputs[:, :, 0::2] - factor * outputs[:, :, 1::2]  # [B, T, h, D]
    blocks = model.output.weight.unflatten(1, (heads, D))  # [M, H, D]
    read = torch.einsum("bthd,mhd->btm", difference, blocks[:, 0::2] + blocks[:, 1::2]) + model.output.bias
    assert_equal_to(y, read)
    assert torch.equal(z.outputs[:, :, 0], z.outputs[:, :, 1])


OWN, SHARED = (DifferentialPairs, ExclusiveHeads, PairedHeads), (DifferentialPairs, ExclusiveHeads)


@pytest.mark.parametrize(("graph", "groups"), [*((graph, 6) for graph in OWN), *((graph, 3) for graph in SHARED)])
@torch.no_grad()
def test_a_cache_changes_nothing(graph, groups):
    made = graph(6, 4, 24)
    slots = {"score_graph": made} if graph is PairedHeads else {"output_graph": made}
    slots = {"inner_graphs": {"weight": made}} if graph is DifferentialPairs else slots
    attention = goh.MultiHeadAttention(24, 6, num_kv_heads=groups, causal=True, rotary=RotaryPositions(4), **slots)
    attention = trained_like(attention).eval()
    x, cache = torch.randn(B, 9, 24).double(), KeyValueCache()
    whole = attention(x)[0]
    parts = [attention(part, cache=cache)[0] for part in x.split([4, 1, 3, 1], dim=1)]
    assert_equal_to(torch.cat(parts, dim=1), whole)
    assert cache.read()[0].shape == (B, 9, groups, 4)
    changed = x.clone()
    changed[:, 5:] = torch.randn(B, 4, 24).double()
    assert_equal_to(attention(changed)[0][:, :5], whole[:, :5])


def test_exclusive_heads_tell_nothing_of_their_own_value():
    for groups in (5, 1):
        attention = trained_like(goh.MultiHeadAttention(
            30, 5, num_kv_heads=groups, causal=True, output_graph=ExclusiveHeads(5, 6, 30)
        ))  # fmt: skip
        x = torch.randn(B, 7, 30).double()
        z = attention(x)[1].outputs
        v = attention.value(x).unflatten(-1, (groups, 6)).repeat_interleave(5 // groups, dim=2)
        assert (z * v).sum(-1).abs().max() < 1e-12
        with pytest.raises(ValueError, match=r"^Expected self attention for ExclusiveHeads, .*\(got a memory\)\. Do "):
            attention(x, torch.randn(B, 4, 30).double())


def refused(**slots):
    return lambda: goh.MultiHeadAttention(24, 6, **slots)


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: PairedHeads(5, D, M), r"an even number of heads, for pairs \(got 5\)"),
        (lambda: DifferentialPairs(3, D, M), r"an even number of heads, for pairs \(got 3\)"),
        (refused(num_kv_heads=3, score_graph=PairedHeads(6, 4, 24)), "its own keys at scores here .*PairedHeads"),
        (refused(router=goh.HeadRouter(24, 6, 2, 2), score_graph=PairedHeads(6, 4, 24)), "its own keys at scores"),
        (refused(score_graph=PairedHeads(6, 4, 24), inner_graphs={"weight": DifferentialPairs(6, 4, 24)}), "own keys"),
        (refused(output_graph=PairedHeads(6, 4, 24)), "can stand at outputs .*PairedHeads, which is for scores"),
        (refused(output_graph=DifferentialPairs(6, 4, 24)), "can stand at outputs .*which is for weights"),
        (refused(inner_graphs={"value": ExclusiveHeads(6, 4, 24)}), "can stand at values .*which is for outputs"),
        (lambda: Chain([PairedHeads(6, 4, 24), SigmoidGate(6, 4, 24, grain="head")]), r"joins keys alone \(got 2"),
        (lambda: goh.convert(torch.nn.TransformerEncoderLayer(24, 6),
                             goh.HeadGraphConfig(goh.BaselineConfig("exclusive"))), "own values at outputs here"),
        (lambda: goh.convert(torch.nn.TransformerEncoderLayer(24, 6),
                             goh.HeadGraphConfig(None, goh.BaselineConfig("paired"))), "its own keys at scores here"),
        (lambda: ExclusiveHeads(5, D, M, gate=1), "gate to be"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_when_built(build, named):
    with pytest.raises((ValueError, TypeError), match=rf"^Expected .*{named}.*\. Do "):
        build()
