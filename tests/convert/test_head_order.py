"""Importance of heads, and the routers that keep the important ones."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_equal_to, small_config, trained_like
from torch import nn
from transformers_models import build, tokens

from gohgraph import (
    HeadGraphConfig,
    HeadRouter,
    LanguageModel,
    collect_routing,
    convert,
    head_importance,
    share_important_heads,
)
from gohgraph.convert.head_order import permute_heads

MOH = HeadGraphConfig.moh(num_shared=2, top_k=2, straight_through=True)


def own_loss(model, batch):
    return model(batch, targets=batch).loss


def hf_loss(model, batch):
    return model(input_ids=batch, labels=batch).loss


def test_a_head_that_is_not_read_does_not_matter():
    model = build("llama")
    heads = model.model.layers[1].self_attn.o_proj.weight.data.unflatten(1, (6, 4))
    heads[:, 3] = 0
    model.requires_grad_(False)
    found = head_importance(model, hf_loss, [tokens()])
    assert found["model.layers.1.self_attn"][3] == 0 and found["model.layers.0.self_attn"].min() > 0
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_sharing_important_heads_of_an_own_model_changes_nothing_while_all_work():
    model = trained_like(LanguageModel(small_config())).eval()
    ids, stock = torch.randint(13, (2, 7)), copy.deepcopy(model)
    importance = head_importance(model, own_loss, [ids])
    convert(model, MOH)
    orders = share_important_heads(model, importance)
    for router in (module for module in model.modules() if isinstance(module, HeadRouter)):
        router.top_k = router.num_routed
    assert_equal_to(model(ids).logits, stock(ids).logits)
    for name, order in orders.items():
        assert importance[name][order].tolist() == sorted(importance[name].tolist(), reverse=True)


def test_sharing_important_heads_of_a_converted_model():
    model, ids = build("llama"), tokens()
    importance = head_importance(model, hf_loss, [ids])
    before = model(input_ids=ids).logits
    convert(model, MOH)
    orders = share_important_heads(model, importance)
    with collect_routing(model) as routings:
        model(input_ids=ids)
    assert len(routings) == 2
    active = [layer.self_attn.head_graphs.route(torch.randn(2, 7, 30)).active for layer in model.model.layers]
    for name, each in zip(orders, active, strict=True):
        assert each[..., orders[name][:2]].all() and each.sum(-1).eq(4).all()
    for layer in model.model.layers:
        layer.self_attn.head_graphs.router.top_k = 4
    assert torch.equal(model(input_ids=ids).logits, before)


def test_collected_losses_leave_padding_out_and_train_the_router():
    model, ids = build("llama"), tokens()
    convert(model, MOH)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 3:] = False
    with collect_routing(model, mask) as routings:
        model(input_ids=ids, attention_mask=mask.long())
        first = [routing.balance_loss.item() for routing in routings]
        other = torch.where(mask, ids, 5)
        model(input_ids=other, attention_mask=mask.long())
    assert [routing.balance_loss.item() for routing in routings[2:]] == pytest.approx(first)
    routings[0].balance_loss.backward()
    assert model.model.layers[0].self_attn.head_graphs.router.routed.grad.abs().sum() > 0
    assert not any(module._forward_hooks for module in model.modules() if isinstance(module, HeadRouter))


def test_what_cannot_be_measured_is_refused():
    model = LanguageModel(small_config())
    with pytest.raises(ValueError, match="at least one batch"):
        head_importance(model, own_loss, [])
    with pytest.raises(ValueError, match="known output projection"):
        head_importance(nn.Linear(3, 5), own_loss, [1])
    with pytest.raises(ValueError, match="Do measure this very model"):
        share_important_heads(model, {"nowhere": torch.ones(5)})
    with pytest.raises(ValueError, match="1 key heads"):
        permute_heads(next(iter(LanguageModel(small_config(num_kv_heads=1)).decoder.layers)).attention.object, [0] * 5)
    with pytest.raises(ValueError, match="Expected routers"), collect_routing(model):
        pass
