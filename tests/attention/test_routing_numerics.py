"""The router at the edges of arithmetic: exact ones, extreme scores, low precision, no tokens."""

from __future__ import annotations

import copy

import pytest
import torch
from test_routing import M, make, random_x, sizes

from gohgraph import HeadRouter


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_zero_weights_and_all_heads_give_gates_of_one(dtype):
    """Shared and routed heads have a softmax each: every number of either, beside none, as many and others."""
    x = random_x(3, dtype=dtype)
    for h_s, h_r in sorted({pair for a in range(68) for pair in ((a, 0), (0, a), (a, a), (a, 67 - a))} - {(0, 0)}):
        router = HeadRouter(M, h_s + h_r, h_s, h_r).to(dtype)
        for weight in router.parameters():
            weight.data.zero_()
        gates = router(x).gates
        assert gates.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert (gates == 1).all(), (h_s, h_r)


@sizes
@pytest.mark.parametrize("tokens", [(0,), (2, 0), (2, 3)], ids=str)
def test_no_real_token_gives_zero_losses_and_gradients(size, tokens):
    router = make(size)
    routing = router(random_x(*tokens), torch.zeros(tokens, dtype=torch.bool))
    h_s = router.num_shared
    assert routing.gates.shape == routing.active.shape == (*tokens, router.num_heads)
    assert routing.balance_loss == routing.z_loss == routing.entropy == 0
    assert routing.load.tolist() == [1.0] * h_s + [0.0] * (router.num_heads - h_s)
    if router.num_routed:
        (routing.balance_loss + routing.z_loss).backward()
        assert router.routed.grad.eq(0).all()


@sizes
@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("tokens", [(0,), (2, 0), (0, 3)], ids=str)
def test_no_token_at_all_gives_finite_zeros(size, tokens, straight_through):
    router, x = make(size, biased=True, straight_through=straight_through), random_x(*tokens).requires_grad_()
    routing = router(x)
    assert routing.gates.shape == (*tokens, router.num_heads)
    assert routing.balance_loss == routing.z_loss == routing.entropy == 0 and routing.load.isfinite().all()
    (routing.balance_loss + routing.z_loss + routing.gates.sum()).backward()
    assert x.grad.shape == x.shape and all(p.grad is None or p.grad.eq(0).all() for p in router.parameters())
    with torch.no_grad():
        assert router(x, statistics=False).gates.shape == routing.gates.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite(dtype):
    router = make((7, 2, 3), dtype=dtype)
    x = (1e3 * random_x(13)).to(dtype).requires_grad_()
    routing = router(x)
    assert all(value.isfinite().all() for value in routing)
    loss = routing.balance_loss + routing.z_loss + routing.gates.square().sum()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, [x, *router.parameters()]))


def test_scores_too_small_for_a_float_are_still_ranked():
    router = HeadRouter(1, 5, 0, 3)
    with torch.no_grad():
        router.routed.copy_(torch.tensor([[-900.0], [-300.0], [0.0], [-500.0], [-200.0]]))
    routing = router(torch.ones(1, 1))
    assert routing.active[0].tolist() == [False, True, True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_touch_the_router(dtype):
    router, x = make(dtype=torch.float32), random_x(2, 5, dtype=torch.float32).to(dtype)
    expected = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(x)
    for inside, outside in zip(routing, expected, strict=True):
        assert inside.dtype in (torch.float32, torch.bool) and torch.equal(inside, outside)


def test_a_bfloat16_router_decides_in_float32():
    router, x = make(dtype=torch.bfloat16, biased=True), random_x(2, 5, dtype=torch.bfloat16)
    exact = copy.deepcopy(router).float()
    for inside, expected in zip(router(x), exact(x.float()), strict=True):
        assert inside.dtype == expected.dtype and torch.equal(inside, expected)


def test_built_on_the_meta_device():
    with torch.device("meta"):
        router = HeadRouter(M, 7, 2, 3)
    assert router.routed.is_meta and router(torch.empty(2, 5, M, device="meta")).gates.shape == (2, 5, 7)
