"""Every form of attention that takes a call against whole maps written out, and which form is chosen and why."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_equal_to, trained_like
from torch import nn

import gohgraph as goh
from gohgraph.attention import forms
from gohgraph.attention.call import NO_MASK, Call, Core, Mask, Routed
from gohgraph.attention.forms import FORMS, attend, explain
from gohgraph.attention.skipped import ActiveHeads
from gohgraph.attention.tiled import tiled_attention
from gohgraph.graphs.baselines import SigmoidGate, SoftmaxMessages
from gohgraph.graphs.chain import Chain
from gohgraph.graphs.keyed import KeyedGraphConv
from gohgraph.graphs.protocol import Messages
from gohgraph.graphs.wrapped import WrappedModule


class Sizes(NamedTuple):
    """T, S, H, G, D and M."""

    tokens: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int


B = 2
PRIMES = Sizes(7, 11, 5, 5, 3, 13)
SIZES = {
    "cached": PRIMES,
    "one key head": Sizes(7, 7, 5, 1, 3, 13),
    "all alike": Sizes(4, 4, 4, 2, 4, 4),
    "one query": Sizes(1, 7, 5, 1, 3, 13),
}


def conv(sizes, topology="ring", kind=goh.HeadGraphConv, **settings):
    return kind(goh.head_graph(sizes.heads, topology), sizes.head_dim, sizes.width, **settings)


def chain(sizes):
    shape = (sizes.heads, sizes.head_dim, sizes.width)
    return Chain([conv(sizes), SigmoidGate(*shape, grain="head"), SoftmaxMessages(*shape)])


# Graphs over scores and over weights, and the forms that take many queries under them.
GRAPHS = {
    "none": (None, None, "plain maps"),
    "ring": (conv, None, "kernel tiled wide maps"),
    "complete": (lambda sizes: conv(sizes, "complete"), None, "kernel tiled wide maps"),
    "rounds": (lambda sizes: conv(sizes, rounds=2), None, "kernel tiled wide maps"),
    "pyg": (lambda sizes: conv(sizes, backend="pyg"), None, "kernel tiled wide maps"),
    "keyed": (lambda sizes: conv(sizes, kind=KeyedGraphConv), None, "wide maps"),
    "chain": (chain, None, "kernel tiled wide maps"),
    "weights": (None, lambda sizes: conv(sizes, "complete"), "tiled maps"),
    "both": (conv, chain, "tiled maps"),
}


@pytest.fixture(autouse=True)
def stand_in_for_the_kernel(monkeypatch):
    """The kernel's own parity is tested elsewhere: here, what it is handed."""
    monkeypatch.setattr(forms, "kernel_refuses", lambda *args: "")
    monkeypatch.setattr(
        forms, "flash_mixed_attention", lambda q, k, v, mix, *mask: tiled_attention(q, k, v, mix, None, *mask)
    )


def call_of(graph, sizes, mask=NO_MASK, *, is_routed=False, **more):
    """A call with inputs that want gradients, and these: queries, keys, values, contexts of queries and of keys."""
    tokens, keys, heads, kv_heads, head_dim, width = sizes
    shapes = ((tokens, heads, head_dim), (keys, kv_heads, head_dim), (keys, kv_heads, head_dim))
    shapes = (*shapes, (tokens, width), (keys, width))
    q, k, v, x, source = (torch.randn(B, *shape).double().requires_grad_() for shape in shapes)
    active = torch.rand(B, tokens, heads).argsort(-1).argsort(-1) < 2 if is_routed else None
    if is_routed:
        # One shared head and one more.
        active[..., 0], active[..., 1:] = True, torch.rand(B, tokens, heads - 1).argsort(-1) == 0
    built = [None if build is None else trained_like(build(sizes)) for build in GRAPHS[graph][:2]]
    messages = [
        None if graph is None else Messages(graph, x, active, graph.key_state(source) if graph.traits.keyed else None)
        for graph in built
    ]
    routed = None
    if is_routed:
        can_skip = tokens == 1 and built[1] is None and not mask.is_float
        routed = Routed(active, 1, 2, ActiveHeads(active) if can_skip else "many tokens")
    call = Call(q, k, v, mask, scores=messages[0], weights=messages[1], routed=routed, **more)
    return call, (q, k, v, x, source)


def slowly(call):
    """Outputs and weights on whole maps, by the definition."""
    groups = call.q.shape[2] // call.k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (call.k, call.v))  # [B, S, H, D]
    scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
    scores = torch.einsum("bthd,bshd->bths", call.q, k) * scale
    scores = scores if call.scores is None else call.scores(scores)
    tokens, keys = scores.shape[1], scores.shape[3]
    seen = torch.ones(B, tokens, 1, keys, dtype=torch.bool)
    if call.mask.causal:
        seen = seen & torch.tensor([[[s <= keys - tokens + t for s in range(keys)]] for t in range(tokens)])
    if call.mask.keep is not None:
        keep = call.mask.keep.expand(B, call.q.shape[2], tokens, keys).transpose(1, 2)  # [B, T, H, S]
        scores, seen = (scores + keep, seen) if call.mask.is_float else (scores, seen & keep)
    some = seen.any(dim=-1, keepdim=True)
    weights = scores.masked_fill(~seen & some, float("-inf")).softmax(dim=-1) * some
    weights = weights if call.weights is None else call.weights(weights)
    return torch.einsum("bths,bshd->bthd", weights, v), weights


def masks_of(sizes):
    """Bool with a row without any key, float with some at minus infinity, and none; each causal or not."""
    tokens, keys = sizes[:2]
    keep = torch.rand(B, 1, tokens, keys) < 0.7
    keep[..., 0], keep[0, :, -1] = True, False
    bias = torch.randn(B, sizes.heads, tokens, keys).double()
    bias[..., 1:].masked_fill_(torch.rand(B, sizes.heads, tokens, keys - 1) < 0.3, float("-inf"))
    kinds = {"none": None, "keep": keep, "padding": keep[:, :, :1], "float": bias}
    return {(name, causal): Mask(mask, causal) for name, mask in kinds.items() for causal in (False, True)}


def works(call):
    return 1.0 if call.routed is None else call.routed.active.unsqueeze(-1)


@pytest.mark.parametrize("is_routed", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("graph", GRAPHS)
def test_every_form_that_takes_a_call_equals_whole_maps(graph, sizes, is_routed):
    ran = set()
    for mask in masks_of(SIZES[sizes]).values():
        call, inputs = call_of(graph, SIZES[sizes], mask, is_routed=is_routed)
        cotangent = torch.randn_like(call.q) * works(call)

        def values_and_gradients(z, inputs=inputs, cotangent=cotangent):
            gradients = torch.autograd.grad((z * cotangent).sum(), inputs, allow_unused=True, retain_graph=True)
            return [z, *(torch.zeros(()).double() if g is None else g for g in gradients)]

        expected = values_and_gradients(slowly(call)[0] * works(call))
        for form in FORMS:
            if form.refuses(call):
                continue
            ran.add(form.name)
            # Heads are left out in decoding alone.
            with torch.set_grad_enabled(form.name != "skipped"):
                z = attend(call, form.name)[0] * works(call)
            found = [z] if form.name == "skipped" else values_and_gradients(z)
            for actual, wanted in zip(found, expected, strict=form.name != "skipped"):
                assert_equal_to(actual, wanted)
    takers = set(GRAPHS[graph][2].split()) - (set() if sizes != "one query" else {"kernel", "tiled"})
    if is_routed and sizes != "one query" and graph == "none":
        takers.add("grouped")
    if is_routed and sizes == "one query" and GRAPHS[graph][1] is None:
        takers.add("skipped")
    if graph == "weights" and SIZES[sizes].kv_heads == 1:
        takers.add("shared")
    assert ran == takers


@pytest.mark.parametrize("sizes", [PRIMES, SIZES["all alike"]], ids=["cached", "all alike"])
@pytest.mark.parametrize("graph", GRAPHS)
@torch.no_grad()
def test_no_form_lets_a_later_token_reach_an_earlier_one(graph, sizes):
    for is_routed in (False, True):
        call, inputs = call_of(graph, sizes, Mask(causal=True), is_routed=is_routed)
        able = [form.name for form in FORMS if not form.refuses(call)]
        before = [attend(call, name)[0] * works(call) for name in able]
        cut, past = sizes.tokens - 2, sizes.keys - sizes.tokens
        state = None if call.scores is None else call.scores.keys
        q, k, v, x, source = inputs
        for tensor, first in ((q, cut), (x, cut), *((of_keys, past + cut) for of_keys in (k, v, source, state))):
            if tensor is not None:
                tensor[:, first:] = torch.randn_like(tensor[:, first:])
        for name, z in zip(able, before, strict=True):
            after = attend(call, name)[0] * works(call)
            assert_equal_to(after[:, :cut], z[:, :cut])
            assert (after - z)[:, cut:].abs().max() > 1e-3, name


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_scale_is_that_of_the_call(graph):
    call, _ = call_of(graph, PRIMES, Mask(causal=True), is_routed=True, scale=0.7)
    wanted = slowly(call)[0] * works(call)
    assert (wanted - slowly(call._replace(scale=None))[0] * works(call)).abs().max() > 1e-3
    able = [form.name for form in FORMS if not form.refuses(call)]
    assert len(able) > 1
    for name in able:
        assert_equal_to(attend(call, name)[0] * works(call), wanted)


@pytest.mark.parametrize("graph", GRAPHS)
def test_weights_that_are_asked_for(graph):
    call, _ = call_of(graph, PRIMES, Mask(causal=True), need_weights=True)
    assert [form.name for form in FORMS if not form.refuses(call)] == ["maps"]
    for found, wanted in zip(attend(call), slowly(call), strict=True):
        assert_equal_to(found, wanted)
    assert attend(call._replace(need_weights=False))[1] is None
    # After dropout: the outputs are those of the very weights that are told.
    z, weights = attend(call._replace(dropout=0.5))
    assert 0.2 < weights.eq(0).double().mean() < 0.95
    assert_equal_to(z, torch.einsum("bths,bshd->bthd", weights, call.v))


# The choice.


@pytest.mark.parametrize("is_routed", [False, True])
@pytest.mark.parametrize("sizes", ["cached", "one query"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_one_form_is_taken_and_all_others_say_why_not(monkeypatch, graph, sizes, is_routed):
    ran = []
    spied = [form._replace(run=lambda call, name=form.name: ran.append(name) or (call.q, None)) for form in FORMS]
    monkeypatch.setattr(forms, "FORMS", tuple(spied))
    for mask in masks_of(SIZES[sizes]).values():
        call, _ = call_of(graph, SIZES[sizes], mask, is_routed=is_routed)
        reasons = explain(call)
        attend(call)
        assert [form.name for form in FORMS] == list(reasons) and all(reasons.values())
        assert [name for name, reason in reasons.items() if reason == "taken"] == [ran.pop()]
        for form in FORMS:
            if reason := form.refuses(call):
                assert reasons[form.name] == reason
                said = f"^Expected .*{form.name!r} takes .got {re.escape(reason)}.*Do "
                for ask in (attend, explain):
                    with pytest.raises(ValueError, match=said):
                        ask(call, form.name)
            else:
                assert explain(call, form.name)[form.name] == "taken"
    assert not ran


def test_an_unknown_form_is_refused():
    call, _ = call_of("none", PRIMES)
    with pytest.raises(ValueError, match=r"^Expected a form of \['skipped', .*\(got 'eager'\)\. Do "):
        attend(call, "eager")
    with pytest.raises(ValueError, match="Expected a form of"):
        explain(call, "eager")


@pytest.mark.parametrize("change", ["dropout", "float", "weights", "second gradients", "exported", "a query"])
def test_what_keeps_calls_from_tiles_and_the_kernel(monkeypatch, change):
    mask = Mask(torch.ones(1, 1, 1, PRIMES.keys)) if change == "float" else NO_MASK
    call, _ = call_of("complete", PRIMES, mask)
    call = call._replace(dropout=0.1 if change == "dropout" else 0.0, need_weights=change == "weights")
    if change == "a query":
        messages = call.scores._replace(context=call.scores.context[:, :1])
        call = call._replace(q=call.q[:, :1], scores=messages)
    monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: change != "second gradients")
    monkeypatch.setattr(Call, "is_exported", property(lambda call: change == "exported"))
    said = {"dropout": "dropout", "float": "float", "weights": "weights", "second gradients": "second gradients"}
    said |= {"exported": "torch.export", "a query": "a single query"}
    assert all(said[change] in explain(call)[form] for form in ("kernel", "tiled"))
    assert explain(call)["maps"] == "taken"


def test_torch_compile_keeps_calls_from_the_kernel_and_not_from_tiles(monkeypatch):
    call, _ = call_of("complete", PRIMES)
    monkeypatch.setattr(Call, "is_compiling", property(lambda call: True))
    reasons = explain(call)
    assert "under torch.compile" in reasons["kernel"] and "pays from" in reasons["tiled"]


# Another library's attention beneath.


def core_of(call, calls, **limits):
    def beneath(q, k, v, scale, is_wide):
        calls.append((q.shape, is_wide))
        z, weights = slowly(Call(q, k, v, call.mask, scale=scale))
        return z, weights

    return Core(beneath, **limits)


def with_core(graph, **limits):
    call, _ = call_of(graph, PRIMES, Mask(causal=True))
    calls = []
    return call, call._replace(core=core_of(call, calls, **limits)), calls


@pytest.mark.parametrize("opaque", ["", "it adds a position bias"])
def test_without_messages_a_core_attends_and_tells_its_weights(opaque):
    call, beneath, calls = with_core("none", opaque=opaque)
    for found, wanted in zip(attend(beneath), slowly(call), strict=True):
        assert_equal_to(found, wanted)
    assert calls == [(call.q.shape, False)] and [f.name for f in FORMS if not f.refuses(beneath)] == ["plain"]


@pytest.mark.parametrize("graph", ["ring", "complete", "rounds", "keyed", "chain"])
def test_an_opaque_core_gets_wide_heads_only(graph):
    call, beneath, calls = with_core(graph, opaque="it adds a position bias")
    assert [form.name for form in FORMS if not form.refuses(beneath)] == ["wide"]
    reasons = explain(beneath)
    assert reasons["wide"] == "taken" and reasons["maps"] == reasons["tiled"] == "it adds a position bias"
    z, weights = attend(beneath)
    assert_equal_to(z, slowly(call)[0])
    assert_equal_to(weights, slowly(call)[1])
    senders = call.scores.graph.traits.most_senders
    assert calls == [((*call.q.shape[:3], senders * PRIMES.head_dim), True)]


@pytest.mark.parametrize(("graph", "size"), [("ring", "2 x 3"), ("complete", "5 x 3")])
def test_an_opaque_core_that_takes_no_such_heads_refuses_with_their_size(graph, size):
    widest = 3 * int(size[0]) - 1
    call, beneath, calls = with_core(graph, opaque="it adds a position bias", widest=widest)
    said = f"wide: heads of size {size}, and the attention beneath takes {widest}"
    with pytest.raises(ValueError, match=rf"^Expected a form of attention .*{said}; maps: it adds .*\. Do "):
        attend(beneath)
    assert not calls
    fits = beneath._replace(core=beneath.core._replace(widest=widest + 1))
    assert_equal_to(attend(fits)[0], slowly(call)[0])


def test_an_opaque_core_under_messages_that_are_no_matrix_is_refused():
    _, beneath, calls = with_core("ring", opaque="it adds a position bias")
    graph = WrappedModule(nn.Identity(), PRIMES.heads)
    beneath = beneath._replace(scores=beneath.scores._replace(graph=graph))
    with pytest.raises(ValueError, match=r"wide: messages that are no matrix over heads; maps: it adds"):
        attend(beneath)
    _, beneath, _ = with_core("weights", opaque="it adds a position bias")
    with pytest.raises(ValueError, match="some between weights; maps: it adds"):
        attend(beneath)
    assert not calls


def test_maps_and_tiles_stand_in_for_a_core_that_its_mask_tells_of():
    for graph in ("complete", "both", "weights"):
        call, beneath, calls = with_core(graph, widest=5)
        assert explain(beneath)["maps"] == "taken"
        for form in ("tiled", None):
            assert_equal_to(attend(beneath, form)[0], slowly(call)[0])
        assert not calls


# Masks.


def test_masks_as_one_tensor():
    q, one, k = torch.empty(B, 3, 5, 2), torch.empty(B, 1, 5, 2), torch.empty(B, 5, 5, 2)
    seen = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    keep = torch.rand(B, 1, 3, 5) < 0.5
    bias = torch.randn(1, 5, 3, 5)
    assert Mask().whole(q, k) is None and Mask(causal=True).whole(one, k) is None
    assert torch.equal(Mask(causal=True).whole(q, k), seen)
    assert torch.equal(Mask(keep).whole(q, k), keep) and torch.equal(Mask(keep, True).whole(q, k), keep & seen)
    added = Mask(bias, True).whole(q, k)
    assert added[..., ~seen].eq(float("-inf")).all() and torch.equal(added[..., seen], bias[..., seen])
    assert Mask(bias, True).whole(one, k) is bias
    assert Mask(bias).is_float and not Mask(keep).is_float and not Mask(causal=True).is_float


def test_a_float_mask_that_only_leaves_keys_out_is_a_bool_one():
    keep = torch.rand(B, 1, 3, 5) < 0.5
    added = torch.zeros(keep.shape).masked_fill(~keep, float("-inf"))
    assert torch.equal(Mask(added).without_zeros().keep, keep) and Mask(added, True).without_zeros().causal
    kept = [Mask(added + 1), Mask(added.clone().fill_(torch.finfo().min)), Mask(added.clone().requires_grad_())]
    kept += [Mask(added.to("meta")), Mask(keep), NO_MASK]
    assert all(mask.without_zeros() is mask for mask in kept)
    mapped = torch.func.vmap(lambda mask: Mask(mask).without_zeros().keep)(added)
    assert torch.equal(mapped, added)


def test_padding_as_torchs_encoders_hand_it_on_does_not_keep_calls_from_tiles():
    sizes = Sizes(67, 257, 5, 5, 3, 13)
    keep = torch.rand(B, 1, 1, sizes.keys) < 0.7
    call, _ = call_of("complete", sizes, Mask(torch.zeros(keep.shape).double().masked_fill(~keep, float("-inf"))))
    assert explain(call._replace(mask=Mask(call.mask.keep + 1)))["tiled"] == "a float mask"
    assert explain(call, "tiled")["tiled"] == "taken"
    assert_equal_to(attend(call, "tiled")[0], slowly(call)[0])


def test_masks_as_kernels_take_them():
    q, one, k = torch.empty(B, 3, 5, 2), torch.empty(B, 1, 5, 2), torch.empty(B, 5, 5, 2)
    keep = torch.rand(B, 1, 3, 5) < 0.5
    assert Mask().for_kernel(q, k) == (None, False) and Mask(causal=True).for_kernel(q, q) == (None, True)
    assert Mask(causal=True).for_kernel(one, k) == (None, False) == Mask(causal=True).for_kernel(one, one)
    for mask in (Mask(causal=True), Mask(keep, True)):
        tensor, is_causal = mask.for_kernel(q, k)
        assert torch.equal(tensor, mask.whole(q, k)) and not is_causal
    assert Mask(keep).for_kernel(q, k) == (keep, False)
    square = torch.rand(B, 1, 1, 3) < 0.5
    tensor, is_causal = Mask(square, True).for_kernel(q, q)
    assert torch.equal(tensor, square & torch.ones(3, 3).tril().bool()) and not is_causal
    # What it says is what torch's attention does of it.
    x = torch.randn(3, B, 5, 3, 2).double()
    wanted = F.scaled_dot_product_attention(*x, attn_mask=Mask(square, True).whole(q, q))
    assert_equal_to(F.scaled_dot_product_attention(*x, attn_mask=tensor, is_causal=is_causal), wanted)
