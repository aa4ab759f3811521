"""What heads attend to: on stock models against eager attention, on ours and converted ones against what they read."""

from __future__ import annotations

import threading

import pytest
import torch
from helpers import language_model, moved, translator
from stock_models import STOCK, stock, stock_inputs
from test_attribution_graph import hooks_of
from torch import nn
from transformers_models import far, tokens

import gohgraph as goh
from gohgraph.analysis import attention_record, attention_watch
from gohgraph.attention.attention_map import attention_map
from gohgraph.attention.call import Call, Mask
from gohgraph.attention.forms import attend
from gohgraph.attention.runs import interleaved
from gohgraph.graphs.baselines.paired import PairedHeads
from gohgraph.graphs.protocol import Messages

EVERY = {"every_example": True}


@torch.no_grad()
def maps_of(model, *inputs, choice=None, **named):
    with goh.record(model, attention=choice or EVERY) as heads:
        model(*inputs, **named)
    return heads.attention


@pytest.mark.parametrize("name", STOCK)
def test_stock_maps_are_those_of_eager_attention(name):
    model = stock(name)
    inputs = stock_inputs(name, model)
    before = hooks_of(model), model.config._attn_implementation
    found = maps_of(model, **inputs)
    assert (hooks_of(model), model.config._attn_implementation) == before
    model.set_attn_implementation("eager")
    told = maps_of(model, **inputs)
    with torch.no_grad():
        output = model(**inputs, output_attentions=True)
    own = output.attentions if "attentions" in output else [*output.encoder_attentions]
    for pair in zip(output.get("decoder_attentions", ()), output.get("cross_attentions", ()), strict=True):
        own += pair
    assert [recording.title for recording in found.values()] == [recording.title for recording in told.values()]
    for recording, eager, expected in zip(found.values(), told.values(), own, strict=True):
        torch.testing.assert_close(recording.maps, expected.float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(eager.maps, expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "mistral", "bert"])
def test_padding_is_left_out_and_layers_and_heads_are_chosen(name):
    # In float64, eager attention turns its mask, made in float64, into infinities.
    model, ids, real = stock(name).float(), tokens(), torch.ones(2, 7, dtype=torch.long)
    real[0, :3] = 0
    found = maps_of(model, ids, attention_mask=real, choice={**EVERY, "layers": [1], "heads": [2, 0]})
    (recording,) = found.values()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(ids, attention_mask=real, output_attentions=True).attentions[1][:, [2, 0]].float()
    is_real = real.bool()[:, None, :, None].expand_as(expected)
    torch.testing.assert_close(recording.maps[is_real], expected[is_real], rtol=1e-4, atol=1e-5)
    assert recording.title == "layer 1" and recording.heads == [2, 0] and not recording.maps[0, :, 3:, :3].any()


SITES = {
    "plain, two query heads a key head": {"num_kv_heads": 2},
    "complete scores": {"score_graph": True},
    "sparse scores": {"score_graph": "ring"},
    "values": {"inner_graphs": "value"},
    "weights": {"inner_graphs": "weight", "num_kv_heads": 2},
    "routed scores": {"score_graph": "ring", "router": True},
}


@pytest.mark.parametrize("slots", SITES.values(), ids=SITES.keys())
@pytest.mark.parametrize("form", [None, "maps"])
def test_maps_are_what_own_heads_read_values_by(slots, form):
    torch.manual_seed(0)
    H, D = 4, 4

    def conv(topology="complete"):
        hops = {"hops": 2} if topology == "ring" else {}
        return goh.HeadGraphConv(goh.head_graph(H, topology, **hops), head_dim=D, context_dim=H * D)

    made = dict(slots)
    if "score_graph" in made:
        made["score_graph"] = conv("ring" if made["score_graph"] == "ring" else "complete")
    if "inner_graphs" in made:
        made["inner_graphs"] = {made["inner_graphs"]: conv()}
    if "router" in made:
        made["router"] = goh.HeadRouter(H * D, H, num_shared=1, top_k=2)
    attention = moved(goh.MultiHeadAttention(H * D, H, causal=True, **made)).double().eval()
    attention.form = form
    x, keep = torch.randn(2, H, H * D, dtype=torch.double), torch.ones(2, 1, 1, H, dtype=torch.bool)
    keep[0, ..., 0] = False
    with torch.no_grad(), goh.record(attention, attention=EVERY) as heads:
        _, result = attention(x, keep_mask=keep)
    maps = heads.attention[""].maps.double()  # [B, H, T, S]
    with torch.no_grad():
        v = attention.value(x).unflatten(-1, (-1, D))  # [B, S, G, D]
        if "value" in attention.inner_graphs:
            v = attention.inner_graphs["value"](v, x)
        v = v.repeat_interleave(H // v.shape[2], dim=2)
        gates = 1 if result.routing is None else result.routing.gates.unsqueeze(-1)
        read = torch.einsum("bhts,bshd->bthd", maps, v) * gates
    torch.testing.assert_close(read, result.outputs, rtol=1e-5, atol=1e-6)
    if result.routing is not None:
        off = ~result.routing.active.transpose(1, 2)  # [B, H, T]
        assert off.any() and not maps[off].any()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_maps_of_converted_models_are_those_their_values_are_read_by(name, implementation):
    torch.manual_seed(0)
    model = far(name, goh.HeadGraphConfig(None, goh.SiteConfig.ring(2)), implementation)
    ids = {"input_ids": tokens()} | ({"decoder_input_ids": tokens()} if name == "t5" else {})
    seen = {}
    slots = [(n, m) for n, m in model.named_modules() if hasattr(m, "score_graph")]
    for where, module in slots:
        module.register_forward_hook(lambda m, args, out, where=where: seen.update({where: (args[3], out[0])}))
    found = maps_of(model, **ids)
    assert list(found) == [where for where, _ in slots]
    for where, recording in found.items():
        v, z = seen[where]
        v = v.repeat_interleave(recording.maps.shape[1] // v.shape[2], dim=2)
        torch.testing.assert_close(torch.einsum("bhts,bshd->bthd", recording.maps, v), z, rtol=1e-4, atol=1e-5)


def test_heads_that_join_their_keys_have_one_row_over_tokens():
    graph, q = PairedHeads(4, 3, 12), torch.randn(2, 5, 4, 3)
    call = Call(q, q, q, Mask(None, causal=True), scores=Messages(graph, torch.randn(2, 5, 12)))
    maps = attention_map(call)  # [B, T, H, S]
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(2, 5, 4))
    assert not maps.triu(1).transpose(1, 2).triu(1).any()
    # With values that are unit vectors of their tokens, the outputs are the weights.
    values = torch.eye(5)[:, None, :].expand(2, 5, 4, 5)
    wide = call._replace(v=values)
    torch.testing.assert_close(attend(wide)[0], maps)
    assert interleaved(q, 2).shape == (2, 10, 2, 3)


def test_decoding_gives_the_maps_of_the_whole_text():
    model = stock("llama").float()
    ids = tokens(1)
    with torch.no_grad(), goh.record(model, attention=True) as heads:
        out = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    whole = maps_of(model, out[:, :-1], choice={"layers": [0, 1]})
    for name, recording in heads.attention.items():
        torch.testing.assert_close(recording.maps, whole[name].maps, rtol=1e-3, atol=1e-5)


def test_means_are_over_all_examples_of_all_passes():
    model = language_model("scores-complete", num_kv_heads=1)
    every = [maps_of(model, torch.tensor([[1, 2, 3]] * 2)), maps_of(model, torch.tensor([[4, 5, 6]]))]
    with torch.no_grad(), goh.record(model, attention=True) as heads:
        model(torch.tensor([[1, 2, 3]] * 2))
        model(torch.tensor([[4, 5, 6]]))
    for name, recording in heads.attention.items():
        expected = torch.cat([one[name].maps for one in every]).mean(dim=0)
        torch.testing.assert_close(recording.maps, expected)
        assert recording.examples == 3
    assert len(heads) == 3 and all(recording.tokens == 9 for recording in heads.values())


def test_cross_attention_of_own_models_and_other_threads():
    model = translator()
    source, target = torch.randint(3, 13, (2, 5)), torch.randint(3, 13, (2, 7))
    with torch.no_grad(), goh.record(model, attention=EVERY) as heads:
        model(source, target)
        other = threading.Thread(target=lambda: model(target, source))
        other.start()
        other.join()
    shapes = {recording.title: tuple(recording.maps.shape) for recording in heads.attention.values()}
    assert shapes["encoder layer 1"] == (2, 5, 5, 5) and shapes["decoder layer 0 cross"] == (2, 5, 7, 5)



def test_what_cannot_be_recorded_is_refused(monkeypatch):
    from transformers import AttentionInterface

    model, ids = stock("gpt2"), tokens()
    for choice, error in (
        ({"layer": [0]}, "Expected attention to choose by layers, heads, every_example"),
        ({"layers": []}, "Expected layers as a list of numbers"),
        ({"layers": [7]}, r"Expected layers of \[0, 1\]"),
        ({"heads": [5]}, "Expected heads from 0 to 4 in layer 0"),
    ):
        with pytest.raises(ValueError, match=error):
            maps_of(model, ids, choice=choice)
    with pytest.raises(ValueError, match="Expected passes of one length in layer 0"):
        with torch.no_grad(), goh.record(model, attention=True):
            model(ids)
            model(ids[:, :5])
    monkeypatch.setattr(attention_watch, "MOST_BYTES", 1000)
    with pytest.raises(ValueError, match="Expected attention maps of at most"):
        maps_of(model, ids)
    AttentionInterface.register("silent", lambda module, q, k, v, mask, **more: (v.transpose(1, 2), None))
    model.set_attn_implementation("silent")
    with pytest.raises(ValueError, match="Expected attention by torch's scaled_dot_product_attention"):
        maps_of(model, ids)
    with pytest.raises(ValueError, match="Expected layers of a known layout"):
        maps_of(nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2))
    recording = attention_record.AttentionRecording("layer 0", [0], every_example=False)
    with pytest.raises(ValueError, match="Expected attention to have run"):
        recording.maps.sum()
