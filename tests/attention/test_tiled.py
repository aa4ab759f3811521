"""Attention in tiles against whole maps: values, gradients, masks, and when it is chosen."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from benchmarks.timing import cpu_peak
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import gohgraph as goh
from gohgraph.attention import forms, tiled
from gohgraph.attention.maps import causal_mask, mixed_attention, plain_attention
from gohgraph.attention.tiled import tiled_attention, tiles_of

B, T, S, H, D = 2, 13, 11, 6, 5
M = H * D
SITES = {"scores": (True, False), "weights": (False, True), "both": (True, True)}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiled, "FEWEST_ROWS", 3)
    monkeypatch.setattr(tiled, "MOST_ROWS", 3)


def inputs(keys, kv_heads=H):
    torch.manual_seed(0)
    heads = [torch.randn(B, T, H, D), torch.randn(B, keys, kv_heads, D), torch.randn(B, keys, kv_heads, D)]
    return [x.double().requires_grad_() for x in (*heads, torch.randn(B, T, H, H), torch.randn(B, T, H, H))]


def some_mask(keys):
    keep = torch.rand(B, 1, T, keys) > 0.4
    keep[0, :, 5] = False
    return keep


@pytest.mark.parametrize("mask", ["none", "causal", "some"])
@pytest.mark.parametrize("kv_heads", [H, 3, 1])
@pytest.mark.parametrize("site", SITES)
def test_tiles_equal_whole_maps(site, kv_heads, mask):
    keys = T if mask == "causal" else S
    q, k, v, *mixes = inputs(keys, kv_heads)
    mixes = [mix if used else None for mix, used in zip(mixes, SITES[site], strict=True)]
    keep = some_mask(keys) if mask == "some" else None
    fast = tiled_attention(q, k, v, *mixes, keep, mask == "causal")
    functions = [mix if mix is None else partial(torch.matmul, mix) for mix in mixes]
    keep = causal_mask(T, keys, q.device) if mask == "causal" else keep
    slow = mixed_attention(q, k, v, *functions, keep)
    torch.testing.assert_close(fast, slow, atol=1e-12, rtol=1e-12)
    asked = [q, k, v, *(mix for mix in mixes if mix is not None)]
    grad = torch.randn_like(fast)
    results = [torch.autograd.grad(z, asked, grad) for z in (fast, slow)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("is_causal", [True, False])
def test_gradcheck(is_causal):
    torch.manual_seed(0)
    heads = [torch.randn(1, 5, 3, 2).double().requires_grad_() for _ in range(3)]
    mixes = [torch.randn(1, 5, 3, 3).double().requires_grad_() for _ in range(2)]
    assert torch.autograd.gradcheck(lambda *x: tiled_attention(*x, is_causal=is_causal), (*heads, *mixes))


def test_static_maps_are_those_of_every_token():
    q, k, v, mix, _ = inputs(S)
    static = mix[0, 0]
    every = static.expand(B, T, H, H)
    assert torch.equal(tiled_attention(q, k, v, static), tiled_attention(q, k, v, every))
    grads = [torch.autograd.grad(tiled_attention(q, k, v, w).sum(), mix)[0] for w in (static, every)]
    torch.testing.assert_close(*grads, atol=1e-12, rtol=1e-12)


def test_identity_is_plain_attention():
    q, k, v, *_ = inputs(T)
    results = tiled_attention(q, k, v, torch.eye(H).double(), is_causal=True)
    torch.testing.assert_close(results, plain_attention(q, k, v, None, 0.0, True), atol=1e-13, rtol=1e-13)


def test_rows_without_any_key_give_zeros():
    q, k, v, mix, _ = inputs(S)
    z = tiled_attention(q, k, v, mix, None, some_mask(S))
    z.sum().backward()
    assert z[0, 5].eq(0).all() and all(x.grad.isfinite().all() for x in (q, k, v, mix))


def test_renamed_heads_give_the_same_with_other_names():
    q, k, v, mix, _ = inputs(S)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    renamed = tiled_attention(*(x[:, :, order] for x in (q, k, v)), mix[:, :, order][..., order])
    torch.testing.assert_close(renamed, tiled_attention(q, k, v, mix)[:, :, order], atol=1e-12, rtol=1e-12)


def test_later_tokens_change_nothing():
    q, k, v, mix, _ = (x.detach() for x in inputs(T))
    before = tiled_attention(q, k, v, mix, is_causal=True)
    for x in (q, k, v, mix):
        x[:, 7:] = torch.randn_like(x[:, 7:])
    after = tiled_attention(q, k, v, mix, is_causal=True)
    assert torch.equal(before[:, :7], after[:, :7]) and not torch.equal(before[:, 7:], after[:, 7:])


def test_tiles_cover_every_query_once():
    tiles = list(tiles_of(B, T, H, S, is_causal=False))
    rows = [(tile.item, t) for tile in tiles for t in range(T)[tile.rows]]
    assert rows == [(b, t) for b in range(B) for t in range(T)] and {tile.keys for tile in tiles} == {S}


def test_tiles_shrink_with_the_maps_between_their_limits(monkeypatch):
    monkeypatch.setattr(tiled, "FEWEST_ROWS", 17)
    monkeypatch.setattr(tiled, "MOST_ROWS", 101)
    monkeypatch.setattr(tiled, "TILE_NUMBERS", 10_000)
    rows = [next(tiles_of(1, 1000, heads, 59, is_causal=False)).rows.stop for heads in (1, 4, 31)]
    # 10,000 // (4 * 59) is 42, of which whole sixteens are taken.
    assert rows == [101, 32, 17]


def test_a_mask_beside_causality_is_refused():
    q, k, v, mix, _ = inputs(T)
    with pytest.raises(ValueError, match=r"Expected keep_mask or is_causal \(got both\)"):
        tiled_attention(q, k, v, mix, None, some_mask(T), is_causal=True)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("shape", [(0, T, S), (B, 0, S), (B, T, 0), (0, 0, 0)], ids=str)
def test_nothing_to_attend_gives_zeros_and_no_gradient(shape, site, mask):
    batch, tokens, keys = shape
    q, k, v = (torch.randn(batch, n, heads, D, requires_grad=True) for n, heads in ((tokens, H), (keys, 3), (keys, 3)))
    mixes = [torch.randn(H, H, requires_grad=True) if used else None for used in SITES[site]]
    z = tiled_attention(q, k, v, *mixes, torch.ones(tokens, keys).bool() if mask else None)
    assert z.shape == q.shape and z.eq(0).all()
    gradients = torch.autograd.grad(z.sum(), [x for x in (q, k, v, *mixes) if x is not None])
    assert all(x.eq(0).all() for x in gradients)


N = 3


@pytest.mark.parametrize("mask", ["none", "causal", "one", "of each sample"])
@pytest.mark.parametrize("mixes", ["static", "of each sample", "of each token"])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("sizes", [(2, 13, 6, 5), (1, 5, 6, 5), (2, 7, 5, 5)], ids=["primes", "T = D", "H = D"])
def test_gradients_of_every_sample_are_those_of_whole_maps(sizes, site, mixes, mask):
    """vmap over grad, against a loop over samples and against the slow reference."""
    batch, tokens, heads, head_dim = sizes
    torch.manual_seed(0)
    q, k, v = torch.randn(3, N, batch, tokens, heads, head_dim).double()
    shape = {"static": (), "of each sample": (N,), "of each token": (N, batch, tokens)}[mixes]
    names = [name for name, used in zip(("mix_scores", "mix_weights"), SITES[site], strict=True) if used]
    weights = {name: torch.randn(*shape, heads, heads).double() for name in names}
    keep = torch.rand(*((N,) if mask == "of each sample" else ()), batch, 1, tokens, tokens) > 0.4
    keep = keep if mask in ("one", "of each sample") else None

    def fast(q, k, v, weights, keep):
        return tiled_attention(q, k, v, **weights, keep_mask=keep, is_causal=mask == "causal")

    def slow(q, k, v, weights, keep):
        keep = causal_mask(tokens, tokens, q.device) if mask == "causal" else keep
        functions = {name: partial(torch.matmul, w) for name, w in weights.items()}
        return mixed_attention(q, k, v, **functions, keep_mask=keep)

    def gradients(attend):
        def loss(tensors, weights, keep):
            z = attend(*tensors, weights, keep)
            return z.sin().sum(), z

        return torch.func.grad(loss, argnums=(0, 1), has_aux=True)

    # Keys are the same for all samples: an input without the mapped dimension.
    tensors = (q, k[0], v)
    of_weights = None if mixes == "static" else 0
    in_dims = ((0, None, 0), of_weights, 0 if mask == "of each sample" else None)
    mapped = torch.func.vmap(gradients(fast), in_dims)(tensors, weights, keep)
    for n in range(N):
        weights_of_sample = {name: w if mixes == "static" else w[n] for name, w in weights.items()}
        sample = ((q[n], k[0], v[n]), weights_of_sample, keep[n] if mask == "of each sample" else keep)
        for attend in (fast, slow):
            expected = gradients(attend)(*sample)
            for a, b in zip(*(torch.utils._pytree.tree_leaves(x) for x in (mapped, expected)), strict=True):
                torch.testing.assert_close(a[n], b, atol=1e-11, rtol=1e-11)


def test_mapped_twice_and_mapped_gradients():
    """vmap within vmap, of values and of the backward pass for several gradients of the outputs."""
    torch.manual_seed(0)
    q = torch.randn(2, 3, 1, 7, 5, 4).double()
    w = torch.randn(3, 5, 5).double()

    def attend(q, w):
        return tiled_attention(q, q, q, w, None, is_causal=True)

    mapped = torch.func.vmap(torch.func.vmap(attend), (0, None))(q, w)
    for i, j in ((0, 0), (1, 2)):
        torch.testing.assert_close(mapped[i, j], attend(q[i, j], w[j]), atol=1e-13, rtol=1e-13)
    z, pull = torch.func.vjp(attend, q[0, 0], w[0])
    seeds = torch.randn(3, *z.shape).double()
    mapped = torch.func.vmap(pull)(seeds)
    for n in range(3):
        for a, b in zip(mapped, pull(seeds[n]), strict=True):
            torch.testing.assert_close(a[n], b, atol=1e-13, rtol=1e-13)
    with pytest.raises(RuntimeError, match="forward mode AD|forward-mode AD|jvp"):
        torch.func.jvp(attend, (q[0, 0], w[0]), (q[0, 1], w[1]))


def test_sums_over_tiles_of_bfloat16_keep_its_digits(monkeypatch):
    """Errors against float64 with 86 tiles are those with one; sums in bfloat16 have 1.4 times as much."""
    torch.manual_seed(0)
    given = [torch.randn(shape) for shape in ((1, 257, 5, 4), (1, 257, 5, 4), (1, 257, 5, 4), (5, 5))]
    grad = torch.randn(1, 257, 5, 4)

    def results(dtype):
        inputs = [x.bfloat16().to(dtype).requires_grad_() for x in given]
        z = tiled_attention(*inputs)
        return [z, *torch.autograd.grad(z, inputs, grad.bfloat16().to(dtype))]

    expected, errors = results(torch.float64), {}
    for rows in (3, 257):
        monkeypatch.setattr(tiled, "FEWEST_ROWS", rows)
        monkeypatch.setattr(tiled, "MOST_ROWS", rows)
        found = results(torch.bfloat16)
        assert all(x.dtype == torch.bfloat16 for x in found)
        errors[rows] = [((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]
    assert all(many < 1.1 * one for many, one in zip(errors[3], errors[257], strict=True)), errors
    assert max(errors[257]) < 0.02


def test_memory_does_not_hold_maps():
    """Forward and backward at 701 tokens; one map of all heads would be 4 * 701 * 701 numbers."""
    q, k, v, mix = (torch.randn(1, 701, 4, 3, requires_grad=True) for _ in range(4))
    largest = []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            outputs = function(*args, **(kwargs or {}))
            made = outputs if isinstance(outputs, tuple) else (outputs,)
            largest.extend(x.numel() for x in made if torch.is_tensor(x))
            return outputs

    with Largest():
        tiled_attention(q, k, v, torch.eye(4) + mix @ mix.transpose(-1, -2), is_causal=True).sum().backward()
    assert max(largest) <= 701 * 4 * 4


@pytest.mark.parametrize("weighs, maps", [(False, 3), (True, 4)])
def test_a_tile_is_a_few_maps_in_memory(monkeypatch, weighs, maps):
    """How the peak of forward and backward grows with the rows of a tile, in maps of so many rows."""

    def both():
        q, k, v, mix = (torch.randn(1, 701, 4, 3, requires_grad=True) for _ in range(4))
        mix = torch.eye(4) + mix @ mix.transpose(-1, -2)
        tiled_attention(q, k, v, mix, mix if weighs else None).sum().backward()

    peaks = []
    for rows in (64, 128):
        monkeypatch.setattr(tiled, "FEWEST_ROWS", rows)
        monkeypatch.setattr(tiled, "MOST_ROWS", rows)
        peaks.append(cpu_peak(both))
    one_map = 64 * 4 * 701 * 4
    assert maps - 0.5 < (peaks[1] - peaks[0]) / one_map < maps + 0.5


def attention(topology="complete", sites=("scores",), rounds=1, **settings):
    torch.manual_seed(1)
    convs = {site: goh.HeadGraphConv(goh.head_graph(H, topology), D, M, rounds=rounds) for site in sites}
    for conv in convs.values():
        for parameter in conv.parameters():
            nn.init.normal_(parameter, std=0.3)
    torch.manual_seed(2)
    inner = {"weight": convs["weights"]} if "weights" in convs else {}
    module = goh.MultiHeadAttention(M, H, score_graph=convs.get("scores"), inner_graphs=inner, **settings)
    return module.double()


def values_and_gradients(module, x, **arguments):
    x = x.clone().requires_grad_()
    y, _ = module(x, **arguments)
    torch.manual_seed(5)
    return [y, *torch.autograd.grad((y * torch.randn_like(y)).sum(), [x, *module.parameters()])]


@pytest.mark.parametrize("router", [None, goh.HeadRouter(M, H, num_shared=1, top_k=3)], ids=["all", "routed"])
@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("sites", [("scores",), ("weights",), ("scores", "weights")], ids=" ".join)
@pytest.mark.parametrize("topology", ["ring", "complete"])
def test_an_attention_block_in_tiles_equals_it_without(topology, sites, rounds, router):
    module = attention(topology, sites, rounds, router=copy.deepcopy(router), causal=True, num_kv_heads=3)
    x = torch.randn(B, T, M).double()
    padding = torch.arange(T) < torch.tensor([[T], [9]])
    for masks in ({}, {"keep_mask": padding[:, None, None]}):
        results = []
        for module.form in ("tiled", "maps"):
            results.append(values_and_gradients(module, x, **masks))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def spied(monkeypatch):
    calls = []
    path = "gohgraph.attention.forms.tiled_attention"
    monkeypatch.setattr(path, lambda *args: calls.append(1) or tiled_attention(*args))
    return calls


@pytest.mark.parametrize("keys, expected", [(forms.TILED_FROM_KEYS - 1, 0), (forms.TILED_FROM_KEYS, 1)])
def test_tiles_are_chosen_from_the_measured_length_on(monkeypatch, keys, expected):
    calls = spied(monkeypatch)
    monkeypatch.setattr(forms, "TILED_FROM_MAPS", 10**9)
    attention()(torch.randn(1, keys, M).double())
    assert len(calls) == expected


@pytest.mark.parametrize("keys, expected", [(127, 0), (128, 1)])
def test_wide_heads_run_in_tiles_sooner(monkeypatch, keys, expected):
    calls = spied(monkeypatch)
    conv = goh.HeadGraphConv(goh.head_graph(3), 64, 192)
    goh.MultiHeadAttention(192, 3, score_graph=conv)(torch.randn(1, keys, 192))
    assert len(calls) == expected


@pytest.mark.parametrize("batch, heads, expected", [(1, 8, 0), (2, 8, 1), (2, 7, 0)])
def test_maps_that_outgrow_the_cache_run_in_tiles_sooner(monkeypatch, batch, heads, expected):
    calls = spied(monkeypatch)
    conv = goh.HeadGraphConv(goh.head_graph(heads), 16, heads * 16)
    goh.MultiHeadAttention(heads * 16, heads, score_graph=conv)(torch.randn(batch, 128, heads * 16))
    assert len(calls) == expected


@pytest.mark.parametrize("in_degree, expected", [(2, 0), (3, 1)])
def test_narrow_heads_of_sparse_graphs_are_widened(monkeypatch, in_degree, expected):
    calls = spied(monkeypatch)
    conv = goh.HeadGraphConv.from_config(goh.SiteConfig.ring(in_degree), 5, 16, 80)
    goh.MultiHeadAttention(80, 5, score_graph=conv)(torch.randn(1, forms.TILED_FROM_KEYS, 80))
    assert len(calls) == expected


def test_a_few_queries_over_many_keys_run_on_whole_maps(monkeypatch):
    calls = spied(monkeypatch)
    monkeypatch.setattr("gohgraph.attention.forms.FEWEST_ROWS", tiled.FEWEST_ROWS)
    memory = torch.randn(1, forms.TILED_FROM_KEYS, M).double()
    for queries in (tiled.FEWEST_ROWS - 1, tiled.FEWEST_ROWS):
        attention()(torch.randn(1, queries, M).double(), memory)
    assert len(calls) == 1


@pytest.mark.parametrize("case", ["dropout", "one token", "asked for", "keyed", "second gradients"])
def test_other_forms_run_where_tiles_cannot(monkeypatch, case):
    calls = spied(monkeypatch)
    monkeypatch.setattr("gohgraph.attention.forms.FEWEST_ROWS", 1)
    monkeypatch.setattr("gohgraph.attention.forms.TILED_FROM_KEYS", 1)
    module = attention(dropout=0.5 if case == "dropout" else 0.0)
    module.form = "maps" if case == "asked for" else None
    if case == "keyed":
        module.score_graph = goh.KeyedGraphConv(goh.head_graph(H), D, M).double()
    x = torch.randn(B, 1 if case == "one token" else T, M).double()
    with sdpa_kernel(SDPBackend.MATH) if case == "second gradients" else nullcontext():
        module(x)
    assert not calls
    if case == "dropout":
        module.eval()(x)
        assert calls
    if case == "second gradients":
        module(x)
        assert calls


def test_the_drop_in_takes_tiles_too(monkeypatch):
    calls = []
    path = "gohgraph.attention.forms.tiled_attention"
    monkeypatch.setattr(path, lambda *args: calls.append(1) or tiled_attention(*args))
    conv = attention().score_graph.float()
    module = goh.GraphMultiheadAttention(M, H, batch_first=True, score_graph=conv)
    tokens = forms.TILED_FROM_KEYS + 1
    x, mask = torch.randn(1, tokens, M), torch.ones(tokens, tokens).triu(1).bool()
    fast, _ = module(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
    slow, _ = module(x, x, x, attn_mask=mask, is_causal=True, need_weights=True)
    assert calls == [1]
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)


def test_second_gradients_are_those_of_the_maps():
    module = attention(causal=True)
    x = torch.randn(1, 5, M).double().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(lambda x: module(x)[0], (x,))
    module.form = "tiled"
    first = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"Expected first gradients alone .*\(got second ones\)"):
        first.sum().backward()


def test_autocast_bfloat16():
    module = attention(causal=True).float()
    x = torch.randn(B, T, M)
    results = []
    for module.form in ("tiled", "maps"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, _ = module(x)
        y.float().sum().backward()
        assert y.dtype == torch.bfloat16 and all(p.grad.isfinite().all() for p in module.parameters())
        results.append(y.float())
    torch.testing.assert_close(*results, atol=0.05, rtol=0.05)
