from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from helpers import GRAPHS, small_config, trained_like

from gohgraph import HeadGraphConv, HeadRouter, LanguageModel, MultiHeadAttention, Transformer, head_graph, record

WITH_GRAPHS = [name for name in GRAPHS if name not in ("plain", "moh")]


def random_tokens(length=7, batch=2):
    return torch.randint(0, 13, (batch, length))


def language_model(graph="outputs"):
    return trained_like(LanguageModel(small_config(graph)))


def contexts_of(model):
    """The inputs of every attention block, as they come in."""
    seen = {name: [] for name, module in model.named_modules() if isinstance(module, MultiHeadAttention)}
    for name, own in seen.items():
        model.get_submodule(name).register_forward_pre_hook(lambda module, inputs, own=own: own.append(inputs[0]))
    return seen


def hooks_left(model):
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("graph", WITH_GRAPHS)
@pytest.mark.parametrize("lengths", [(7,), (7, 1, 11)], ids=["one-forward", "several"])
@torch.no_grad()
def test_running_statistics_equal_those_of_all_tokens_at_once(graph, lengths):
    model = language_model(graph)
    contexts = contexts_of(model)
    with record(model) as heads:
        for length in lengths:
            model(random_tokens(length))
    convs = {name: module for name, module in model.named_modules() if isinstance(module, HeadGraphConv)}
    assert list(heads) == list(convs)
    for name, conv in convs.items():
        x = torch.cat([x.flatten(0, 1) for x in contexts[name.rpartition(".")[0]]])  # [N, M]
        # The weights edges have, before routing and `top_edges` decide which of them a token uses.
        alpha = conv.edges(x).expand(len(x), -1, -1)  # [N, R, E]
        recording = heads[name]
        torch.testing.assert_close(recording.mean, alpha.mean(dim=0), rtol=0, atol=1e-12)
        torch.testing.assert_close(recording.std, alpha.std(dim=0, correction=0), rtol=0, atol=1e-12)
        assert recording.tokens == (2 * sum(lengths) if conv.edges.weight is not None else len(lengths))
        assert torch.equal(recording.edge_index, conv.edge_index) and recording.num_heads == 5


def test_generation_is_recorded_once_a_token():
    model = language_model("scores-ring")
    with record(model) as heads:
        model.generate(random_tokens(5), 3, temperature=0)
    assert {recording.tokens for recording in heads.values()} == {2 * (5 + 2)}


def test_all_stacks_of_a_translator_are_recorded():
    model = trained_like(Transformer(small_config("rounds", num_layers=1)))
    with record(model) as heads:
        model(random_tokens(11), random_tokens(7))
    blocks = ("encoder.layers.0.attention", "decoder.layers.0.attention", "decoder.layers.0.cross_attention")
    names = [f"{block}.object.{site}" for block in blocks for site in ("output_graph", "score_graph")]
    assert list(heads) == names
    assert [heads[name].tokens for name in names] == [22, 22, 14, 14, 14, 14]


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_hooks_are_removed_whatever_happens(error):
    model = language_model()
    try:
        with record(model) as heads:
            model(random_tokens())
            assert hooks_left(model) >= 2 * len(heads)
            if error is not None:
                raise error
    except (RuntimeError, KeyboardInterrupt) as caught:
        assert type(caught) is error
    model(random_tokens())
    assert hooks_left(model) == 0
    assert {recording.tokens for recording in heads.values()} == {14}


@pytest.mark.parametrize("graph", WITH_GRAPHS)
def test_recording_changes_neither_outputs_nor_gradients(graph):
    model, tokens = language_model(graph), random_tokens()

    def run():
        logits = model(tokens).logits
        return [logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))]

    expected = run()
    with record(model) as heads:
        recorded = run()
    assert all(map(torch.equal, recorded, expected))
    assert not any(recording.mean.requires_grad for recording in heads.values())


def test_a_deep_copy_made_inside_is_not_recorded():
    model = language_model()
    with record(model) as heads:
        copy = deepcopy(model)
        copy(random_tokens())
        assert {recording.tokens for recording in heads.values()} == {0}
        model(random_tokens())
    copy(random_tokens())
    assert {recording.tokens for recording in heads.values()} == {14}


def test_two_recordings_do_not_disturb_each_other():
    model = language_model()
    with record(model) as outer:
        model(random_tokens(3))
        with record(model) as inner:
            model(random_tokens(7))
        model(random_tokens(1))
    assert {r.tokens for r in outer.values()} == {22} and {r.tokens for r in inner.values()} == {14}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_stay_exact_in_low_precision(dtype):
    model = language_model().to(dtype)
    with torch.no_grad(), record(model) as heads:
        for _ in range(50):
            model(random_tokens(1, batch=1).zero_())
    for recording in heads.values():
        assert recording.mean.dtype == torch.float64 and (recording.std < 1e-12).all()


def test_a_model_without_graphs_is_refused():
    with pytest.raises(ValueError, match="^Expected a model with head graphs"), record(language_model("plain")):
        pass


def seen_by(model, modules):
    """What comes out of every module of a type, pass by pass."""
    seen = {name: [] for name, module in model.named_modules() if isinstance(module, modules)}
    for name, own in seen.items():
        model.get_submodule(name).register_forward_hook(lambda module, inputs, result, own=own: own.append(result))
    return seen


@pytest.mark.parametrize("graph", [name for name in WITH_GRAPHS if name in ("moh-outputs", "experts")])
@torch.no_grad()
def test_gates_loads_and_outputs_are_those_of_all_tokens(graph):
    model = language_model(graph)
    routed, attended = seen_by(model, HeadRouter), seen_by(model, MultiHeadAttention)
    with record(model, every_token=True) as heads:
        for length in (7, 11):
            model(random_tokens(length))
    for name, recording in heads.items():
        block = name.rpartition(".")[0]
        gates = torch.cat([routing.gates.flatten(0, 1) for routing in routed[f"{block}.router"]])  # [N, H]
        active = torch.cat([routing.active.flatten(0, 1) for routing in routed[f"{block}.router"]])  # [N, H]
        outputs = torch.cat([heads.outputs.flatten(0, 1) for _, heads in attended[block]])  # [N, H, D]
        assert recording.num_shared == 2 and len(gates) == 36
        for actual, expected in (
            (recording.gate, gates.mean(0)),
            (recording.gate_std, gates.std(0, correction=0)),
            (recording.load, active.double().mean(0)),
            (recording.output_mean, outputs.mean(0)),
            (recording.output_std, outputs.std(0, correction=0)),
            (recording.output_norm, outputs.square().sum(-1).mean(0).sqrt()),
        ):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
        assert torch.equal(recording.every["gates"], gates) and torch.equal(recording.every["active"], active)
        assert torch.equal(recording.every["outputs"], outputs)


@pytest.mark.parametrize("graph", WITH_GRAPHS)
@torch.no_grad()
def test_every_token_is_kept_when_asked(graph):
    model = language_model(graph)
    with record(model, every_token=True) as heads:
        model(random_tokens(7))
        model(random_tokens(11))
    with record(model) as without:
        model(random_tokens(7))
    assert all(recording.every is None for recording in without.values())
    for recording in heads.values():
        weights = recording.every["weights"]
        assert weights.shape == (recording.tokens, *recording.mean.shape)
        torch.testing.assert_close(weights.mean(0), recording.mean, rtol=0, atol=1e-12)
        strength = weights.square().mean(dim=(0, 1)).sqrt()
        torch.testing.assert_close(recording.strength, strength, rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_share_counts_edges_between_active_heads():
    model = language_model("moh-outputs")
    with record(model, every_token=True) as heads:
        model(random_tokens(31))
    for name, recording in heads.items():
        senders, receivers = recording.edge_index
        active = recording.every["active"]  # [N, H]
        both = active[:, senders] & active[:, receivers]  # [N, E]
        assert torch.equal(recording.share[0], both.double().mean(0)), name
        assert recording.share.min() < 1


@torch.no_grad()
def test_the_share_counts_the_edges_a_token_keeps():
    model = language_model("top-edges")
    with record(model) as heads:
        model(random_tokens(31))
    outputs = heads["decoder.layers.0.attention.object.output_graph"]
    # Two of five incoming edges a token, whichever they are.
    torch.testing.assert_close(outputs.share.sum(), torch.tensor(10.0).double())
    assert len(outputs.share.unique()) > 5 and outputs.share.max() < 1


def test_heads_without_a_router_are_always_active():
    model = language_model("outputs")
    with record(model) as heads:
        model(random_tokens())
    for recording in heads.values():
        assert recording.num_shared is None
        assert recording.load.tolist() == recording.gate.tolist() == [1.0] * 5 and not recording.gate_std.any()


def test_a_bare_convolution_is_recorded_with_its_outputs():
    conv = trained_like(HeadGraphConv(head_graph(5), head_dim=3, context_dim=7))
    z, x = torch.randn(11, 5, 3).double(), torch.randn(11, 7).double()
    with record(conv) as heads:
        out = conv(z, x)
    (recording,) = heads.values()
    torch.testing.assert_close(recording.output_mean, out.mean(0).detach(), rtol=0, atol=1e-12)


def test_token_strings_are_checked():
    model = language_model()
    with record(model, token_strings="abcdefg") as heads:
        model(random_tokens(7, batch=1))
    assert heads.token_strings == list("abcdefg")
    with pytest.raises(ValueError, match=r"^Expected a string for each of the 14 tokens .*got 7"):
        with record(model, token_strings="abcdefg"):
            model(random_tokens(7, batch=2))
    assert hooks_left(model) == 0


def numbers_held(heads):
    """Numbers in all tensors that recordings hold."""
    seen, stack, total = set(), [*heads.values()], 0
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            total += item.numel()
        elif isinstance(item, dict):
            stack += item.values()
        elif isinstance(item, (list, tuple)):
            stack += item
        elif hasattr(item, "__dict__"):
            stack += vars(item).values()
    return total


@torch.no_grad()
def test_memory_does_not_grow_with_tokens():
    model = LanguageModel(small_config("moh-outputs"))
    sizes = []
    with record(model) as heads:
        for _ in range(19):
            model(torch.randint(0, 13, (32, 16)))
            sizes.append(numbers_held(heads))
    assert {recording.tokens for recording in heads.values()} == {9_728}
    assert len(set(sizes)) == 1 and sizes[0] < 5000
