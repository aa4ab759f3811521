"""Decoding with the active heads alone equals decoding with all, and reads nothing else."""

from __future__ import annotations

import copy
import math
import random
from contextlib import contextmanager

import pytest
import torch
from helpers import GRAPHS, assert_equal_to, small_config, trained_like

import gohgraph as goh
from gohgraph.attention import block, routed_forms
from gohgraph.attention.cache import KeyValueCache
from gohgraph.attention.routed_forms import why_all_heads
from gohgraph.attention.skipped import cut_into_runs
from gohgraph.models.embeddings import RotaryPositions

B, S, H, D = 3, 11, 6, 10
M = H * D


def attention(shared=2, top_k=2, output=None, score=None, messages=None, dtype=torch.float64, **settings):
    """Routed attention with weights far from their start; every token chooses other heads."""
    graph = goh.head_graph(H)
    module = goh.MultiHeadAttention(
        M,
        H,
        causal=True,
        output_graph=None if output is None else output(graph),
        score_graph=None if score is None else goh.HeadGraphConv(goh.head_graph(H, **score), D, M, **(messages or {})),
        router=goh.HeadRouter(M, H, shared, top_k, **settings.pop("router", {})),
        **settings,
    )
    module = trained_like(module)
    with torch.no_grad():
        if module.router.balance_bias is not None:
            module.router.balance_bias.normal_(std=0.3)
    return module.to(dtype).eval()


def pays_from(monkeypatch, unread):
    """Sets from how many unread numbers heads are left out, on however many threads."""
    for name in ("SKIP_FROM_UNREAD", "SKIP_FROM_UNREAD_ON_ONE_THREAD"):
        monkeypatch.setattr(routed_forms, name, unread)


@contextmanager
def skipping(skip):
    """Leaves out heads that are off wherever that can be done, or nowhere."""
    with pytest.MonkeyPatch.context() as patch:
        pays_from(patch, 0 if skip else math.inf)
        yield


@torch.no_grad()
def decoded(module, x, skip, *, prompt=3, batch_mask=None, memory=None, **arguments):
    """Outputs and heads of the tokens after a prompt, one at a time through a cache."""
    cache = KeyValueCache(fixed=memory is not None)
    steps = [(0, prompt), *((t, t + 1) for t in range(prompt, x.shape[1]))]
    found = []
    for start, end in steps:
        keep = None if batch_mask is None else batch_mask[:, None, None, :end]
        with skipping(skip):
            found.append(module(x[:, start:end], memory, cache=cache, keep_mask=keep, **arguments))
    return [torch.cat(parts, dim=1) for parts in zip(*((y, heads.outputs) for y, heads in found[1:]), strict=True)]


def assert_skipping_changes_nothing(module, x, **arguments):
    full, skipped = (decoded(module, x, skip, **arguments) for skip in (False, True))
    for expected, actual in zip(full, skipped, strict=True):
        assert_equal_to(actual, expected)
    assert skipped[1].shape == (*x[:, arguments.get("prompt", 3) :].shape[:2], H, D)
    off = skipped[1].abs().sum(dim=-1).eq(0)  # [B, T, H]
    assert torch.equal(off.sum(dim=-1), torch.full_like(off[..., 0].int(), H - module.router.num_active).long())


def tokens(batch=B, dtype=torch.float64):
    return torch.randn(batch, S, M, dtype=dtype)


@pytest.mark.parametrize("batch", [1, B])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_kv_heads": 3},
        {"num_kv_heads": 1},
        {"bias": False},
        {"rotary": RotaryPositions(D)},
        {"shared": 0, "top_k": 1},
        {"shared": 1, "top_k": 4},
        {"shared": H, "top_k": 0},
        {"shared": 2, "top_k": 4},
        {"router": {"straight_through": True}},
        {"router": {"bias_rate": 0.1}},
        {"score": {"topology": "ring", "hops": 2}},
        {"score": {"topology": "complete"}, "num_kv_heads": 2},
        {"score": {"topology": "complete"}, "messages": {"top_edges": 2}},
        {"score": {"topology": "complete"}, "messages": {"rounds": 2, "backend": "pyg"}},
        {"num_kv_heads": 2, "bias": False, "rotary": RotaryPositions(D), "shared": 1, "top_k": 2},
    ],
    ids=str,
)
def test_values_are_those_of_all_heads(settings, batch):
    assert_skipping_changes_nothing(attention(**settings), tokens(batch))


GRAPH_FORMS = {
    "dense": lambda graph: goh.HeadGraphConv(graph, D, M),
    "pyg": lambda graph: goh.HeadGraphConv(graph, D, M, backend="pyg"),
    "rounds": lambda graph: goh.HeadGraphConv(graph, D, M, rounds=3),
    "norm": lambda graph: goh.HeadGraphConv(graph, D, M, norm=True),
    "top-edges": lambda graph: goh.HeadGraphConv(graph, D, M, top_edges=2),
    "experts": lambda graph: goh.GraphExperts(graph, D, M, 2, rounds=2),
}


@pytest.mark.parametrize("batch", [1, B])
@pytest.mark.parametrize("form", GRAPH_FORMS)
def test_messages_flow_as_with_all_heads(form, batch):
    assert_skipping_changes_nothing(attention(output=GRAPH_FORMS[form]), tokens(batch))


def test_messages_from_earlier_layers():
    module = attention(output=lambda graph: goh.HeadGraphConv(graph, D, M, cross_layer=1))
    x, earlier = torch.randn(B, 1, M).double(), (torch.randn(B, 1, H, D).double(),)
    outputs = []
    for skip in (False, True):
        with torch.no_grad(), skipping(skip):
            outputs.append(module(x, cache=KeyValueCache(), earlier=earlier)[0])
    assert_equal_to(outputs[1], outputs[0])


@pytest.mark.parametrize("score", [None, {"topology": "complete"}], ids=["plain", "scores"])
def test_padding_and_rows_without_keys(score):
    keep = torch.ones(B, S, dtype=torch.bool)
    keep[1, :2] = False
    keep[2] = False
    module, x = attention(score=score), tokens()
    assert_skipping_changes_nothing(module, x[:2], batch_mask=keep[:2])
    full, skipped = (decoded(module, x, skip, batch_mask=keep)[0] for skip in (False, True))
    assert_equal_to(skipped, full)
    assert_equal_to(skipped[2], module.output.bias.expand(S - 3, -1))


@pytest.mark.parametrize("shape", [(B, H, 1, S), (1, H, 1, S), (1, 1, 1, S), (B, 1, 1, 1), (1, H, 1, 1)])
def test_masks_of_each_head_and_masks_that_broadcast(shape):
    module, x, cache = attention(num_kv_heads=2), tokens(), KeyValueCache()
    keep = torch.rand(shape) < 0.7
    outputs = []
    with torch.no_grad():
        module(x[:, :-1], cache=cache)
        for skip in (False, True):
            cache.truncate(S - 1)
            with skipping(skip):
                outputs.append(module(x[:, -1:], cache=cache, keep_mask=keep)[0])
    assert_equal_to(outputs[1], outputs[0])


@torch.no_grad()
@pytest.mark.parametrize("keys", [S - 2, S + 5])
@pytest.mark.parametrize("skip", [False, True])
def test_a_mask_over_other_keys_is_refused(skip, keys):
    module, x, cache = attention(), tokens(), KeyValueCache()
    module(x[:, :-1], cache=cache)
    with pytest.raises(RuntimeError), skipping(skip):
        module(x[:, -1:], cache=cache, keep_mask=torch.ones(B, 1, 1, keys, dtype=torch.bool))


@pytest.mark.parametrize("keys", [1, 7])
@pytest.mark.parametrize("settings", [{}, {"num_kv_heads": 2}, {"score": {"topology": "ring"}}], ids=str)
def test_cross_attention_reads_its_fixed_cache(settings, keys):
    module = attention(**settings)
    module.causal = False
    assert_skipping_changes_nothing(module, tokens(), memory=torch.randn(B, keys, M).double(), prompt=1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_narrow_floats(dtype, tolerance):
    module, x = attention(dtype=dtype), tokens(dtype=dtype)
    full, skipped = (decoded(module, x, skip)[0] for skip in (False, True))
    assert skipped.dtype == dtype
    assert (skipped - full).abs().max() <= tolerance * full.abs().max()


def spoil(module, cache, active, place):
    """Writes NaN over what only heads that are off would read."""
    unread = ~active[:, 0].unflatten(-1, (module.num_kv_heads, -1)).any(dim=-1)  # [B, G]
    features = (~active.any(dim=0)).flatten().repeat_interleave(D)  # [H*D], off in every row
    if place in ("keys", "values"):
        assert unread.any()
        cache.read()[place == "values"].masked_fill_(unread[:, None, :, None], float("nan"))
    elif place == "output":
        module.output.weight.masked_fill_(features, float("nan"))
    elif place == "query":
        module.query.weight.masked_fill_(features.unsqueeze(1), float("nan"))
    else:
        module.query.bias.masked_fill_(features, float("nan"))


@pytest.mark.parametrize("place", ["keys", "values", "query", "query bias", "output"])
@pytest.mark.parametrize("settings", [{}, {"num_kv_heads": 3}, {"score": {"topology": "complete"}}], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("crosses", [False, True])
@torch.no_grad()
def test_nothing_of_heads_that_are_off_is_read(settings, batch, crosses, place):
    module, x = attention(shared=1, top_k=1, **settings), tokens(batch)
    # torch returns zeros where no score in a row is a number and there are fewer than it reads at once, 8.
    memory = torch.randn(batch, 13, M).double() if crosses else None
    cache = KeyValueCache(fixed=crosses)

    def last(skip):
        if not crosses:
            cache.truncate(S - 1)
        with skipping(skip):
            return module(x[:, -1:], memory, cache=cache)

    module(x[:, :-1], memory, cache=cache)
    expected, heads = last(skip=True)
    assert_equal_to(last(skip=False)[0], expected)
    spoil(module, cache, heads.routing.active, place)
    assert_equal_to(last(skip=True)[0], expected)
    assert last(skip=False)[0].isnan().any()


def skips(module, x, keys):
    return not why_all_heads(module, x, keys)


@torch.no_grad()
def test_where_heads_are_left_out(monkeypatch):
    module, x = attention(dropout=0.1), tokens()
    one = x[:, -1:]
    pays_from(monkeypatch, 10**6)
    assert not skips(module, one, S) and skips(module, one, 10**6)
    module.form = "skipped"
    assert skips(module, one, S) and not skips(module, x, S)
    with torch.enable_grad():
        assert not skips(module, one, S)
    assert not skips(module.train(), one, S)
    module.dropout = 0.0
    assert skips(module, one, S) and not skips(module.eval(), one[:, :0], S) and not skips(module, one[:0], S)
    with monkeypatch.context() as patched:
        patched.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not skips(module, one, S)
    module.form = "plain"
    assert not skips(module, one, 10**9)
    keyed = attention()
    keyed.score_graph, keyed.form = goh.KeyedGraphConv(goh.head_graph(H), D, M).double(), "skipped"
    assert not skips(keyed, one, 10**9)


@torch.no_grad()
def test_asked_for_where_it_cannot_be_it_says_why():
    module, x = attention(), tokens()
    module.form = "skipped"
    with pytest.raises(ValueError, match="'skipped' takes .got more than one token"):
        module(x)
    plain = goh.MultiHeadAttention(M, H).double()
    plain.form = "skipped"
    with pytest.raises(ValueError, match="'skipped' takes .got no router"):
        plain(x[:, -1:])


@torch.no_grad()
def test_from_how_many_unread_numbers_heads_are_left_out(monkeypatch):
    module, one = attention(shared=1, top_k=2, num_kv_heads=2), tokens(5)[:, -1:]
    # Half of the heads are off: half of the keys, and of the weights, which the five rows share.
    unread = (7 * 2 * D + M * M / 5) / 2
    pays_from(monkeypatch, unread)
    assert skips(module, one, 7) and not skips(module, one, 6)
    monkeypatch.setattr(routed_forms, "SKIP_FROM_UNREAD_ON_ONE_THREAD", 2 * unread)
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert skips(module, one, 7) == (threads == 2)
    pays_from(monkeypatch, unread)
    assert not skips(module, one.to("meta"), 7)
    asked = []
    monkeypatch.setattr(block, "why_all_heads", lambda block, x, keys: asked.append(keys) or "not here")
    self_cache, fixed = KeyValueCache(), KeyValueCache(fixed=True)
    for _ in range(2):
        module(one, cache=self_cache)
        module(one, torch.randn(5, 7, M).double(), cache=fixed)
    assert asked == [1, 7, 2, 7]


class Doubled(torch.nn.Linear):
    """A projection that does more than multiply, as adapters do."""

    def forward(self, x):
        return 2 * super().forward(x)


def replace(module, name):
    linear = Doubled(M, M).double()
    linear.load_state_dict(getattr(module, name).state_dict())
    setattr(module, name, linear)


def add_hook(module, name):
    getattr(module, name).register_forward_hook(lambda linear, inputs, y: 2 * y)


def add_pre_hook(module, name):
    getattr(module, name).register_forward_pre_hook(lambda linear, inputs: (2 * inputs[0],))


def patch(module, name):
    linear = getattr(module, name)
    linear.forward = lambda x: 2 * torch.nn.Linear.forward(linear, x)


@pytest.mark.parametrize("name", ["query", "key", "value", "output"])
@pytest.mark.parametrize("change", [replace, add_hook, add_pre_hook, patch])
def test_projections_that_do_more_than_multiply_are_called(change, name):
    module, x = attention(), tokens()
    before = decoded(module, x, True)[0]
    change(module, name)
    full, skipped = (decoded(module, x, skip)[0] for skip in (False, True))
    assert torch.equal(skipped, full) and not torch.allclose(skipped, before)


@pytest.mark.parametrize("batch", [1, B])
def test_autocast_decodes_with_all_heads(batch):
    module, x = attention(dtype=torch.float32), tokens(batch, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        full, skipped = (decoded(module, x, skip)[0] for skip in (False, True))
    assert skipped.dtype == torch.bfloat16 and torch.equal(skipped, full)


@pytest.mark.parametrize("skip", [False, True])
@torch.no_grad()
def test_an_empty_batch(skip):
    module, x, cache = attention(), tokens(0), KeyValueCache()
    with skipping(skip):
        assert module(x[:, :-1], cache=cache)[0].shape == (0, S - 1, M)
        assert module(x[:, -1:], cache=cache)[1].outputs.shape == (0, 1, H, D)


def test_gates_without_statistics_keep_their_gradients():
    router, x = goh.HeadRouter(M, H, 2, 2), torch.randn(1, 1, M)
    gradients = []
    for statistics in (True, False):
        router.zero_grad()
        router(x, statistics=statistics).gates.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in router.parameters()])
    for expected, actual in zip(*gradients, strict=True):
        assert expected.any() and torch.equal(actual, expected)


def test_the_form_is_no_part_of_the_weights():
    module = attention()
    names = list(module.state_dict())
    module.form = "skipped"
    assert copy.deepcopy(module).form == "skipped" and list(module.state_dict()) == names


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("bias_rate", [0.0, 0.1])
@pytest.mark.parametrize(("shared", "top_k"), [(2, 2), (1, 1), (0, 3), (H, 0), (2, 4)])
@torch.no_grad()
def test_gates_of_one_token_equal_those_of_many(shared, top_k, bias_rate, straight_through):
    router = goh.HeadRouter(M, H, shared, top_k, bias_rate=bias_rate, straight_through=straight_through).double()
    for scale in (0.0, 1.0, 1e4):
        for weight in (router.routed, router.shared, router.kinds):
            weight.normal_().mul_(scale)
        if bias_rate:
            router.balance_bias.normal_(std=0.2)
        for x in torch.randn(7, 1, 1, M).double():
            general, one = router(x), router(x, statistics=False)
            assert torch.equal(one.active, general.active) and one.load is None and one.balance_loss is None
            assert_equal_to(one.gates, general.gates)
            if scale == 0:
                assert torch.equal(one.gates[one.active], torch.ones_like(one.gates[one.active])) or top_k < H - shared


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("bias_rate", [0.0, 0.1])
@torch.no_grad()
def test_one_token_breaks_ties_as_many_do(monkeypatch, bias_rate, straight_through):
    router = goh.HeadRouter(5, 7, 1, 3, bias_rate=bias_rate, straight_through=straight_through)
    for scale in (1, 20):
        for _ in range(100):
            router.routed.copy_(scale * torch.randint(-1, 2, (6, 5)))
            if bias_rate:
                router.balance_bias.copy_(0.1 * torch.randint(-1, 2, (6,)))
            x = torch.randint(-1, 2, (1, 1, 5)).float()
            general = router(x)
            with monkeypatch.context() as patched:
                patched.setattr(router, "_choose", None)
                one = router(x, statistics=False)
            assert torch.equal(one.active, general.active)
            torch.testing.assert_close(one.gates, general.gates, rtol=0, atol=1e-5)


@pytest.mark.parametrize("graph", [name for name, config in GRAPHS.items() if config and config.routing])
@torch.no_grad()
def test_generate_gives_the_same_tokens(graph):
    model = trained_like(goh.LanguageModel(small_config(graph))).eval()
    prompt = torch.randint(13, (2, 5))
    keep = torch.ones(2, 5, dtype=torch.bool)
    keep[0, :2] = False
    texts = []
    for skip in (False, True):
        with skipping(skip):
            texts.append(model.generate(prompt, 7, temperature=0, keep_mask=keep))
    assert torch.equal(*texts)


@torch.no_grad()
def test_beam_search_gives_the_same_tokens():
    model = trained_like(goh.Transformer(small_config("moh", positions="sinusoidal"))).eval()
    source = torch.randint(3, 13, (2, 7))
    texts = []
    for skip in (False, True):
        with skipping(skip):
            texts.append(model.generate(source, bos=1, eos=2, max_new_tokens=6, num_beams=3))
    assert torch.equal(*texts)


def test_runs_cut_heads_exactly_and_leave_few_alone():
    draw = random.Random(0)
    for _ in range(2000):
        heads = sorted(draw.choices(range(17), k=draw.randint(1, 13)))
        runs = cut_into_runs(heads)
        assert [run.first + run.step * place for run in runs for place in range(run.length)] == heads
        # One head alone only at the end, where the run before it has none to give.
        assert all(run.length > 1 for run in runs[:-1])
        assert runs[-1].length > 1 or len(runs) == 1 or runs[-2].length == 2
