from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import GRAPHS, assert_equal_to, small_config, trained_like, with_graphs
from torch import nn

from gohgraph import DecoderLayer, EncoderLayer, HeadGraphConfig, RoutingConfig, SiteConfig, Stack

B, T, S, M = 2, 7, 11, 30
PAD = {T: torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]]).bool()}
PAD[S] = torch.arange(S).expand(B, -1) < torch.tensor([[S], [3]])
CAUSAL = torch.ones(T, T).tril().bool()
MEMORY_MASK = (torch.arange(T).unsqueeze(1) + torch.arange(S)) % 3 != 0


def attention_pairs(ours, theirs):
    """Yields (our parameter, their parameter, rows of theirs)."""
    for index, linear in enumerate((ours.query, ours.key, ours.value)):
        rows = slice(index * M, (index + 1) * M)
        yield linear.weight, theirs.in_proj_weight, rows
        yield linear.bias, theirs.in_proj_bias, rows
    yield from whole_pairs(ours.output, theirs.out_proj)


def whole_pairs(ours, theirs):
    yield from ((getattr(ours, name), getattr(theirs, name), slice(None)) for name in ("weight", "bias"))


def layer_pairs(ours, theirs):
    sublayers = [(ours.attention, theirs.self_attn, theirs.norm1)]
    if isinstance(ours, DecoderLayer):
        sublayers.append((ours.cross_attention, theirs.multihead_attn, theirs.norm2))
    for residual, attention, norm in sublayers:
        yield from attention_pairs(residual.object, attention)
        yield from whole_pairs(residual.norm, norm)
    yield from whole_pairs(ours.feed_forward.norm, theirs.norm3 if len(sublayers) == 2 else theirs.norm2)
    yield from whole_pairs(ours.feed_forward.object.inner, theirs.linear1)
    yield from whole_pairs(ours.feed_forward.object.outer, theirs.linear2)


@torch.no_grad()
def copy_weights(pairs):
    for own, other, rows in pairs:
        own.copy_(other[rows])


def assert_same_gradients(ours, pairs):
    pairs = list(pairs)
    assert {id(own) for own, _, _ in pairs} == {id(own) for own in ours.parameters()}
    for own, other, rows in pairs:
        assert own.dim() == 1 or own.grad.abs().max() > 1e-6
        assert_equal_to(own.grad, other.grad[rows])


def weighted_sum(y, real):
    """A loss in which every unit of every real token counts differently."""
    weight = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    return (y * weight * real.unsqueeze(-1)).sum()


def torch_settings(config):
    return {
        "dim_feedforward": config.d_ff, "dropout": 0.0, "activation": config.activation, "batch_first": True,
        "norm_first": config.norm_first, "dtype": torch.float64,
    }  # fmt: skip


CASES = [
    pytest.mark.parametrize("activation", ["relu", "gelu"]),
    pytest.mark.parametrize("norm_first", [True, False], ids=["pre", "post"]),
    pytest.mark.parametrize("is_padded", [False, True], ids=["full", "padded"]),
]


def cases(test):
    for mark in CASES:
        test = mark(test)
    return test


@cases
@pytest.mark.parametrize("causal", [False, True], ids=["both-ways", "causal"])
def test_encoder_layer_equals_torch(activation, norm_first, is_padded, causal):
    config = small_config(positions="learned", qk_norm=False, activation=activation, norm_first=norm_first)
    theirs = trained_like(nn.TransformerEncoderLayer(M, 5, **torch_settings(config)))
    ours = EncoderLayer(config, causal=causal).double()
    copy_weights(layer_pairs(ours, theirs))
    keep = PAD[T] if is_padded else torch.ones(B, T, dtype=torch.bool)
    x = torch.randn(B, T, M, dtype=torch.float64)
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, heads = ours(inputs[0], keep_mask=keep[:, None, None, :] if is_padded else None)
    expected = theirs(
        inputs[1], src_mask=~CAUSAL if causal else None, src_key_padding_mask=~keep if is_padded else None
    )
    assert heads[0].outputs.shape == (B, T, 5, 6)
    assert_equal_to(y, expected)
    weighted_sum(y, keep).backward()
    weighted_sum(expected, keep).backward()
    assert_equal_to(inputs[0].grad, inputs[1].grad)
    assert_same_gradients(ours, layer_pairs(ours, theirs))


@cases
@pytest.mark.parametrize("is_masked", [False, True], ids=["memory", "masked-memory"])
def test_decoder_layer_equals_torch(activation, norm_first, is_padded, is_masked):
    config = small_config(positions="learned", qk_norm=False, activation=activation, norm_first=norm_first)
    theirs = trained_like(nn.TransformerDecoderLayer(M, 5, **torch_settings(config)))
    ours = DecoderLayer(config).double()
    copy_weights(layer_pairs(ours, theirs))
    x, memory = torch.randn(B, T, M, dtype=torch.float64), torch.randn(B, S, M, dtype=torch.float64)
    inputs = [z.clone().requires_grad_() for z in (x, memory, x, memory)]
    keep = PAD[T] if is_padded else torch.ones(B, T, dtype=torch.bool)
    memory_keep = torch.ones(1, 1, T, S, dtype=torch.bool)
    if is_masked:
        memory_keep = memory_keep & MEMORY_MASK
    if is_padded:
        memory_keep = memory_keep & PAD[S][:, None, None, :]
    y, _ = ours(
        inputs[0],
        inputs[1],
        keep_mask=keep[:, None, None, :] if is_padded else None,
        memory_keep_mask=memory_keep if is_masked or is_padded else None,
    )
    expected = theirs(
        inputs[2],
        inputs[3],
        tgt_mask=~CAUSAL,
        tgt_key_padding_mask=~keep if is_padded else None,
        memory_mask=~MEMORY_MASK if is_masked else None,
        memory_key_padding_mask=~PAD[S] if is_padded else None,
    )
    assert_equal_to(y, expected)
    weighted_sum(y, keep).backward()
    weighted_sum(expected, keep).backward()
    for own, other in zip(inputs[:2], inputs[2:], strict=True):
        assert_equal_to(own.grad, other.grad)
    assert_same_gradients(ours, layer_pairs(ours, theirs))


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre", "post"])
@pytest.mark.parametrize("kind", ["encoder", "causal", "decoder"])
def test_whole_stack_equals_torch(kind, norm_first):
    config = small_config(positions="learned", qk_norm=False, norm_first=norm_first)
    ours = Stack(config, kind).double()
    if kind == "decoder":
        layer, stack = nn.TransformerDecoderLayer, nn.TransformerDecoder
    else:
        layer, stack = nn.TransformerEncoderLayer, partial(nn.TransformerEncoder, enable_nested_tensor=False)
    norm = nn.LayerNorm(M, dtype=torch.float64) if norm_first else None
    theirs = trained_like(stack(layer(M, 5, **torch_settings(config)), config.num_layers, norm=norm))
    pairs = [p for own, other in zip(ours.layers, theirs.layers, strict=True) for p in layer_pairs(own, other)]
    pairs += list(whole_pairs(ours.norm, norm)) if norm_first else []
    copy_weights(pairs)
    x, memory = torch.randn(B, T, M, dtype=torch.float64), torch.randn(B, S, M, dtype=torch.float64)
    y = (ours(x, memory) if kind == "decoder" else ours(x)).x
    mask = None if kind == "encoder" else ~CAUSAL
    expected = theirs(x, memory, tgt_mask=mask) if kind == "decoder" else theirs(x, mask=mask)
    assert_equal_to(y, expected)
    for z in (y, expected):
        weighted_sum(z, torch.ones(B, T)).backward()
    assert_same_gradients(ours, pairs)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("kind", ["causal", "decoder"])
def test_causal_stacks_do_not_see_the_future(graph, kind):
    stack = trained_like(Stack(small_config(graph, num_layers=2), kind))
    memory = (torch.randn(1, S, M, dtype=torch.float64),) if kind == "decoder" else ()
    x = torch.randn(1, T, M, dtype=torch.float64, requires_grad=True)
    y = stack(x, *memory).x
    for t in range(T):
        (gradient,) = torch.autograd.grad(y[0, t].square().sum(), x, retain_graph=True)
        reached = gradient[0].abs().amax(dim=-1)
        assert (reached[: t + 1] > 0).all() and (reached[t + 1 :] == 0).all()


def test_encoder_sees_both_ways():
    stack = trained_like(Stack(small_config("outputs", num_layers=1)))
    x = torch.randn(1, T, M, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(stack(x).x[0, 3].square().sum(), x)
    assert (gradient[0].abs().amax(dim=-1) > 0).all()


@pytest.mark.parametrize("kind", ["encoder", "causal", "decoder"])
def test_cross_layer_graphs_receive_from_the_layer_before_only(kind):
    stack = trained_like(Stack(small_config("cross-layer", num_layers=4), kind))
    memory = (torch.randn(B, S, M, dtype=torch.float64),) if kind == "decoder" else ()
    convs = [layer.attention.object.output_graph for layer in stack.layers]
    assert [conv.cross_layer for conv in convs] == [0, 1, 1, 1]
    received, returned = [], []
    for layer in stack.layers:
        layer.register_forward_hook(lambda module, inputs, output: returned.append(output[1][0].outputs))
    for conv in convs:
        conv.register_forward_hook(lambda module, inputs, output: received.append(inputs[2:]))
    stack(torch.randn(B, T, M, dtype=torch.float64), *memory)
    assert received[0] == ((), None)
    for index in (1, 2, 3):
        assert len(received[index][0]) == 1 and received[index][0][0] is returned[index - 1]


@pytest.mark.parametrize("kind", ["causal", "decoder"])
def test_chosen_layers_have_the_graphs_and_all_have_the_router(kind):
    inner = {"values": SiteConfig(), "weights": SiteConfig()}
    graphs = HeadGraphConfig(
        SiteConfig(cross_layer=2), SiteConfig.ring(2), RoutingConfig(2, 2), **inner, layers=(-1, 1)
    )
    stack = trained_like(Stack(with_graphs(graphs, num_layers=4), kind))
    memory = (torch.randn(B, S, M, dtype=torch.float64),) if kind == "decoder" else ()
    for index, layer in enumerate(stack.layers):
        blocks = [layer.attention.object] + ([layer.cross_attention.object] if kind == "decoder" else [])
        for block in blocks:
            sites = [block.output_graph, block.score_graph, *block.inner_graphs.values()]
            assert [graph is None for graph in sites] == ([False] * 4 if index in (1, 3) else [True] * 2)
            assert block.router is not None
    x = torch.randn(B, T, M, dtype=torch.float64)
    stack(x, *memory).x.sum().backward()
    graph = stack.layers[-1].attention.object.output_graph
    assert graph.cross_layer == 2 and graph.edges.bias.grad.ne(0).any()
    with pytest.raises(ValueError, match=r"^Expected layers among the 3 of the stack \(got \[-4\]\)"):
        Stack(with_graphs(HeadGraphConfig(layers=(-4, 1)), num_layers=3), kind)


@pytest.mark.parametrize("kind", ["encoder", "causal", "decoder"])
def test_a_new_head_graph_changes_no_bit(kind):
    memory = (torch.randn(B, S, M),) if kind == "decoder" else ()
    x = torch.randn(B, T, M)
    plain = Stack(small_config(), kind)
    for graph in ("outputs", "cross-layer"):
        stack = Stack(small_config(graph), kind)
        left = stack.load_state_dict(plain.state_dict(), strict=False)
        assert not left.unexpected_keys and left.missing_keys
        if graph == "outputs":
            assert torch.equal(stack(x, *memory).x, plain(x, *memory).x)
        else:
            torch.testing.assert_close(stack(x, *memory).x, plain(x, *memory).x)


def test_stack_refuses_an_unknown_kind():
    with pytest.raises(ValueError, match="^Expected kind 'encoder', 'causal' or 'decoder'"):
        Stack(small_config(), "both")
