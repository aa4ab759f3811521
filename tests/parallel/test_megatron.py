"""Head graphs in Megatron-Core on the CPU: equal at every number of ranks, in checkpoints too, and what is refused."""

from __future__ import annotations

import importlib
import sys

import megatron_ranks as ranks_program
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_moe_layer_wise_logging_tracker
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron_ranks import BATCH, GRAPHS, HEAD_DIM, HEADS, TOKENS, VARIANTS, WIDTH, build, draw_far, transformer_config
from ranks import run_ranks
from torch import nn

from gohgraph import BaselineConfig, HeadGraphConfig, RoutingConfig, SiteConfig
from gohgraph.attention.call import Mask
from gohgraph.attention.routing import HeadRouter
from gohgraph.attention.slots import HeadSlots
from gohgraph.graphs.building import build_graph
from gohgraph.parallel.megatron import head_graph_layer_spec, set_router_loss_scale
from gohgraph.parallel.megatron.attention import HeadGraphCoreAttention
from gohgraph.parallel.megatron.checkpoint import load_checkpoint, save_checkpoint
from gohgraph.parallel.megatron.cpu import cpu_trial
from gohgraph.parallel.megatron.torch_attention import TorchCoreAttention

CAUSAL = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool).triu(1)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """Megatron-Core's process groups over this process alone."""
    meeting = tmp_path_factory.mktemp("meeting") / "file"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel(1)
    with cpu_trial():
        yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.fixture
def scale():
    """A test's scale of router losses, undone afterwards."""
    kept = MoEAuxLossAutoScaler.main_loss_backward_scale
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    yield
    MoEAuxLossAutoScaler.main_loss_backward_scale = kept
    for logged in get_moe_layer_wise_logging_tracker().values():
        logged["values"].zero_()


def losses_of(model, mask=CAUSAL):
    tokens, positions = ranks_program.tokens_and_positions(1)
    return model(tokens, positions, mask, labels=tokens.roll(-1, 1))


def logits_of(model, tokens):
    return model(tokens, torch.arange(TOKENS).expand(len(tokens), -1), None)


def test_a_new_model_is_megatrons_own_bit_for_bit(one_rank):
    plain = build(get_gpt_layer_local_spec())
    assert isinstance(plain.decoder, TransformerBlock)
    given = get_gpt_layer_local_spec()
    core = given.submodules.self_attention.submodules.core_attention
    for graph in (HeadGraphConfig(), HeadGraphConfig(outputs=SiteConfig("star", rank=3, rounds=2, norm=True))):
        model = build(head_graph_layer_spec(graph, given))
        expected = losses_of(plain)
        assert torch.equal(losses_of(model), expected)
        shared = dict(plain.named_parameters())
        assert all(torch.equal(value, shared.get(name, value)) for name, value in model.named_parameters())
    assert given.submodules.self_attention.submodules.core_attention is core
    scores = build(head_graph_layer_spec(HeadGraphConfig(outputs=None, scores=SiteConfig.ring(3)), given))
    torch.testing.assert_close(losses_of(scores), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(losses_of(build(head_graph_layer_spec())), expected, rtol=0, atol=1e-6)


def test_chosen_layers_have_the_graphs(one_rank):
    model = build(head_graph_layer_spec(HeadGraphConfig(layers=(-1,))))
    graphs = [layer.self_attention.core_attention.output_graph for layer in model.decoder.layers]
    assert len(graphs) > 1 and [graph is None for graph in graphs] == [True] * (len(graphs) - 1) + [False]
    assert losses_of(model).isfinite().all()


@pytest.mark.parametrize("name", ["complete", "scores", "router"])
def test_moved_edges_change_the_output_and_no_token_sees_a_later_one(one_rank, name):
    model = build(head_graph_layer_spec(GRAPHS[name])).double().eval()
    tokens, _ = ranks_program.tokens_and_positions(2)
    before = logits_of(model, tokens)
    draw_far(model)
    after = logits_of(model, tokens)
    assert (after - before).abs().amax(dim=(0, 2)).min() > 1e-3 if name != "scores" else (after != before).any()
    later = tokens.clone()
    later[:, 7:] = (later[:, 7:] + 1) % ranks_program.VOCABULARY
    changed = logits_of(model, later)
    assert torch.equal(changed[:, :7], after[:, :7]) and not torch.equal(changed[:, 7:], after[:, 7:])


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("groups", [4, HEADS])
def test_core_attention_is_that_of_our_own_sites(one_rank, name, groups):
    graph, sizes = GRAPHS[name], (HEADS, HEAD_DIM, WIDTH)
    config = transformer_config()
    config.num_query_groups = groups
    kind = {"attn_mask_type": AttnMaskType.causal, "attention_type": "self"}
    core = HeadGraphCoreAttention(config, 2, head_graph=graph, attention=TorchCoreAttention, **kind).double().eval()
    draw_far(core)
    router = None if graph.routing is None else HeadRouter.from_config(graph.routing, WIDTH, HEADS, layer=1).double()
    sites = HeadSlots(
        HEADS,
        output_graph=build_graph(graph.outputs, sizes),
        score_graph=build_graph(graph.scores, sizes),
        router=router,
    ).double()
    sites.load_state_dict(
        {key.replace("graph_edges", "edge_index"): value for key, value in core.state_dict().items()}
    )
    q, k, v = (torch.randn(TOKENS, BATCH, heads, HEAD_DIM).double() for heads in (HEADS, groups, groups))
    x = torch.randn(TOKENS, BATCH, WIDTH).double()
    found = core(q, k, v, None, attn_mask_type=AttnMaskType.causal, attention_bias=x)
    q, k, v, x = (each.transpose(0, 1) for each in (q, k, v, x))
    routing = sites.route(x)
    z, _ = sites.attend(q, k, v, x, Mask(causal=True), routing=routing)
    expected = sites.pass_messages(z, x, routing).flatten(-2).transpose(0, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("per_token", [False, True])
def test_router_losses_get_their_weight_and_are_logged(one_rank, scale, per_token):
    weights = RoutingConfig(num_shared=1, top_k=3, balance_loss=0.3, z_loss=0.2)
    spec = head_graph_layer_spec(HeadGraphConfig(outputs=None, routing=weights))
    model = build(spec, calculate_per_token_loss=per_token).double()
    routings = []
    for layer in model.decoder.layers:
        router = layer.self_attention.core_attention.router
        router.register_forward_hook(lambda module, inputs, output: routings.append(output))
    with pytest.raises(ValueError, match="Expected a scale of router losses"):
        losses_of(model)
    routings.clear()
    set_router_loss_scale(model.config, num_microbatches=4)
    losses_of(model).mean().backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    logged = get_moe_layer_wise_logging_tracker()["head_balance_loss"]["values"]
    assert logged.tolist() == pytest.approx([routing.balance_loss.item() for routing in routings], rel=1e-6)
    routings.clear()
    model.zero_grad()
    model.eval()
    loss = losses_of(model).mean()
    auxiliary = sum(0.3 * routing.balance_loss + 0.2 * routing.z_loss for routing in routings) / len(routings)
    # Megatron-Core divides by the number of micro-batches, or in the end by that of tokens.
    (loss + auxiliary * (BATCH * TOKENS if per_token else 1 / 4)).backward()
    for parameter, gradient in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=0, atol=1e-9)


def test_bfloat16_is_near_float32(one_rank, scale):
    model = build(head_graph_layer_spec(GRAPHS["router"])).eval()
    draw_far(model)
    expected = losses_of(model)
    set_router_loss_scale(model.config)
    found = losses_of(model.bfloat16().train())
    # Tokens whose close scores are rounded use other heads.
    assert (found - expected).abs().median() < 0.02
    found.mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_models_of_experts_keep_the_scale_of_the_schedule(scale):
    set_router_loss_scale(transformer_config(num_moe_experts=2))
    assert MoEAuxLossAutoScaler.main_loss_backward_scale is None
    config = transformer_config()
    config.grad_scale_func = lambda loss: 8 * loss
    set_router_loss_scale(config, num_microbatches=2)
    assert MoEAuxLossAutoScaler.main_loss_backward_scale.item() == 4


@pytest.mark.parametrize(
    "settings",
    [
        {"cuda_graph_impl": "local"},
        {"flash_decode": True},
        {"context_parallel_size": 2},
        {"fine_grained_activation_offloading": True, "offload_modules": ["core_attn"]},
        {"fp8": "e4m3"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_configs_that_would_skip_or_split_messages_are_refused(one_rank, settings):
    config = transformer_config()
    for name, value in settings.items():
        setattr(config, name, value)
    spec = head_graph_layer_spec().submodules.self_attention
    with pytest.raises(ValueError, match="Expected a config for head graphs without"):
        spec.module(config, spec.submodules, 1)


@pytest.mark.parametrize(
    "graph",
    [
        HeadGraphConfig(outputs=SiteConfig(cross_layer=1)),
        HeadGraphConfig(outputs=SiteConfig(kind="learned", keep_in_degree=2)),
        HeadGraphConfig(scores=SiteConfig(kind="keyed")),
        HeadGraphConfig(queries=SiteConfig()),
        HeadGraphConfig(outputs=BaselineConfig("norm")),
        HeadGraphConfig(outputs=(SiteConfig(), SiteConfig())),
        HeadGraphConfig.graph_experts(num_shared=2),
        HeadGraphConfig(routing=RoutingConfig(2, 4, bias_rate=0.001)),
    ],
    ids=repr,
)
def test_graphs_that_do_not_shard_are_refused(one_rank, graph):
    with pytest.raises(ValueError, match=r"^Expected .*\(got .*\)\. Do "):
        build(head_graph_layer_spec(graph))


@pytest.mark.parametrize("site", [SiteConfig(backend="pyg"), SiteConfig(rounds=2)], ids=repr)
def test_graphs_without_few_senders_run_at_scores(one_rank, site):
    fresh = build(head_graph_layer_spec(HeadGraphConfig(None, site)))
    torch.testing.assert_close(losses_of(fresh), losses_of(build(head_graph_layer_spec())), rtol=0, atol=1e-6)


def test_layers_that_hide_their_input_and_foreign_attention_are_refused():
    fused = get_gpt_layer_local_spec()
    fused.submodules.input_layernorm = IdentityOp
    with pytest.raises(ValueError, match="normalises its input"):
        head_graph_layer_spec(layer_spec=fused)
    with pytest.raises(ValueError, match="with SelfAttention"):
        head_graph_layer_spec(layer_spec=get_gpt_layer_local_spec(multi_latent_attention=True))
    foreign = get_gpt_layer_local_spec()
    foreign.submodules.self_attention.submodules.core_attention = nn.Identity
    with pytest.raises(ValueError, match="for score messages"):
        head_graph_layer_spec(GRAPHS["scores"], foreign)
    with pytest.raises(TypeError, match="Expected a HeadGraphConfig"):
        head_graph_layer_spec("complete")


def test_calls_that_would_skip_messages_are_refused(one_rank):
    attention = build(head_graph_layer_spec()).decoder.layers[0].self_attention
    x = torch.randn(TOKENS, BATCH, WIDTH)
    for name in ("packed_seq_params", "inference_context", "attention_bias"):
        with pytest.raises(ValueError, match=f"without {name}"):
            attention(x, None, **{name: object()})
    with pytest.raises(ValueError, match="top_k for 2 layers"):
        build(head_graph_layer_spec(HeadGraphConfig.moh(1, (3, 3, 3))))
    with pytest.raises(ValueError, match="Expected window_size"):
        build(head_graph_layer_spec(), window_size=(4, 0))


def test_state_dicts_go_round_and_refuse_another_graph(one_rank, tmp_path):
    model, other = (build(head_graph_layer_spec(GRAPHS["router"]), seed).eval() for seed in (0, 1))
    draw_far(model)
    other.load_state_dict(model.state_dict())
    assert torch.equal(losses_of(other), losses_of(model))
    reversed_ring = SiteConfig(tuple(((i + hop) % HEADS, i) for i in range(HEADS) for hop in range(4)))
    strange = build(head_graph_layer_spec(HeadGraphConfig(reversed_ring, SiteConfig.ring(2), GRAPHS["router"].routing)))
    with pytest.raises(RuntimeError, match="another graph"):
        strange.load_state_dict(model.state_dict())
    (tmp_path / "saved").mkdir()
    save_checkpoint(tmp_path / "saved", model, step=3)
    with pytest.raises(RuntimeError, match="another graph"):
        load_checkpoint(tmp_path / "saved", strange)
    with pytest.raises(ValueError, match="Expected an empty folder"):
        save_checkpoint(tmp_path / "saved", model)
    with pytest.raises(ValueError, match="Expected a whole checkpoint"):
        load_checkpoint(tmp_path, model)


def test_without_megatron_the_error_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("megatron.", "gohgraph.parallel.megatron"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "megatron", None)
    with pytest.raises(ImportError, match=r"gohgraph\[megatron\]"):
        importlib.import_module("gohgraph.parallel.megatron")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What all ranks of all sizes found, by check, number of ranks and rank."""
    folder = tmp_path_factory.mktemp("ranks")
    for ranks, checks in (
        (1, ("equal", "training")),
        (2, ("equal", "training")),
        (1, ("resuming",)),
        (4, ("equal", "training", "resuming", "data_parallel")),
    ):
        run_ranks(ranks, ranks_program.run_checks, folder, checks)
    return {path.stem: torch.load(path) for path in folder.glob("*-*-*.pt")}


def of(found, ranks, check, first="equal"):
    return [found[f"{first}-{ranks}-{rank}"][check] for rank in range(ranks)]


def whole_gradients(parts):
    """Gradients put together from the parts of all ranks."""
    whole = {}
    for part in parts:
        for key, shape, offset, gradient in part["gradients"].values():
            tensor = whole.setdefault(key, torch.full(shape, torch.nan, dtype=gradient.dtype))
            gradient = gradient.view((1,) * (len(shape) - gradient.dim()) + gradient.shape)
            tensor[tuple(slice(o, o + n) for o, n in zip(offset, gradient.shape, strict=True))] = gradient
    return whole


CASES = [(2, name) for name in ranks_program.SHARDED] + [(2, "router" + variant) for variant in VARIANTS if variant]
CASES += [(4, name) for name in ranks_program.AT_FOUR_RANKS]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "case"), CASES)
def test_ranks_equal_one_rank_in_output_and_every_gradient(found, ranks, case):
    (alone,) = (each[case.partition(",")[0]] for each in of(found, 1, "equal"))
    parts = [each[case] for each in of(found, ranks, "equal")]
    logits = torch.cat([part["logits"] for part in parts], dim=-1)  # [B, T, V]
    torch.testing.assert_close(logits, alone["logits"], rtol=0, atol=1e-9)
    gradients, expected = whole_gradients(parts), whole_gradients([alone])
    assert gradients.keys() == expected.keys() and any("_graph" in key for key in gradients)
    for key, gradient in expected.items():
        torch.testing.assert_close(gradients[key], gradient, rtol=0, atol=1e-9, msg=key)
        # One direction of the router's weights has no influence; everything else has.
        assert gradient.abs().max() > 1e-6, key


@pytest.mark.slow
def test_training_is_equal_at_every_number_of_ranks(found):
    expected = of(found, 1, "training")[0]["losses"]
    assert len(expected) == ranks_program.STEPS
    for ranks in (2, 4):
        for each in of(found, ranks, "training"):
            assert each["losses"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_goes_on_at_one_four_and_two_times_two(found):
    expected = of(found, 2, "training")[0]["on"]
    resumed = of(found, 1, "resuming", "resuming") + of(found, 4, "resuming")
    assert [each["step"] for each in resumed] == [ranks_program.STEPS] * 5
    for each in [*resumed, *of(found, 4, "data_parallel")]:
        assert each["on"] == pytest.approx(expected, abs=1e-5)
