"""The drop-in against torch.nn.MultiheadAttention, by itself and inside torch's transformers."""

from __future__ import annotations

import copy
import itertools
import random
from functools import cache

import pytest
import torch
from helpers import assert_equal_to, moved, traced
from torch import nn

from gohgraph import GraphMultiheadAttention, HeadGraphConv, HeadRouter, KeyedGraphConv, MultiHeadAttention, head_graph
from gohgraph.attention.slots import HeadSlots

T, S, B = 5, 7, 3


def graph(num_heads, head_dim, d_model, topology="complete", **options):
    return HeadGraphConv(head_graph(num_heads, topology), head_dim, d_model, **options)


def new_slots(kind, num_heads, head_dim, d_model):
    """Slots at their neutral start, by name."""
    sizes = (num_heads, head_dim, d_model)
    return {
        "none": {},
        "outputs": {"output_graph": graph(*sizes)},
        "wide": {"score_graph": graph(*sizes, "ring" if num_heads > 1 else "empty")},
        "scores": {"score_graph": graph(*sizes)},
        "rounds": {"score_graph": graph(*sizes, rounds=2), "output_graph": graph(*sizes, rounds=2)},
        "routed": {"router": zero_router(d_model, num_heads), "output_graph": graph(*sizes)},
    }[kind]


def zero_router(d_model, num_heads):
    router = HeadRouter(d_model, num_heads, num_shared=0, top_k=num_heads)
    for weight in router.parameters():
        nn.init.zeros_(weight)
    return router


def random_case(rng):
    heads, head_dim = rng.choice([1, 2, 3, 5]), rng.choice([1, 2, 7])
    width = heads * head_dim
    batch, tokens, keys = rng.choice([1, 2, 3]), rng.choice([1, 4, 5]), rng.choice([3, 7])
    attends = rng.choice(["self", "memory", "separate"])
    options = {"bias": rng.random() < 0.7, "add_bias_kv": rng.random() < 0.3, "add_zero_attn": rng.random() < 0.3}
    options |= {"batch_first": rng.random() < 0.5, "dropout": rng.choice([0.0, 0.3])}
    if attends != "self":
        options |= {"kdim": rng.choice([None, 4]), "vdim": rng.choice([None, 6])}
    if options.get("kdim") != options.get("vdim") or options.get("kdim"):
        attends = "separate"
    training = rng.random() < 0.5 and not options["dropout"]
    slots = rng.choice(["none", "outputs", "wide", "scores", "rounds", "routed"])
    return heads, width, batch, tokens, keys, attends, options, training, slots, rng.random() < 0.2


def random_inputs(case, draw):
    heads, width, batch, tokens, keys, attends, options, _, _, unbatched = case
    if unbatched:
        batch = 1

    def tensor(length, size):
        x = draw.randn(batch, length, size)
        x = x[0] if unbatched else x if options["batch_first"] else x.transpose(0, 1).contiguous()
        return x.requires_grad_()

    query = tensor(tokens, width)
    if attends == "self":
        return (query, query, query), tokens, batch
    key = tensor(keys, options.get("kdim") or width)
    value = key if attends == "memory" else tensor(keys, options.get("vdim") or width)
    return (query, key, value), keys, batch


def random_masks(case, keys, batch, rng, draw):
    heads, tokens, unbatched = case[0], case[3], case[-1]
    masks = {"need_weights": rng.random() < 0.5, "average_attn_weights": rng.random() < 0.5}
    kind = rng.choice(["none", "bool", "float"])

    def mask(*shape):
        hidden = draw.rand(*shape) < 0.4
        hidden[..., 0] = False
        return hidden if kind == "bool" else draw.randn(*shape).masked_fill(hidden, float("-inf"))

    if kind != "none" and rng.random() < 0.7:
        masks["key_padding_mask"] = mask(keys) if unbatched else mask(batch, keys)
    if kind != "none" and rng.random() < 0.7:
        masks["attn_mask"] = mask(*rng.choice([(tokens, keys), (batch * heads, tokens, keys)]))
    if kind == "none" and tokens == keys and rng.random() < 0.5:
        causal = nn.Transformer.generate_square_subsequent_mask(tokens, dtype=torch.float64)
        masks |= {"attn_mask": causal, "is_causal": True}
    return masks


class Draw:
    """Random tensors of one case."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def randn(self, *shape):
        return torch.randn(*shape, dtype=torch.float64, generator=self.generator)

    def rand(self, *shape):
        return torch.rand(*shape, dtype=torch.float64, generator=self.generator)


def options_of(seed):
    """What is chosen in the case of a seed, by name; dimensions of masks in place of their numbers."""
    rng, draw = random.Random(seed), Draw(seed)
    case = random_case(rng)
    _, keys, batch = random_inputs(case, draw)
    chosen = dict(zip(("heads", "width", "batch", "tokens", "attends", "training", "slots", "unbatched"),
                      (*case[:3], case[3], case[5], *case[7:]), strict=True))  # fmt: skip
    masks = random_masks(case, keys, batch, rng, draw)
    chosen |= case[6] | {"keys": keys, "need_weights": masks.pop("need_weights"), "causal": "is_causal" in masks}
    chosen |= {"average": masks.pop("average_attn_weights")}
    for name in ("key_padding_mask", "attn_mask"):
        mask = masks.get(name)
        chosen[name] = None if mask is None else (mask.dtype, mask.dim())
    return chosen.items()


@cache
def seeds_of_every_pair(seeds):
    """Those of the seeds, fewest first to be found, in which every two options meet that meet in any of them."""
    left = {seed: set(itertools.combinations(sorted(options_of(seed), key=str), 2)) for seed in seeds}
    taken = []
    while left:
        taken.append(max(left, key=lambda seed: len(left[seed])))
        met = left.pop(taken[-1])
        left = {seed: pairs - met for seed, pairs in left.items() if pairs - met}
    return taken


@pytest.mark.parametrize("block", range(4))
def test_random_configurations_equal_torch_in_value_and_gradient(block):
    for seed in seeds_of_every_pair(range(300))[block::4]:
        rng, draw = random.Random(seed), Draw(seed)
        case = random_case(rng)
        heads, width, _, _, _, _, options, training, slots, _ = case
        expected = nn.MultiheadAttention(width, heads, **options, dtype=torch.float64).train(training)
        for parameter in expected.parameters():
            parameter.data.copy_(draw.randn(*parameter.shape))
        actual = GraphMultiheadAttention(width, heads, **options, **new_slots(slots, heads, width // heads, width))
        actual = actual.double().train(training)
        missing, unexpected = actual.load_state_dict(expected.state_dict(), strict=False)
        assert not unexpected and all(name.split(".")[0] in actual._modules for name in missing)
        inputs, keys, batch = random_inputs(case, draw)
        masks = random_masks(case, keys, batch, rng, draw)
        results = [module(*inputs, **masks) for module in (actual, expected)]
        weights, gradients = draw.randn(*results[0][0].shape), []
        for module, (y, attention) in zip((actual, expected), results, strict=True):
            loss = (y * weights).sum() + (0 if attention is None else attention.square().sum())
            wanted = [*module.named_parameters(), *((f"input {i}", x) for i, x in enumerate(inputs))]
            found = torch.autograd.grad(loss, [tensor for _, tensor in wanted], allow_unused=True)
            gradients.append(dict(zip((name for name, _ in wanted), found, strict=True)))
        for mine, theirs in zip(*results, strict=True):
            assert (mine is None) == (theirs is None), seed
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9, msg=lambda text, s=seed: f"seed {s}: {text}")
        for name, theirs in gradients[1].items():
            mine = gradients[0][name]
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9, msg=lambda text, s=seed: f"seed {s}: {text}")


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("slots", ["none", "outputs"])
def test_without_weights_it_equals_torch_bitwise(batch_first, slots):
    expected = nn.MultiheadAttention(64, 4, batch_first=batch_first)
    actual = GraphMultiheadAttention.from_torch(expected, **new_slots(slots, 4, 16, 64))
    x, memory = torch.randn(11, 7, 64), torch.randn(11, 7, 64)
    hidden = torch.zeros(x.shape[:2] if batch_first else (7, 11), dtype=torch.bool)
    hidden[1, 3:] = True
    for inputs in ((x, x, x), (x, memory, memory)):
        ours, theirs = (m(*inputs, key_padding_mask=hidden, need_weights=False)[0] for m in (actual, expected))
        assert torch.equal(ours, theirs)


def test_its_state_dict_is_torchs():
    for options in ({}, {"bias": False}, {"kdim": 5, "add_bias_kv": True}):
        expected, actual = nn.MultiheadAttention(6, 2, **options), GraphMultiheadAttention(6, 2, **options)
        assert list(actual.state_dict()) == list(expected.state_dict())
        expected.load_state_dict(actual.state_dict())
        actual.load_state_dict(expected.state_dict())


def test_torchs_weights_do_not_load_strictly_where_graphs_would_be_lost():
    actual = GraphMultiheadAttention(6, 2, output_graph=graph(2, 3, 6))
    with pytest.raises(RuntimeError, match="output_graph.edges.bias"):
        actual.load_state_dict(nn.MultiheadAttention(6, 2).state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key.*output_graph"):
        nn.MultiheadAttention(6, 2).load_state_dict(actual.state_dict())


@pytest.mark.parametrize("topology", ["ring", "complete"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_moved_graphs_equal_those_of_the_librarys_attention(topology, need_weights):
    sizes = (5, 4, 20)
    own = MultiHeadAttention(20, 5, output_graph=graph(*sizes), score_graph=graph(*sizes, topology)).double()
    moved(own)
    slots = {"output_graph": own.output_graph, "score_graph": own.score_graph}
    dropin = GraphMultiheadAttention(20, 5, batch_first=True, **slots).double()
    parts = [own.query, own.key, own.value]
    with torch.no_grad():
        dropin.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        dropin.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
    dropin.out_proj = own.output
    x, memory = torch.randn(B, T, 20).double(), torch.randn(B, S, 20).double()
    hidden = torch.rand(B, S) < 0.4
    hidden[:, 0] = False
    expected, _ = own(x, memory, keep_mask=~hidden[:, None, None, :])
    actual, weights = dropin(x, memory, memory, key_padding_mask=hidden, need_weights=need_weights)
    assert_equal_to(actual, expected)
    if need_weights:
        assert weights.shape == (B, T, S) and not weights[hidden[:, None, :].expand_as(weights)].any()
        assert_equal_to(weights.sum(-1), torch.ones(B, T).double())


@pytest.mark.parametrize("topology", ["ring", "complete"])
def test_a_query_without_keys_gives_zeros(topology):
    attention = GraphMultiheadAttention(6, 2, bias=False, batch_first=True, score_graph=graph(2, 3, 6, topology))
    x = torch.randn(B, T, 6)
    hidden = torch.zeros(B, T, dtype=torch.bool)
    hidden[1] = True
    for need_weights in (True, False):
        y, _ = attention(x, x, x, key_padding_mask=hidden, need_weights=need_weights)
        assert not y[1].any() and y[0].all()


def layers(kind, **options):
    """One of torch's transformers, its inputs and the names of its attentions."""
    settings = {"dim_feedforward": 11, "dropout": 0.0, "batch_first": True, **options}
    x, memory = torch.randn(B, T, 20), torch.randn(B, S, 20)
    if kind == "encoder":
        with_nested = nn.TransformerEncoder(nn.TransformerEncoderLayer(20, 4, **settings), 2)
        return with_nested, (x,), {}
    if kind == "decoder":
        return nn.TransformerDecoder(nn.TransformerDecoderLayer(20, 4, **settings), 2), (x, memory), {}
    return nn.Transformer(20, 4, 2, 2, **settings), (memory, x), {}


def with_dropins(model):
    """The same model with drop-ins of moved graphs in place of its attentions."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.MultiheadAttention):
                new = GraphMultiheadAttention.from_torch(child, output_graph=graph(4, 5, 20))
                setattr(module, name, moved(new))
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return model


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("kind", ["encoder", "decoder", "transformer"])
def test_torchs_transformers_never_pass_it_by(kind, norm_first):
    plain, inputs, masks = layers(kind, norm_first=norm_first)
    model = with_dropins(plain)
    trained = model.train()(*inputs, **masks)
    with torch.no_grad():
        evaluated = model.eval()(*inputs, **masks)
    torch.testing.assert_close(trained, evaluated, rtol=0, atol=1e-5)
    assert (evaluated - plain.eval()(*inputs, **masks)).abs().max() > 1e-2


def test_padding_in_an_encoder_in_eval_without_gradients():
    plain, (x,), _ = layers("encoder")
    model = with_dropins(plain).eval()
    hidden = torch.zeros(B, T, dtype=torch.bool)
    hidden[1, 3:] = True
    with torch.no_grad():
        whole = model(x, src_key_padding_mask=hidden)
        alone = model(x[1:2, :3])
    torch.testing.assert_close(whole[1:2, :3], alone, rtol=0, atol=1e-5)
    assert (whole - plain.eval()(x, src_key_padding_mask=hidden))[0].abs().max() > 1e-2


def test_a_layer_built_with_it_turns_nested_tensors_off():
    layer = nn.TransformerEncoderLayer(20, 4, batch_first=True)
    layer.self_attn = GraphMultiheadAttention(20, 4, batch_first=True)
    with pytest.warns(UserWarning, match="nested"):
        assert not nn.TransformerEncoder(layer, 2).use_nested_tensor


def test_nested_tensors_are_refused():
    attention = GraphMultiheadAttention(6, 2, batch_first=True)
    x = torch.nested.nested_tensor([torch.randn(3, 6), torch.randn(2, 6)])
    with pytest.raises(ValueError, match="use_nested_tensor = False"):
        attention(x, x, x)


def test_to_torch_gives_the_weights_back():
    expected = nn.MultiheadAttention(6, 2, kdim=5, add_bias_kv=True, add_zero_attn=True).eval()
    plain = GraphMultiheadAttention.from_torch(expected, output_graph=graph(2, 3, 6)).to_torch()
    assert not plain.training and plain.add_zero_attn
    assert all(mine is theirs for mine, theirs in zip(plain.parameters(), expected.parameters(), strict=True))
    assert list(plain.state_dict()) == list(expected.state_dict())


def test_a_router_counts_real_tokens():
    attention = GraphMultiheadAttention(6, 3, batch_first=True, router=HeadRouter(6, 3, 1, 1))
    x, seen = torch.randn(B, T, 6), []
    attention.router.register_forward_hook(lambda module, inputs, routing: seen.append((inputs[1], routing)))
    hidden = torch.zeros(B, T, dtype=torch.bool)
    hidden[0, 2:] = True
    attention(x, x, x, key_padding_mask=hidden)
    assert torch.equal(seen[0][0], ~hidden)
    assert seen[0][1].load[0] == 1


def test_head_order_says_which_heads_are_shared():
    sites = HeadSlots(5, router=HeadRouter(6, 5, num_shared=2, top_k=1), head_order=[3, 1, 0, 2, 4])
    routing = sites.route(torch.randn(B, T, 6))
    assert routing.active[..., [3, 1]].all() and routing.active.sum(-1).eq(3).all()
    assert torch.equal(routing.gates > 0, routing.active)
    plain = sites.router(torch.ones(1, 6))
    assert torch.equal(sites.route(torch.ones(1, 6)).gates[0, [3, 1, 0, 2, 4]], plain.gates[0])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: GraphMultiheadAttention(7, 2), "multiple of 2"),
        (lambda: GraphMultiheadAttention(6, 0), "num_heads"),
        (lambda: GraphMultiheadAttention(6, 2, dropout=1.5), "dropout"),
        (lambda: GraphMultiheadAttention(6, 2, output_graph=graph(3, 2, 6)), "over 2 heads"),
        (lambda: GraphMultiheadAttention(6, 2, output_graph=graph(2, 3, 6, cross_layer=1)), "earlier layers"),
        (lambda: GraphMultiheadAttention(6, 2, score_graph=graph(2, 3, 6, norm=True)), "with norm=True"),
        (lambda: GraphMultiheadAttention(6, 2, score_graph=KeyedGraphConv(head_graph(2), 3, 6)), "keys' tokens"),
        (lambda: HeadSlots(3, head_order=[0, 0, 1]), "permutation"),
    ],
)
def test_impossible_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "inputs, masks, message",
    [
        ([(B, T, 6), (B, S, 5), (B, S, 6)], {}, "widths"),
        ([(B, T, 6), (2, S, 6), (2, S, 6)], {}, "one batch size"),
        ([(B, T, 6), (S, 6), (S, 6)], {}, "with a batch"),
        ([(B, T, 6), (B, S, 6), (B, S, 6)], {"key_padding_mask": torch.zeros(B, T).bool()}, "key_padding_mask"),
        ([(B, T, 6), (B, S, 6), (B, S, 6)], {"attn_mask": torch.zeros(T, S).long()}, "attn_mask"),
        ([(B, T, 6), (B, S, 6), (B, S, 6)], {"is_causal": True}, "beside the hint"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs, masks, message):
    attention = GraphMultiheadAttention(6, 2, batch_first=True)
    with pytest.raises(ValueError, match=message):
        attention(*(torch.randn(*shape) for shape in inputs), **masks)


def test_subclasses_of_torchs_module_are_refused():
    class Own(nn.MultiheadAttention):
        pass

    with pytest.raises(TypeError, match="Own"):
        GraphMultiheadAttention.from_torch(Own(6, 2))


def test_bfloat16_autocast():
    attention = moved(GraphMultiheadAttention(20, 5, batch_first=True, **new_slots("wide", 5, 4, 20)))
    x = torch.randn(B, T, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = attention(x, x, x, need_weights=False)
    torch.testing.assert_close(y.float(), attention(x, x, x)[0], rtol=0, atol=3e-2)


@pytest.mark.compiles
@pytest.mark.slow
def test_it_compiles_in_one_graph():
    attention = moved(GraphMultiheadAttention(20, 5, batch_first=True, output_graph=graph(5, 4, 20)))
    compiled = traced(attention)
    x = torch.randn(B, T, 20)
    torch.testing.assert_close(compiled(x, x, x, need_weights=False)[0], attention(x, x, x)[0], rtol=0, atol=1e-5)
