"""What a conversion keeps of other people's models: names, hooks, shared modules, modes; all of it where it fails."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from helpers import FusedAttention, moved, small_config
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers_models import BOTH, OUTPUTS, SHAPE, WIDE, build, far, inputs_of, tokens

import gohgraph as goh
from gohgraph.convert.implementation_names import Implementation, implementation


def encoder(layers=2, **settings):
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(20, 4, 11, 0.0, batch_first=True, **settings), layers)


@torch.no_grad()
def logits(model, **inputs):
    return model(**inputs).logits


class Mine(nn.Module):
    """Attention of a usual name, whose first argument has a name of its own."""

    def __init__(self):
        super().__init__()
        self.num_heads = 4
        self.q, self.k, self.v, self.out_proj = (nn.Linear(20, 20) for _ in range(4))

    def forward(self, features):
        heads = (f(features).unflatten(-1, (4, 5)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.out_proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(-2))


class MyAttention(Mine):
    pass


class Net(nn.Module):
    def __init__(self, attention=MyAttention):
        super().__init__()
        self.attn = attention()

    def forward(self, h):
        return self.attn(features=h) if isinstance(self.attn, Mine) else self.attn(x=h)


# Names of implementations.

DSA = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16,
    first_k_dense_replace=1, index_topk=3, index_n_heads=2, index_head_dim=16,
)  # fmt: skip
ASKING = {
    "deepseek": lambda: hf.DeepseekV32ForCausalLM(hf.DeepseekV32Config(**DSA)),
    "glm": lambda: hf.GlmMoeDsaForCausalLM(hf.GlmMoeDsaConfig(**DSA)),
    # Eager attention of its own in place of the interface's.
    "upcast": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=97, n_embd=30, n_layer=2, n_head=5, reorder_and_upcast_attn=True)
    ),
}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["deepseek", "glm"])
def test_models_that_ask_for_their_implementation_by_name_keep_it(name, implementation):
    model, ids = ASKING[name]().eval(), torch.randint(3, 97, (2, 13))
    model.set_attn_implementation(implementation)
    before = logits(model, input_ids=ids)
    with pytest.raises(ValueError, match="unequal widths"):
        goh.convert(model, BOTH)
    report = goh.convert(model)
    assert len(report.replaced) == 2 and model.config._attn_implementation == implementation
    torch.testing.assert_close(logits(model, input_ids=ids), before, rtol=0, atol=1e-5)
    assert (logits(moved(model), input_ids=ids) - before).abs().max() > 1e-3
    assert torch.equal(logits(goh.unconvert(model), input_ids=ids), before)
    assert type(model.config._attn_implementation) is str


def test_attention_beside_the_interface_is_left_to_the_projections():
    model, ids = ASKING["upcast"]().eval(), tokens()
    model.set_attn_implementation("eager")
    before = logits(model, input_ids=ids)
    assert len(goh.convert(model).replaced) == 2
    assert torch.equal(logits(model, input_ids=ids), before)
    assert (logits(moved(model), input_ids=ids) - before).abs().max() > 1e-4


def test_attention_that_returns_a_list():
    shape = {"vocab_size": 97, "n_embd": 30, "n_layer": 2, "n_head": 5, "n_positions": 64}
    model, ids = hf.OpenAIGPTLMHeadModel(hf.OpenAIGPTConfig(**shape)).eval(), tokens()
    before = logits(model, input_ids=ids)
    assert len(goh.convert(model).replaced) == 2 and torch.equal(logits(model, input_ids=ids), before)


def test_a_name_equals_its_base_and_is_looked_up_as_ours():
    name = implementation("sdpa")
    assert name == "sdpa" and name in ("eager", "sdpa") and not name != "sdpa" and name.startswith("sd")
    assert {"sdpa": 1, "gohgraph_sdpa": 2}[name] == 2 and name != "eager"
    paged = implementation("paged|sdpa").removeprefix("paged|")
    assert paged is name and isinstance(paged, Implementation)
    assert pickle.loads(pickle.dumps(name)) == name and copy.deepcopy(name) == name


def test_models_that_share_a_configuration_are_their_own():
    config = hf.LlamaConfig(**{**SHAPE, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4})
    first, second, teacher = (hf.LlamaForCausalLM(config).eval() for _ in range(3))
    ids = tokens()
    expected = [logits(model, input_ids=ids) for model in (first, second, teacher)]
    goh.convert(first, BOTH)
    goh.convert(second)
    moved(second)
    moved_second = logits(second, input_ids=ids)
    assert torch.equal(logits(teacher, input_ids=ids), expected[2])
    goh.unconvert(first)
    assert torch.equal(logits(first, input_ids=ids), expected[0])
    assert torch.equal(logits(second, input_ids=ids), moved_second) and not torch.equal(moved_second, expected[1])


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_a_converted_models_implementation_may_be_set_anew(name):
    model = far(name)
    inputs = inputs_of(model)
    before = logits(model, **inputs)
    for beneath in ("eager", "sdpa"):
        model.set_attn_implementation(beneath)
        torch.testing.assert_close(logits(model, **inputs), before, rtol=1e-4, atol=1e-5)


# Modules and hooks.


class Twice(nn.Module):
    def __init__(self, attention, arguments):
        super().__init__()
        self.a = self.b = attention
        self.listed, self.arguments = [attention], arguments

    def forward(self, x):
        for attention in (self.a, self.b):
            y = attention(*[x] * self.arguments)
            x = y[0] if isinstance(y, tuple) else y
        return x


@pytest.mark.parametrize("kind", ["torch", "fused"])
def test_a_module_at_two_names_stays_one(kind):
    attention = nn.MultiheadAttention(20, 4, batch_first=True) if kind == "torch" else FusedAttention(20, 4)
    model, x = Twice(attention, 3 if kind == "torch" else 1).eval(), torch.randn(2, 5, 20)
    kind, before = type(model.a), model(x)
    goh.convert(model)
    assert model.a is model.b is model.listed[0] and hasattr(model.a, "output_graph")
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-6)
    assert not torch.equal(moved(model)(x), before)
    goh.unconvert(model)
    assert model.a is model.b and type(model.a) is kind
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


MODELS = {
    "torch": (lambda: encoder(1), "layers.0.self_attn", lambda: (torch.randn(2, 5, 20),)),
    "fused": (lambda: nn.Sequential(FusedAttention(20, 4)), "0", lambda: (torch.randn(2, 5, 20),)),
    "projection": (Net, "attn", lambda: (torch.randn(2, 5, 20),)),
    "transformers": (lambda: build("llama"), "model.layers.0.self_attn", lambda: (tokens(),)),
}


@pytest.mark.parametrize("name", MODELS)
def test_hooks_of_the_user_survive_both_ways(name):
    make, where, inputs = MODELS[name]
    model, seen = make(), []
    module = model.get_submodule(where)
    hooks = [
        module.register_forward_pre_hook(lambda *_: seen.append("before")),
        module.register_forward_hook(lambda *_: seen.append("after")),
        module.register_full_backward_hook(lambda *_: seen.append("backward")),
    ]
    goh.convert(model)
    assert model.get_submodule(where) is module
    for _ in range(2):
        seen.clear()
        output = model(*inputs())
        (output if isinstance(output, torch.Tensor) else output.logits).sum().backward()
        assert seen == ["before", "after", "backward"]
        goh.unconvert(model)
    for hook in hooks:
        hook.remove()
    assert not module._forward_hooks and not module._forward_pre_hooks


@pytest.mark.parametrize("change", ["prune", "weight norm", "parametrization", "attribute"])
def test_what_was_done_to_a_module_before_stays(change):
    model, x = encoder().eval(), torch.randn(2, 5, 20)
    attention = model.layers[1].self_attn
    if change == "prune":
        prune.l1_unstructured(attention, "in_proj_weight", 0.5)
    elif change == "weight norm":
        nn.utils.weight_norm(attention.out_proj)
    elif change == "parametrization":
        parametrizations.weight_norm(attention.out_proj)
    else:
        attention.mine = "a note"
    before, state = model.train()(x), list(model.state_dict())
    goh.convert(model)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-6)
    assert len({type(layer.self_attn) for layer in model.layers}) == 1
    assert getattr(attention, "mine", "a note") == "a note"
    goh.unconvert(model)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    assert list(model.state_dict()) == state


def test_a_conversion_that_fails_half_way_leaves_everything(monkeypatch):
    model, x = encoder(3).eval(), torch.randn(2, 5, 20)
    kinds, before = [type(module) for module in model.modules()], model(x)
    adopt, calls = goh.GraphMultiheadAttention.adopt.__func__, []

    def failing(cls, module, **slots):
        calls.append(module)
        if len(calls) == 2:
            raise MemoryError("of the second")
        adopt(cls, module, **slots)

    monkeypatch.setattr(goh.GraphMultiheadAttention, "adopt", classmethod(failing))
    with pytest.raises(MemoryError):
        goh.convert(model)
    assert [type(module) for module in model.modules()] == kinds and torch.equal(model(x), before)
    assert not any("head_graph" in name for module in model.modules() for name in vars(module))


def test_a_forward_of_the_users_own_is_not_passed_by():
    model = encoder().eval()
    attention = model.layers[0].self_attn
    attention.forward = lambda query, *args, **kwargs: (query, None)
    report = goh.convert(model)
    assert report.replaced == ["layers.1.self_attn"]
    assert "replaced by another function" in report.skipped["layers.0.self_attn"]


def test_attention_may_be_called_by_keyword():
    net, x = Net(), torch.randn(2, 5, 20)
    before = net(x)
    assert goh.convert(net).unchecked.keys() == {"attn"}
    assert torch.equal(net(x), before) and not torch.equal(moved(net)(x), before)
    fused = Net(lambda: FusedAttention(20, 4)).eval()
    before = fused(x)
    goh.convert(fused)
    torch.testing.assert_close(fused(x), before, rtol=0, atol=1e-6)


def test_an_example_compares_models_of_ones_own():
    net, x = Net(), torch.randn(2, 5, 20)
    assert not goh.convert(net, example={"h": x}).unchecked
    assert "example" in str(goh.convert(Net()))


# Modes.


@pytest.mark.parametrize("name", [*MODELS, "own"])
def test_converted_under_inference_mode_it_still_trains(name):
    model = goh.LanguageModel(small_config()) if name == "own" else MODELS[name][0]()
    inputs = (torch.randint(13, (2, 7)),) if name == "own" else MODELS[name][2]()
    with torch.inference_mode():
        goh.convert(model)
    assert not any(parameter.is_inference() for parameter in model.parameters())
    output = model(*inputs)
    (output if isinstance(output, torch.Tensor) else output.logits).sum().backward()
    graphs = [parameter for key, parameter in model.named_parameters() if "output_graph" in key]
    assert graphs and all(parameter.grad is not None for parameter in graphs)


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_modes_random_state_and_gradients_are_left_alone(name):
    model = build(name).train()
    model.get_submodule("model.layers.0.mlp" if name == "llama" else "transformer.h.0.mlp").eval()
    modes, state = [module.training for module in model.modules()], torch.random.get_rng_state()
    with torch.device("meta"):
        goh.convert(model)
    after = [module.training for key, module in model.named_modules() if "head_graphs" not in key]
    assert after == modes and all(parameter.grad is None for parameter in model.parameters())
    assert not any(parameter.is_meta for parameter in model.parameters())
    goh.unconvert(model)
    torch.random.set_rng_state(state)
    goh.convert(model, goh.HeadGraphConfig(goh.SiteConfig(edges="static")))
    assert torch.equal(torch.random.get_rng_state(), state)


# Wrapped by others.


@pytest.mark.parametrize("config", [OUTPUTS, WIDE], ids=["outputs", "scores"])
@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_graphs_that_peft_has_copied_are_taken_out_and_counted_once(name, config):
    if name == "bloom" and config is WIDE:
        pytest.skip("takes no score graph")
    model, ids = build(name), tokens()
    before = logits(model, input_ids=ids)
    report = goh.convert(model, config)
    number = report.head_graph_parameters
    target = ["q_proj"] if name == "llama" else ["dense_h_to_4h"]
    adapted = get_peft_model(model, LoraConfig(target_modules=target, modules_to_save=["head_graphs"]))
    assert report.head_graph_parameters == number
    with goh.record(adapted) as heads:
        logits(moved(adapted), input_ids=ids)
    assert len(heads) == 2 and all(recording.tokens == ids.numel() for recording in heads.values())
    assert goh.head_graph_of(heads).num_nodes == sum(r.num_heads for r in heads.values())
    with adapted.disable_adapter(), goh.record(adapted) as heads:
        logits(adapted, input_ids=ids)
    assert all("original_module" in name and recording.tokens == ids.numel() for name, recording in heads.items())
    goh.unconvert(adapted)
    torch.testing.assert_close(logits(adapted, input_ids=ids), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "bloom", "encoder"])
def test_a_compiled_model_is_converted_and_compiled_anew(name):
    model = encoder().eval() if name == "encoder" else build(name)
    inputs = (torch.randn(2, 5, 20),) if name == "encoder" else (tokens(),)
    compiled = torch.compile(model, backend="eager")

    def run(one):
        with torch.no_grad():
            output = one(*inputs)
        return output if isinstance(output, torch.Tensor) else output.logits

    before = run(compiled)
    report = goh.convert(compiled)
    assert report.model is model and len(report.replaced) == 2
    moved(model)
    after = run(compiled)
    assert (after - run(model)).abs().max() < 1e-5 and (after - before).abs().max() > 1e-4
    assert goh.unconvert(compiled) is compiled and torch.equal(run(compiled), before)


def test_an_own_model_that_is_compiled():
    model, ids = goh.LanguageModel(small_config()).eval(), torch.randint(13, (2, 7))
    compiled = torch.compile(model, backend="eager")
    before = logits(compiled, tokens=ids)
    goh.convert(compiled)
    assert model.config.head_graph is not None
    assert torch.equal(logits(compiled, tokens=ids), before)
    assert not torch.equal(logits(moved(compiled), tokens=ids), before)
