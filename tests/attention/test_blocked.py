"""Attention over blocks of keys against the one on whole maps."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from gohgraph.attention import blocked, tiled
from gohgraph.attention.maps import causal_mask, mixed_attention
from gohgraph.attention.tiled import tiled_attention

B, T, H, D = 2, 13, 6, 5


@pytest.fixture(autouse=True)
def blocks(monkeypatch):
    """Tiles of four queries and three keys from one key on; counts how often they run."""
    for name, number in {"ROWS": 8, "FEWEST_KEYS": 3, "NUMBERS": 1}.items():
        monkeypatch.setattr(blocked, name, number)
    for name in ("BLOCKS_FROM_KEYS", "SHARED_BLOCKS_FROM_KEYS"):
        monkeypatch.setattr(tiled, name, 1)
    calls = []
    monkeypatch.setattr(tiled, "blocked_attention", lambda *a: calls.append(1) or blocked.blocked_attention(*a))
    return calls


def inputs(keys, receivers=H, groups=3, dtype=torch.float64):
    torch.manual_seed(0)
    q, mix = torch.randn(B, T, H, D, dtype=dtype), torch.randn(B, T, receivers, H, dtype=dtype)
    k, v = torch.randn(2, B, keys, groups, D, dtype=dtype)
    # Scores far apart, so that a row's largest one changes from block to block.
    return [x.requires_grad_() for x in (8 * q, k, v, mix)]


def some_mask(keys):
    mask = torch.rand(B, 1, T, keys) > 0.5
    mask[0, 0, 5] = False
    return mask


def values_and_gradients(attend, tensors):
    z = attend(*tensors)
    torch.manual_seed(5)
    return [z, *torch.autograd.grad((z * torch.randn(z.shape, dtype=z.dtype)).sum(), tensors)]


@pytest.mark.parametrize("receivers", [H, 3])
@pytest.mark.parametrize(("mask", "keys"), [("none", 11), ("causal", T), ("some", 11), ("some", D)])
def test_equals_whole_maps_in_value_and_gradient(blocks, mask, keys, receivers):
    tensors = inputs(keys, receivers)
    keep = some_mask(keys) if mask == "some" else None
    seen = causal_mask(T, keys, torch.device("cpu")) if mask == "causal" else keep

    def fast(q, k, v, mix):
        return tiled_attention(q, k, v, mix, None, keep, mask == "causal")

    def slow(q, k, v, mix):
        return mixed_attention(q, k, v, partial(torch.matmul, mix), None, seen)

    results = [values_and_gradients(attend, tensors) for attend in (fast, slow)]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-11)
    assert blocks == [1]
    if mask == "some":
        assert results[0][0][0, 5].eq(0).all()


@pytest.mark.parametrize("case", ["between weights", "bfloat16", "few keys"])
def test_other_calls_take_whole_rows(blocks, monkeypatch, case):
    for name in ("BLOCKS_FROM_KEYS", "SHARED_BLOCKS_FROM_KEYS"):
        monkeypatch.setattr(tiled, name, T + (case == "few keys"))
    q, k, v, mix = inputs(T, dtype=torch.bfloat16 if case == "bfloat16" else torch.float64)
    tiled_attention(q, k, v, mix, mix if case == "between weights" else None)
    assert not blocks


@pytest.mark.parametrize(
    "parts, is_causal, few, runs", [(1, True, H, 1), (2, True, H, 0), (2, True, H - 1, 1), (2, False, H, 1)]
)
def test_causal_blocks_of_few_heads_that_threads_share_out_take_more_keys(
    blocks, monkeypatch, parts, is_causal, few, runs
):
    monkeypatch.setattr(tiled, "most_parts", lambda: parts)
    monkeypatch.setattr(tiled, "FEW_HEADS", few)
    monkeypatch.setattr(tiled, "SHARED_BLOCKS_FROM_KEYS", T + 1)
    q, k, v, mix = inputs(T)
    tiled_attention(q, k, v, mix, is_causal=is_causal)
    assert len(blocks) == runs


def test_gradients_of_every_sample_are_those_of_a_loop(blocks):
    q, k, v, mix = (x.detach() for x in inputs(T))

    def loss(q, mix):
        return tiled_attention(q[None], k[:1], v[:1], mix[None], is_causal=True).sin().sum()

    gradients = torch.func.grad(loss, argnums=(0, 1))
    mapped = torch.func.vmap(gradients)(q, mix)
    for n in range(B):
        for one, other in zip(mapped, gradients(q[n], mix[n]), strict=True):
            torch.testing.assert_close(one[n], other, atol=1e-12, rtol=1e-12)
    assert len(blocks) == 1 + B


def test_second_gradients_are_refused():
    tensors = inputs(T)
    first = torch.autograd.grad(tiled_attention(*tensors).square().sum(), tensors[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"Expected first gradients alone .*\(got second ones\)"):
        first.sum().backward()


def test_blocks_share_their_memory(blocks):
    """Forward and backward make no map of more than the largest input; the memory of three blocks is made once."""
    tensors, made = inputs(T), []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            outputs = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.new_empty.default:
                made.append(outputs.numel())
            return outputs

    with Largest():
        tiled_attention(*tensors, is_causal=True).sum().backward()
    assert made.count(H * 4 * 3) == 2 + 3
