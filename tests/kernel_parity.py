"""The Triton kernels against whole maps: on a GPU, or anywhere in Triton's interpreter with TRITON_INTERPRET=1.

    TRITON_INTERPRET=1 pytest tests/kernel_parity.py

Its name keeps it out of the ordinary run, where Triton is imported without the interpreter: `test_kernels.py` runs it
in a process of its own.
"""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch
from torch import nn

import gohgraph as goh
from gohgraph.attention.kernels import launch
from gohgraph.attention.kernels.mixed_attention import flash_mixed_attention
from gohgraph.attention.maps import causal_mask, mixed_attention, plain_attention

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
pytestmark = pytest.mark.skipif(
    DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs a GPU or TRITON_INTERPRET=1"
)

# Neither T nor S is a multiple of a tile; both have more than one.
B, T, S, D = 2, 19, 23, 7


@pytest.fixture(autouse=True)
def on_the_device():
    with DEVICE:
        yield


def inputs(heads, kv_heads, keys, head_dim=D, dtype=torch.float32):
    shapes = (B, T, heads, head_dim), (B, keys, kv_heads, head_dim), (B, keys, kv_heads, head_dim)
    q, k, v = (torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes)
    return q, k, v, (torch.eye(heads) + 0.4 * torch.randn(B, T, heads, heads)).requires_grad_()


def some_mask(keys, heads=1):
    keep = torch.rand(B, heads, T, keys) > 0.4
    keep[0, :, 5] = False
    return keep


def assert_equals_maps(tensors, keep_mask=None, is_causal=False, tolerance=1e-5):
    """Values and gradients are those of whole maps, in float64, of the same numbers."""
    z = flash_mixed_attention(*tensors, keep_mask, is_causal)
    grad = torch.randn_like(z)
    gradients = (z, *torch.autograd.grad(z, tensors, grad))
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    if is_causal:
        keep_mask = causal_mask(T, T, z.device)
    expected = mixed_attention(*doubles[:3], partial(torch.matmul, doubles[3]), None, keep_mask)
    expected = (expected, *torch.autograd.grad(expected, doubles, grad.double()))
    for a, b, x in zip(gradients, expected, (z, *tensors), strict=True):
        assert a.dtype == x.dtype
        torch.testing.assert_close(a.double(), b, atol=tolerance * b.abs().max().item(), rtol=0)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "mask"),
    [(5, 5, "none"), (5, 1, "causal"), (6, 2, "some"), (3, 1, "of each head"), (5, 5, "of each head")],
)
def test_kernels_equal_whole_maps(heads, kv_heads, mask):
    keep = {"some": some_mask(S), "of each head": some_mask(S, heads)}.get(mask)
    assert_equals_maps(inputs(heads, kv_heads, T if mask == "causal" else S), keep, mask == "causal")


def test_half_precision():
    assert_equals_maps(inputs(5, 5, T, dtype=torch.float16), is_causal=True, tolerance=5e-3)


def test_blocks_of_heads_and_of_features_equal_whole_ones(monkeypatch):
    monkeypatch.setitem(launch.ROW_NUMBERS, 4, 256)
    sizes = launch.sizes(13, 19, itemsize=4)
    assert sizes["BLOCK"] == 8 and sizes["H"] == 16 and sizes["CHUNK"] == 16 and sizes["D"] == 32
    assert_equals_maps([x.detach()[:1].requires_grad_() for x in inputs(13, 13, S, head_dim=19)], some_mask(S)[:1])


def test_tensors_of_any_strides():
    """Heads before tokens, as other libraries have them, and a map whose rows send."""
    q, k, v, w = (x.detach().transpose(1, 2).contiguous() for x in inputs(5, 5, S))
    tensors = [x.transpose(1, 2).requires_grad_() for x in (q, k, v)]
    w = w.transpose(1, 2).transpose(2, 3).requires_grad_()
    assert not any(x.is_contiguous() for x in (*tensors, w))
    # Padding alone: of all heads and queries, and of keys in reverse.
    keep = torch.rand(B, 1, 1, S).gt(0.3).flip(-1)
    assert_equals_maps((*tensors, w), keep)


def test_rows_without_any_key_give_zeros_and_no_gradient():
    tensors = inputs(5, 5, S)
    z = flash_mixed_attention(*tensors, some_mask(S))
    z.sum().backward()
    q, _, _, w = tensors
    assert z[0, 5].eq(0).all() and z[1, 5].ne(0).all()
    assert all(x.grad.isfinite().all() for x in tensors) and q.grad[0, 5].eq(0).all() and w.grad[0, 5].eq(0).all()


@pytest.mark.parametrize("shape", [(0, T, S), (B, 0, S), (B, T, 0)], ids=str)
def test_nothing_to_attend_gives_zeros_and_no_gradient(shape):
    batch, tokens, keys = shape
    q, k, v = (torch.randn(batch, n, 3, D, requires_grad=True) for n in (tokens, keys, keys))
    w = torch.randn(3, 3, requires_grad=True)
    z = flash_mixed_attention(q, k, v, w)
    assert z.shape == q.shape and z.eq(0).all()
    assert all(x.eq(0).all() for x in torch.autograd.grad(z.sum(), (q, k, v, w)))


def test_gradients_of_every_sample_are_those_of_a_loop():
    # One tile: the loop is over samples.
    tensors = [x.detach()[:, :7] for x in inputs(3, 3, S)]
    keep = some_mask(S)[..., :7, :7]

    def loss(q, k, v, w, keep):
        return flash_mixed_attention(*(x.unsqueeze(0) for x in (q, k, v, w, keep))).sin().sum()

    gradients = torch.func.grad(loss, argnums=(0, 1, 2, 3))
    mapped = torch.func.vmap(gradients)(*tensors, keep)
    for b in range(B):
        for a, expected in zip(mapped, gradients(*(x[b] for x in tensors), keep[b]), strict=True):
            torch.testing.assert_close(a[b], expected, atol=1e-5, rtol=1e-5)


def test_identity_is_plain_attention():
    q, k, v, _ = inputs(5, 5, T)
    z = flash_mixed_attention(q, k, v, torch.eye(5), is_causal=True)
    torch.testing.assert_close(z, plain_attention(q, k, v, None, 0.0, True), atol=1e-6, rtol=0)


def test_large_scores_do_not_overflow():
    q, k, v, w = inputs(3, 3, S)
    assert_equals_maps([(300 * q).detach().requires_grad_(), k, v, w], tolerance=1e-3)


@pytest.fixture
def on_cuda(monkeypatch):
    """CPU tensors take the way those on a GPU would."""
    calls = []
    monkeypatch.setattr("gohgraph.attention.forms.kernel_refuses", lambda *args: "")
    monkeypatch.setattr(
        "gohgraph.attention.forms.flash_mixed_attention", lambda *args: calls.append(1) or flash_mixed_attention(*args)
    )
    return calls


GRAPHS = {"ring 2": ("ring", {"hops": 1}), "ring 4": ("ring", {"hops": 3}), "complete": ("complete", {})}


@pytest.mark.parametrize(
    ("graph", "edges"), [("ring 2", "token"), ("ring 4", "token"), ("complete", "token"), ("complete", "static")]
)
def test_an_attention_block_by_kernels_equals_its_whole_maps(on_cuda, graph, edges):
    """Gradients of every parameter, those behind the edge weights among them; two rounds, routed heads, padding."""
    heads, d_model = 5, 35
    topology, options = GRAPHS[graph]
    rounds = 2 if graph == "complete" else 1
    conv = goh.HeadGraphConv(goh.head_graph(heads, topology, **options), D, d_model, edges=edges, rounds=rounds)
    for parameter in conv.parameters():
        nn.init.normal_(parameter, std=0.3)
    router = goh.HeadRouter(d_model, heads, num_shared=1, top_k=3) if graph == "ring 4" else None
    module = goh.MultiHeadAttention(d_model, heads, score_graph=conv, router=router, causal=True)
    x = torch.randn(B, T, d_model, requires_grad=True)
    masks = {"keep_mask": (torch.arange(T) < torch.tensor([[T], [11]]))[:, None, None]} if edges == "token" else {}
    results = []
    for module.form in ("kernel", "maps"):
        y, _ = module(x, **masks)
        torch.manual_seed(5)
        results.append([y, *torch.autograd.grad((y * torch.randn_like(y)).sum(), [x, *module.parameters()])])
    assert on_cuda == [1] and results[0][0].grad_fn is not None
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
