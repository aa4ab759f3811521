"""The Mixture-of-Head router against its formulas, written out in numpy, token by token."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers import assert_equal_to
from torch.func import functional_call

from gohgraph import HeadRouter, RoutingConfig
from gohgraph.attention.routing import routers

M = 11
# H, h_s, k
SIZES = {
    "usual": (7, 2, 3),
    "one shared": (7, 1, 3),
    "none shared": (7, 0, 3),
    "all shared": (7, 7, 0),
    "k = 1": (7, 2, 1),
    "k = all": (7, 2, 5),
    "k = all, none shared": (7, 0, 7),
    "one routed": (7, 6, 1),
    "one head, routed": (1, 0, 1),
    "one head, shared": (1, 1, 0),
}
TOKENS = [(), (5,), (2, 5), (2, 3, 5)]
sizes = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)


def make(size=SIZES["usual"], *, biased=False, dtype=torch.float64, **settings):
    """A router with weights as after training."""
    router = HeadRouter(M, *size, bias_rate=0.01 if biased else 0.0, **settings).to(dtype)
    with torch.no_grad():
        for weight in router.parameters():
            weight.normal_(std=0.5)
        if biased:
            router.balance_bias.normal_(std=0.2)
    return router


def random_x(*tokens, dtype=torch.float64):
    return torch.randn(*tokens, M, dtype=dtype)


def random_mask(*tokens):
    mask = torch.rand(tokens) < 0.6
    # At least one real token.
    return mask.reshape(-1).index_fill(0, torch.tensor([0]), True).reshape(tokens)


def softmax(logits):
    weights = np.exp(logits - logits.max(initial=-np.inf))
    return weights / weights.sum()


def reference(router, x, keep_mask=None):
    """The formulas, one token at a time: gates, active, balance loss, z-loss, load, entropy."""
    w_r, w_s, w_h = (w.detach().numpy() for w in (router.routed, router.shared, router.kinds))
    h_s, h_r, k = len(w_s), len(w_r), router.top_k
    bias = np.zeros(h_r) if router.balance_bias is None else router.balance_bias.numpy()
    tokens = x.detach().numpy().reshape(-1, M)
    real = np.ones(len(tokens), bool) if keep_mask is None else keep_mask.numpy().reshape(-1)
    gates, active = np.zeros((len(tokens), h_s + h_r)), np.zeros((len(tokens), h_s + h_r), bool)
    p, chosen = np.zeros((len(tokens), h_r)), np.zeros((len(tokens), h_r))
    z, entropy = np.zeros(len(tokens)), np.zeros(len(tokens))
    for t, token in enumerate(tokens):
        w_0, w_1 = 2 * softmax(w_h @ token)
        active[t, :h_s] = True
        if h_s:
            gates[t, :h_s] = w_0 * h_s * softmax(w_s @ token)
        if not h_r:
            continue
        p[t] = softmax(w_r @ token)
        top = sorted(range(h_r), key=lambda i: (-(p[t, i] + bias[i]), i))[:k]
        for i in top:
            gates[t, h_s + i] = w_1 * k * p[t, i] / sum(p[t, j] for j in top)
        active[t, [h_s + i for i in top]], chosen[t, top] = True, 1
        z[t] = np.log(np.exp(w_r @ token).sum()) ** 2
        entropy[t] = -(p[t] * np.log(p[t])).sum()
    f, mean_p = chosen[real].mean(axis=0), p[real].mean(axis=0)
    balance = h_r / k * (f * mean_p).sum() if h_r else 0.0
    if router.straight_through:
        gates = active.astype(float)
    shape = (*x.shape[:-1], h_s + h_r)
    load = np.concatenate([np.ones(h_s), f])
    return gates.reshape(shape), active.reshape(shape), balance, z[real].mean(), load, entropy[real].mean()


@sizes
@pytest.mark.parametrize("tokens", TOKENS, ids=str)
@pytest.mark.parametrize("settings", [{}, {"biased": True}, {"straight_through": True}], ids=str)
@pytest.mark.parametrize("is_masked", [False, True], ids=["all", "masked"])
def test_equals_the_formulas(size, tokens, settings, is_masked):
    router, x = make(size, **settings), random_x(*tokens)
    keep = random_mask(*tokens) if is_masked else None
    routing = router(x, keep)
    assert routing.active.dtype == torch.bool and (routing.active.sum(-1) == router.num_active).all()
    for actual, expected in zip(routing, reference(router, x, keep), strict=True):
        assert actual.shape == np.shape(expected)
        assert_equal_to(actual.double(), torch.from_numpy(np.asarray(expected, dtype=float)))


def test_a_bias_changes_the_choice_and_no_score():
    router, x = make(biased=True), random_x(101)
    unbiased = copy.deepcopy(router)
    unbiased.balance_bias = None
    actual, other = router(x), unbiased(x)
    assert not torch.equal(actual.active, other.active)
    assert torch.equal(actual.z_loss, other.z_loss) and torch.equal(actual.entropy, other.entropy)
    same = (actual.active == other.active).all(-1)
    assert same.any() and torch.equal(actual.gates[same], other.gates[same])


@sizes
def test_the_released_loss_is_k_times_ours(size):
    """The released MoH code takes mean(P f) h_r², P and f over the routed heads."""
    router, x = make(size), random_x(53)
    if not router.num_routed:
        assert router(x).balance_loss == 0
        return
    p = (x @ router.routed.T).softmax(dim=-1)  # [N, h_r]
    f = router(x).active[:, router.num_shared :].double().mean(dim=0)  # [h_r]
    released = (p.mean(dim=0) * f).mean() * router.num_routed**2
    assert_equal_to(released, router.top_k * router(x).balance_loss)


def test_ties_go_to_the_lower_index():
    router = make((9, 2, 3))
    with torch.no_grad():
        router.routed.zero_()
    assert router(random_x(5)).active.nonzero()[:, 1].reshape(5, -1).unique(dim=0).tolist() == [[0, 1, 2, 3, 4]]
    with torch.no_grad():
        # Of seven routed heads, 6 leads, then 1, 3 and 5 with equal scores.
        router.routed[[1, 3, 5]] = 1.0
        router.routed[6] = 2.0
    ones = torch.ones(1, M, dtype=torch.float64)
    assert router(ones).active[0, 2:].nonzero().flatten().tolist() == [1, 3, 6]
    assert router(-ones).active[0, 2:].nonzero().flatten().tolist() == [0, 2, 4]


@sizes
def test_straight_through_gates_are_one_or_zero_and_learn_like_soft_ones(size):
    hard, x = make(size, straight_through=True), random_x(2, 5).requires_grad_()
    soft = copy.deepcopy(hard)
    soft.straight_through = False
    seed = torch.randn(2, 5, size[0], dtype=torch.float64)
    gradients = []
    for router in (hard, soft):
        leaves = [x, *router.parameters()]
        gradients.append(torch.autograd.grad((router(x).gates * seed).sum(), leaves, allow_unused=True))
    assert torch.equal(hard(x).gates, hard(x).active.double())
    for actual, other in zip(*gradients, strict=True):
        assert actual is other is None or torch.equal(actual, other)


@sizes
@pytest.mark.parametrize("biased", [False, True])
def test_gradcheck(size, biased):
    router, x = make(size, biased=biased), random_x(3).requires_grad_()
    names = [name for name, _ in router.named_parameters()]
    keep = torch.tensor([True, False, True])

    def run(x, *weights):
        routing = functional_call(router, dict(zip(names, weights, strict=True)), (x, keep))
        return routing.gates, routing.balance_loss, routing.z_loss

    weights = [w.detach().clone().requires_grad_() for w in router.parameters()]
    # An empty matrix has no gradient to compare.
    weights = [w if w.numel() else w.detach() for w in weights]
    assert torch.autograd.gradcheck(run, (x, *weights))


def test_load_and_entropy_carry_no_gradient():
    routing = make()(random_x(5))
    assert not routing.load.requires_grad and not routing.entropy.requires_grad
    assert routing.balance_loss.requires_grad and routing.z_loss.requires_grad and routing.gates.requires_grad


@pytest.mark.parametrize("top_k", [1, 3, 5])
def test_even_scores_or_even_load_give_a_loss_of_one(top_k):
    router = make((7, 2, top_k))
    with torch.no_grad():
        router.routed.zero_()
    assert_equal_to(router(random_x(13)).balance_loss, torch.ones(()).double())
    # Every token prefers the next `top_k` heads around a ring: even load whatever the scores.
    router = HeadRouter(5, 5, 0, top_k).double()
    with torch.no_grad():
        router.routed.copy_(sum(torch.eye(5).roll(shift, 0) * (9 - shift) for shift in range(top_k)))
    routing = router(torch.eye(5, dtype=torch.float64))
    assert_equal_to(routing.load, torch.full((5,), top_k / 5, dtype=torch.float64))
    assert_equal_to(routing.balance_loss, torch.ones(()).double())


def test_balance_loss_is_at_least_one_where_load_follows_scores():
    """Chebyshev's sum inequality, for equally ordered f and P; at most h_r / k always, all tokens in k heads."""
    ordered = 0
    for _ in range(300):
        router = make((7, 2, 2))
        x = random_x(11)
        loss = router(x).balance_loss.item()
        f = router(x).load[2:]
        p = (x @ router.routed.T).softmax(dim=-1).mean(dim=0)
        assert 0 < loss <= 5 / 2
        assert router(x[:1]).balance_loss > 1
        pairs = torch.combinations(torch.arange(5))
        if ((f[pairs[:, 0]] - f[pairs[:, 1]]) * (p[pairs[:, 0]] - p[pairs[:, 1]]) >= 0).all():
            ordered += 1
            assert loss >= 1 - 1e-12
    assert ordered > 10


def test_balance_loss_can_fall_below_one_where_load_and_scores_disagree():
    """One token sure of head 0, two hardly preferring head 1: f = (1, 2) / 3, P = (1.98, 1.02) / 3."""
    router = HeadRouter(2, 2, 0, 1).double()
    with torch.no_grad():
        router.routed.copy_(torch.tensor([[100.0, 0.0], [0.0, np.log(0.51 / 0.49)]], dtype=torch.float64))
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    assert_equal_to(router(x).balance_loss, torch.tensor(2 * (1.98 + 2 * 1.02) / 9, dtype=torch.float64))


def test_descending_the_balance_loss_evens_the_load():
    router, x = make((7, 2, 1)), random_x(500) + 1
    before = router(x).load[2:]
    for _ in range(200):
        (gradient,) = torch.autograd.grad(router(x).balance_loss, router.routed)
        router.routed.data -= 0.5 * gradient
    after = router(x).load[2:]
    assert before.std() / before.mean() > 0.5
    assert after.std() / after.mean() < 0.2 and router(x).balance_loss < 1.05


@sizes
@pytest.mark.parametrize("biased", [False, True])
def test_content_of_padding_changes_nothing(size, biased):
    router, keep = make(size, biased=biased), random_mask(2, 5)
    x = random_x(2, 5).requires_grad_()
    other = torch.where(keep.unsqueeze(-1), x.detach(), 50 * random_x(2, 5))
    actual, same = router(x, keep), router(other, keep)
    assert torch.equal(actual.gates[keep], same.gates[keep])
    for name in ("balance_loss", "z_loss", "load", "entropy"):
        assert torch.equal(getattr(actual, name), getattr(same, name)), name
    alone = router(x[keep])
    for name in ("balance_loss", "z_loss", "load", "entropy"):
        assert_equal_to(getattr(actual, name), getattr(alone, name))
    if router.num_routed:
        (gradient,) = torch.autograd.grad(actual.balance_loss + actual.z_loss, x)
        assert gradient[~keep].eq(0).all() and gradient[keep].abs().amax(-1).gt(0).all()


def test_a_forward_pass_leaves_nothing_behind():
    router = make(biased=True)
    before, state = set(vars(router)), copy.deepcopy(router.state_dict())
    for _ in range(3):
        router(random_x(2, 5)).balance_loss.backward()
    assert set(vars(router)) == before
    assert all(torch.equal(router.state_dict()[name], value) for name, value in state.items())
    lists = [value for kind in type(router).__mro__ for value in vars(kind).values() if isinstance(value, (list, dict))]
    assert not any(torch.is_tensor(item) for value in lists for item in value)


def test_state_dict_and_deepcopy_carry_weights_and_bias():
    router, x = make(biased=True), random_x(2, 5)
    assert {name: list(value.shape) for name, value in router.state_dict().items()} == {
        "routed": [5, M], "shared": [2, M], "kinds": [2, M], "balance_bias": [5]
    }  # fmt: skip
    other = make(biased=True)
    other.load_state_dict(router.state_dict())
    for again in (other, copy.deepcopy(router)):
        for actual, expected in zip(again(x), router(x), strict=True):
            assert torch.equal(actual, expected)
    assert "balance_bias" not in make().state_dict()


def test_the_balance_bias_moves_towards_the_idle():
    router = make(biased=True)
    before = router.balance_bias.clone()
    router.update_balance_bias(torch.tensor([1.0, 1.0, 0.75, 0.5, 0.25, 0.5, 0.0]))
    moved = (router.balance_bias - before) / 0.01
    assert_equal_to(moved, torch.tensor([-1.0, -1.0, 1.0, -1.0, 1.0]).double())


def test_the_budget_may_change_between_calls():
    router, x = make((7, 2, 5)), random_x(13)
    for k in (5, 4, 2, 1, 3):
        router.top_k = k
        routing = router(x)
        assert router.num_active == 2 + k and (routing.active.sum(-1) == 2 + k).all()
        for actual, expected in zip(routing, reference(router, x), strict=True):
            assert_equal_to(actual.double(), torch.from_numpy(np.asarray(expected, dtype=float)))


def test_routers_are_listed_in_model_order():
    model = torch.nn.Sequential(make(), torch.nn.Linear(2, 2), torch.nn.Sequential(make()))
    assert routers(model) == [model[0], model[2][0]]
    assert routers(model[0]) == [model[0]] and routers(model[1]) == []


def test_from_config_takes_the_budget_of_its_layer():
    config = RoutingConfig(1, (4, 2), straight_through=True, bias_rate=0.001)
    made = [HeadRouter.from_config(config, M, 7, layer=layer) for layer in range(2)]
    assert [router.top_k for router in made] == [4, 2]
    assert all(r.straight_through and r.num_shared == 1 and r.balance_bias is not None for r in made)
    assert HeadRouter.from_config(RoutingConfig(1, 3), M, 7, layer=5).balance_bias is None


REFUSED = {
    "no width": lambda: HeadRouter(0, 7, 2, 3),
    "no heads": lambda: HeadRouter(M, 0, 0, 0),
    "too many shared": lambda: HeadRouter(M, 7, 8, 0),
    "negative shared": lambda: HeadRouter(M, 7, -1, 3),
    "no routed head used": lambda: HeadRouter(M, 7, 2, 0),
    "too many used": lambda: HeadRouter(M, 7, 2, 6),
    "used though all are shared": lambda: HeadRouter(M, 7, 7, 1),
    "a share": lambda: HeadRouter(M, 7, 2, 0.5),
    "a bool": lambda: HeadRouter(M, 7, 2, True),
    "a negative rate": lambda: HeadRouter(M, 7, 2, 3, bias_rate=-0.1),
    "a rate that is no number": lambda: HeadRouter(M, 7, 2, 3, bias_rate=float("nan")),
    "a budget set too high": lambda: setattr(make(), "top_k", 6),
    "x of another width": lambda: make()(torch.randn(2, M + 1)),
    "a mask of another shape": lambda: make()(random_x(2, 5), torch.ones(2, dtype=torch.bool)),
    "a float mask": lambda: make()(random_x(2, 5), torch.ones(2, 5)),
    "no bias to move": lambda: make().update_balance_bias(torch.ones(7)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_values_are_refused(case):
    with pytest.raises((TypeError, ValueError), match=r"^Expected .*\(got .*\)\. Do "):
        REFUSED[case]()


@pytest.mark.compiles
def test_an_exported_router_chooses_the_same_heads_of_any_number_of_tokens():
    router, x = make(dtype=torch.float32), torch.randn(2, 5, M)
    batch, tokens = torch.export.Dim("batch", max=8), torch.export.Dim("tokens", max=64)
    with torch.no_grad():
        # Three of the routed heads are always as good as each other.
        router.routed[2:4] = router.routed[1]
        program = torch.export.export(router, (x,), dynamic_shapes={"x": {0: batch, 1: tokens}})
        # Of programs, ONNX takes none with a stable sort.
        assert not [node for node in program.graph.nodes if "sort" in str(node.target)]
        for inputs in (x, torch.randn(3, 11, M)):
            found, expected = program.module()(inputs), router(inputs)
            assert torch.equal(found.active, expected.active)
            torch.testing.assert_close(found.gates, expected.gates)
