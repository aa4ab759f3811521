"""Hidden states are noted for one call: nothing of a forward pass stays in a model, after an error neither."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from transformers_models import OUTPUTS, far, tokens

from gohgraph.convert import hidden_states


@torch.no_grad()
def logits(model, **inputs):
    return model(**inputs).logits


class Failed(Exception):
    pass


def failing(*_):
    raise Failed


@pytest.mark.parametrize("where", ["before attention", "in attention", "in its projection", "after attention"])
@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_an_error_inside_leaves_nothing(name, where):
    model, ids = far(name, OUTPUTS), tokens()
    before = logits(model, input_ids=ids)
    attention = "model.layers.1.self_attn" if name == "llama" else "transformer.h.1.self_attention"
    projection = f"{attention}.{'o_proj' if name == 'llama' else 'dense'}"
    module = model.get_submodule(attention if where != "in its projection" else projection)
    if where == "in attention":
        module = model.get_submodule(f"{attention}.{'q_proj' if name == 'llama' else 'query_key_value'}")
    register = module.register_forward_hook if where == "after attention" else module.register_forward_pre_hook
    hook = register(failing)
    for _ in range(3):
        with pytest.raises(Failed):
            model(input_ids=ids)
    hook.remove()
    copy.deepcopy(model)
    assert not hidden_states._NOTES.stack
    assert torch.equal(logits(model, input_ids=ids), before)


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_hidden_states_are_freed_after_a_pass(name):
    model, seen = far(name, OUTPUTS), []
    attention = "model.layers.1.self_attn" if name == "llama" else "transformer.h.1.self_attention"

    def remember(module, args, kwargs):
        seen.append(weakref.ref(args[0] if args else kwargs["hidden_states"]))

    model.get_submodule(attention).register_forward_pre_hook(remember, with_kwargs=True)
    model(input_ids=tokens()).logits.sum().backward()
    gc.collect()
    assert len(seen) == 1 and seen[0]() is None
