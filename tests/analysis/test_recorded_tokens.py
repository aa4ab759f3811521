"""Losses and recordings are of the right tokens: padding, sources and targets, recomputed and shared layers."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers as hf
from helpers import moved, small_config
from torch import nn
from transformers_models import BOTH, OUTPUTS, build, tokens

import gohgraph as goh

MOH = goh.HeadGraphConfig.moh(num_shared=1, top_k=1)


def routed(model):
    goh.convert(model, MOH)
    for module in model.modules():
        if isinstance(module, goh.HeadRouter):
            nn.init.normal_(module.routed)
    return model


@pytest.mark.parametrize("kind", ["bool", "zero and -inf", "smallest number"])
@pytest.mark.parametrize("holder", ["encoder", "attention"])
def test_masks_of_padding_leave_padding_out(holder, kind):
    layer = nn.TransformerEncoderLayer(20, 4, 11, 0.0, batch_first=True)
    model = routed(nn.TransformerEncoder(layer, 1).eval())
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[0, 3:] = mask[1, 5:] = True
    given, smallest = mask, torch.finfo(torch.float32).min
    if kind != "bool":
        given = torch.zeros(2, 7).masked_fill(mask, float("-inf") if kind == "zero and -inf" else smallest)
    losses, x = [], torch.randn(2, 7, 20)
    for _ in range(2):
        x = torch.where(mask.unsqueeze(-1), 3 * torch.randn(2, 7, 20), x)
        with goh.collect_routing(model) as routing:
            if holder == "encoder":
                model(x, src_key_padding_mask=given)
            else:
                model.layers[0].self_attn(x, x, x, key_padding_mask=given)
        losses.append(routing[0].balance_loss)
    assert torch.equal(*losses) and losses[0] > 0
    # Numbers that are added to scores leave nothing out.
    with goh.collect_routing(model) as routing:
        model.layers[0].self_attn(x, x, x, key_padding_mask=torch.zeros(2, 7) - 1)
        model.layers[0].self_attn(x, x, x)
    assert torch.equal(routing[0].balance_loss, routing[1].balance_loss)
    assert not torch.equal(routing[0].balance_loss, losses[0])


@pytest.mark.parametrize("name", ["bart", "t5", "torch"])
def test_a_mask_of_the_source_is_not_laid_over_the_target(name):
    ids, mask = tokens(), torch.ones(2, 7, dtype=torch.bool)
    mask[:, 3:] = False
    if name == "torch":
        model, x = routed(nn.Transformer(20, 4, 1, 1, 11, 0.0, batch_first=True).eval()), torch.randn(2, 7, 20)
        call = {"src": x, "tgt": x.flip(1)}
    else:
        model = routed(build(name))
        call = {"input_ids": ids, "decoder_input_ids": ids.flip(1)}

    def losses(*masks):
        with goh.collect_routing(model, *masks) as routing:
            model(**call)
        return torch.stack([one.balance_loss for one in routing])

    sources = 2 if name == "t5" else 1
    plain, source, target = losses(), losses(mask), losses(None, mask)
    assert torch.equal(source[sources:], plain[sources:]) and not torch.allclose(source[:sources], plain[:sources])
    assert torch.equal(target[:sources], plain[:sources]) and not torch.allclose(target[sources:], plain[sources:])


@pytest.mark.parametrize("reentrant", [True, False])
def test_recordings_count_checkpointed_layers_once(reentrant):
    model, ids = goh.convert(build("llama"), BOTH).model.train(), tokens()
    moved(model)
    with goh.record(model, every_token=True) as plain:
        model(ids, labels=ids, use_cache=False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with goh.record(model, every_token=True) as heads:
        model(ids, labels=ids, use_cache=False).loss.backward()
    for name, recording in heads.items():
        assert recording.tokens == ids.numel()
        assert torch.equal(recording.every["weights"], plain[name].every["weights"])


@pytest.mark.parametrize("when", ["inside", "after"])
def test_routing_losses_keep_their_gradient_under_checkpointing_or_say_that_they_cannot(when):
    model, ids = routed(build("llama")).train(), tokens()
    routers = [layer.self_attn.head_graphs.router.routed for layer in model.model.layers]
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with goh.collect_routing(model) as routing:
            output = model(ids, labels=ids, use_cache=False)
            assert len(routing) == 2
            loss = output.loss + sum(one.balance_loss for one in routing)
            if when == "inside":
                gradients.append(torch.autograd.grad(loss, routers))
        if when == "after":
            gradients.append(torch.autograd.grad(loss, routers))
        assert len(routing) == 2
    torch.testing.assert_close(gradients[1], gradients[0])
    assert gradients[0][0].abs().max() > 0
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match="Do set use_reentrant=False"), goh.collect_routing(model):
        model(ids, labels=ids, use_cache=False)
    with torch.no_grad(), goh.collect_routing(model) as routing:
        model(ids, use_cache=False)
    assert len(routing) == 2


def albert(layers=3, groups=1):
    shape = {"vocab_size": 97, "hidden_size": 30, "embedding_size": 10, "intermediate_size": 22}
    config = hf.AlbertConfig(**shape, num_hidden_layers=layers, num_attention_heads=5, num_hidden_groups=groups)
    return hf.AlbertForMaskedLM(config).eval()


@pytest.mark.parametrize("config", [OUTPUTS, BOTH], ids=["outputs", "both"])
def test_layers_that_share_one_module_are_recorded_as_layers_of_their_own(config):
    model, ids = albert(), tokens()
    goh.convert(model, config)
    moved(model)
    sites = 1 if config is OUTPUTS else 2
    with goh.record(model, every_token=True) as heads, torch.no_grad():
        for _ in range(2):
            model(ids)
    assert len(heads) == 3 * sites and all(r.tokens == 2 * ids.numel() for r in heads.values())
    weights = [recording.every["weights"] for recording in list(heads.values())[::sites]]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    # The inputs of every layer, one after the other, through the graph itself.
    graph, seen = next(m for m in model.modules() if isinstance(m, goh.HeadGraphConv)), []
    hook = graph.edges.register_forward_hook(lambda module, inputs, alpha: seen.append(alpha))
    with torch.no_grad():
        model(ids)
    hook.remove()
    torch.testing.assert_close(weights[0][: ids.numel()], seen[0].flatten(0, 1))
    network = goh.head_graph_of(heads)
    assert network.num_nodes == 15 and network.layer.unique().tolist() == [0, 1, 2]
    assert len(network.blocks) == 3


def test_a_module_that_is_called_by_itself_is_one_layer():
    attention = goh.MultiHeadAttention(20, 5, output_graph=goh.HeadGraphConv(goh.head_graph(5), 4, 20))
    with goh.record(attention) as heads:
        for _ in range(3):
            attention(torch.randn(2, 7, 20))
    assert list(heads) == ["output_graph"] and heads["output_graph"].tokens == 42


def test_an_error_within_a_pass_does_not_shift_layers():
    model, ids = goh.convert(build("llama")).model, tokens()
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with goh.record(model) as heads:
        with pytest.raises(ZeroDivisionError):
            model(ids)
        hook.remove()
        model(ids)
    assert len(heads) == 2 and [r.tokens for r in heads.values()] == [2 * ids.numel(), ids.numel()]


def test_a_recording_that_saw_no_token_says_so():
    model = goh.LanguageModel(small_config("outputs"))
    with pytest.warns(UserWarning, match="saw no token at decoder.layers.0"), goh.record(model) as heads:
        pass
    with pytest.raises(ValueError, match="at least one token"):
        goh.head_graph_of(heads)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with goh.record(model):
            model(torch.randint(13, (1, 7)))
