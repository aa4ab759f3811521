"""What the ranks in the tests of Megatron-Core do; each leaves what it found in a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from helpers import load_script
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from gohgraph import HeadGraphConfig, RoutingConfig, SiteConfig
from gohgraph.parallel.megatron import head_graph_layer_spec, set_router_loss_scale
from gohgraph.parallel.megatron.checkpoint import load_checkpoint, save_checkpoint
from gohgraph.parallel.megatron.cpu import cpu_trial

LAYERS, HEADS, GROUPS, HEAD_DIM, WIDTH, VOCABULARY, TOKENS, BATCH = 2, 8, 4, 6, 20, 44, 12, 3
STEPS, MORE, SAVED = 8, 3, "saved"
ROUTING = RoutingConfig(num_shared=2, top_k=(5, 3), balance_loss=0.3, z_loss=0.2)
GRAPHS = {
    "complete": HeadGraphConfig(),
    "low rank": HeadGraphConfig(outputs=SiteConfig("star", rank=3, rounds=2, norm=True)),
    "static ring": HeadGraphConfig(outputs=SiteConfig.ring(3, edges="static", activation=None)),
    "groups": HeadGraphConfig(outputs=SiteConfig("groups", {"num_groups": 4})),
    "in-star": HeadGraphConfig(outputs=SiteConfig(tuple((j, 5) for j in range(8) if j != 5), self_loops=False)),
    "scores": HeadGraphConfig(outputs=None, scores=SiteConfig.ring(3)),
    "one key head": HeadGraphConfig(scores=SiteConfig.ring(2)),
    "router": HeadGraphConfig(outputs=SiteConfig.ring(4), scores=SiteConfig.ring(2), routing=ROUTING),
}
# Of the graph itself `sharded_graphs.py` checks more; these are what Megatron-Core holds and what it hands over.
AT_FOUR_RANKS = ("low rank", "in-star", "router")
SHARDED = (*AT_FOUR_RANKS, "one key head")
TRAINED = HeadGraphConfig(
    outputs=GRAPHS["in-star"].outputs, scores=SiteConfig.ring(2, rank=3), routing=GRAPHS["router"].routing
)
SETTINGS = {"one key head": {"num_query_groups": 1}}
VARIANTS = {
    "": {},
    ", sequence parallel": {"sequence_parallel": True},
    ", maps recomputed": {"recompute_granularity": "selective"},
    ", layers recomputed": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def transformer_config(**settings: Any) -> TransformerConfig:
    """The shape of all models here, without what needs CUDA."""
    return TransformerConfig(
        num_layers=LAYERS,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_query_groups=settings.pop("num_query_groups", GROUPS),
        kv_channels=HEAD_DIM,
        ffn_hidden_size=52,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        **settings,
    )


def build(spec: Any, seed: int = 0, **settings: Any) -> GPTModel:
    """A small GPT of Megatron-Core; the same seed gives the same weights at every number of ranks."""
    torch.manual_seed(seed)
    return GPTModel(
        transformer_config(**settings),
        spec,
        vocab_size=VOCABULARY,
        max_sequence_length=TOKENS,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )


def tokens_and_positions(seed: int) -> tuple[Tensor, Tensor]:
    """Tokens `[B, T]` and their positions."""
    drawn = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (BATCH, TOKENS), generator=drawn), torch.arange(TOKENS).expand(BATCH, -1)


@torch.no_grad()
def draw_far(model: nn.Module) -> None:
    """Draws head graphs and router far from their start."""
    drawn = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "_graph." in name or ".router." in name:
            parameter.copy_(torch.randn(parameter.shape, generator=drawn, dtype=parameter.dtype) * 0.7)


def whole_gradients(model: GPTModel) -> dict[str, Any]:
    """Gradients of this rank's parts, each with its key and place in the whole tensor."""
    found = {}
    for name, part in model.sharded_state_dict().items():
        gradient = getattr(getattr(part, "data", None), "grad", None)
        if gradient is not None:
            part = part.build() if isinstance(part, ShardedTensorFactory) else part
            found[name] = (part.key, part.global_shape, part.global_offset, gradient)
    return found


def norm(cls: type, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> nn.Module:
    """Stands in for Apex's norm, the one under which Megatron-Core allows sequence parallelism; it needs CUDA."""
    return nn.LayerNorm(hidden_size, eps)


def reduce_norms(model: GPTModel) -> None:
    """What Megatron-Core's `finalize_model_grads` does for parameters that see a rank's part of the tokens."""
    for name, parameter in model.named_parameters():
        if getattr(parameter, "sequence_parallel", False) or "layernorm" in name:
            dist.all_reduce(parameter.grad)


def outputs_and_gradients(model: GPTModel) -> dict[str, Any]:
    """Logits of this rank's part of the vocabulary, and the gradients of a sum over all of it."""
    set_router_loss_scale(model.config)
    tokens, positions = tokens_and_positions(0)
    logits = model(tokens, positions, None)  # [B, T, V/n]
    weights = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(4), dtype=logits.dtype)
    own = weights.chunk(dist.get_world_size())[dist.get_rank()]
    (logits * own).sin().sum().backward()
    if model.config.sequence_parallel:
        reduce_norms(model)
    return {"logits": logits.detach(), "gradients": whole_gradients(model)}


def train(model: GPTModel, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """Losses of training steps."""
    losses = []
    for step in steps:
        set_router_loss_scale(model.config)
        tokens, positions = tokens_and_positions(step)
        optimizer.zero_grad()
        loss = model(tokens, positions, None, labels=tokens.roll(1, 1)).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def copy_whole(model: GPTModel, whole: dict[str, Tensor]) -> None:
    """Fills this rank's parts from whole tensors."""
    for part in model.sharded_state_dict().values():
        if isinstance(getattr(part, "data", None), nn.Parameter):
            place = part.build() if isinstance(part, ShardedTensorFactory) else part
            shape = [1] * (len(place.global_shape) - part.data.dim()) + list(part.data.shape)
            index = tuple(slice(first, first + size) for first, size in zip(place.global_offset, shape, strict=True))
            part.data.data.copy_(whole[part.key][index].view(part.data.shape))


def whole_parameters(model: GPTModel) -> dict[str, Tensor]:
    """The parameters of a model on one rank, layers stacked, as they lie in its checkpoints."""
    whole: dict[str, Tensor] = {}
    for part in model.sharded_state_dict().values():
        if isinstance(getattr(part, "data", None), nn.Parameter):
            place = part.build() if isinstance(part, ShardedTensorFactory) else part
            tensor = whole.setdefault(part.key, torch.zeros(place.global_shape, dtype=part.data.dtype))
            tensor[place.global_offset[0] if len(place.global_shape) > part.data.dim() else ...] = part.data.detach()
    return whole


def check_equal(folder: Path, ranks: int) -> dict[str, Any]:
    """Sharded graphs in float64, from the weights of one rank."""
    found = {}
    for name in SHARDED if ranks < 4 else AT_FOUR_RANKS:
        for variant, settings in VARIANTS.items() if name == "router" and ranks == 2 else [("", {})]:
            settings = {**settings, **SETTINGS.get(name, {}), "tensor_model_parallel_size": ranks}
            model = build(head_graph_layer_spec(GRAPHS[name]), **settings).double()
            if ranks == 1:
                draw_far(model)
                torch.save(whole_parameters(model), folder / f"{name}.pt")
            else:
                copy_whole(model, torch.load(folder / f"{name}.pt"))
            found[name + variant] = outputs_and_gradients(model)
    return found


def check_training(folder: Path, ranks: int) -> dict[str, Any]:
    """Steps from one seed; two ranks save after them and go on."""
    model, optimizer = model_and_optimizer(0, ranks)
    found = {"losses": train(model, optimizer, range(STEPS))}
    if ranks == 2:
        save(folder / SAVED, model, optimizer)
        found["on"] = train(model, optimizer, range(STEPS, STEPS + MORE))
    return found


def check_resuming(folder: Path, ranks: int) -> dict[str, Any]:
    """Steps on from the checkpoint that two ranks saved."""
    model, optimizer = model_and_optimizer(5, ranks)
    step = load_checkpoint(folder / SAVED, model, optimizer)["step"]
    return {"step": step, "on": train(model, optimizer, range(step, step + MORE))}


def check_data_parallel(folder: Path) -> dict[str, Any]:
    """Two groups of two ranks each: the checkpoint of two ranks, saved once more by all."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(2)
    model, optimizer = model_and_optimizer(5, 2)
    load_checkpoint(folder / SAVED, model, optimizer)
    save(folder / "again", model, optimizer)
    model, optimizer = model_and_optimizer(6, 2)
    load_checkpoint(folder / "again", model, optimizer)
    return {"on": train(model, optimizer, range(STEPS, STEPS + MORE))}


def model_and_optimizer(seed: int, ranks: int) -> tuple[GPTModel, torch.optim.Optimizer]:
    """A model with head graphs of which, at four ranks, some hold no edge at all, and an optimizer."""
    model = build(head_graph_layer_spec(TRAINED), seed=seed, tensor_model_parallel_size=ranks)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def save(folder: Path, model: GPTModel, optimizer: torch.optim.Optimizer) -> None:
    """Saves from all ranks into a folder that the first one makes."""
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    save_checkpoint(folder, model, optimizer, step=STEPS)


def run_checks(rank: int, folder: Path, checks: tuple[str, ...]) -> None:
    """Checks of one rank of one size."""
    ranks, found = dist.get_world_size(), {}
    parallel_state.initialize_model_parallel(ranks)
    with cpu_trial(), mock.patch.object(WrappedTorchNorm, "__new__", norm):
        for check in checks:
            arguments = (folder,) if check == "data_parallel" else (folder, ranks)
            found[check] = globals()[f"check_{check}"](*arguments)
    torch.save(found, folder / f"{checks[0]}-{ranks}-{rank}.pt")


def run_script(rank: int, port: int, flags: list[str]) -> int:
    """The training script on one of many ranks, which meet again at a free port as torchrun's do; its exit code."""
    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return load_script("examples/megatron", "pretrain_gpt").main(flags)
