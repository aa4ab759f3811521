"""Losses of head routers under Megatron-Core, which scales and logs those of experts the same way."""

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from gohgraph.attention.routing import Routing
from gohgraph.graphs.config import RoutingConfig

BALANCE, Z = "head_balance_loss", "head_z_loss"


def set_router_loss_scale(config: TransformerConfig, num_microbatches: int = 1) -> None:
    """Sets the scale of router losses, in each training step before the backward passes.

    Megatron-Core's schedules do it for models with experts (`num_moe_experts`) and for no others: of these it sets the
    same scale, that of the gradient scaler over the number of micro-batches; those it leaves alone.

    Args:
        config: of the model.
        num_microbatches: whose gradients a step adds.
    """
    if config.num_moe_experts is not None:
        return
    scale = torch.tensor(1.0 if config.calculate_per_token_loss else 1.0 / num_microbatches)
    if config.grad_scale_func is not None:
        scale = config.grad_scale_func(scale).detach()
    MoEAuxLossAutoScaler.main_loss_backward_scale = scale


def attach_losses(
    z: Tensor, routing: Routing, weights: RoutingConfig, config: TransformerConfig, layer_number: int
) -> Tensor:
    """Returns `z`, whose backward pass also starts at the weighted losses of a router, each a mean over the layers.

    They are logged as `head_balance_loss` and `head_z_loss`, without their weights.

    Args:
        z: `[s, b, H/n, D]`, what the block computes from here on.
        routing: with the losses.
        weights: `balance_loss` and `z_loss` of it.
        config: of the transformer.
        layer_number: from 1 on.
    """
    # Under full recomputation the first pass has no gradients: the second one counts.
    if not torch.is_grad_enabled():
        return z
    layers = config.num_layers + (getattr(config, "mtp_num_layers", None) or 0)
    # Gradients are divided by the number of tokens then.
    tokens = z.shape[0] * z.shape[1] if config.calculate_per_token_loss else 1
    balance = (BALANCE, weights.balance_loss, routing.balance_loss)
    for name, weight, loss in (balance, (Z, weights.z_loss, routing.z_loss)):
        if not weight or loss is None:
            continue
        if MoEAuxLossAutoScaler.main_loss_backward_scale is None and config.num_moe_experts is None:
            raise ValueError(
                "Expected a scale of router losses (got None). Do call set_router_loss_scale(config, num_microbatches) "
                "in every training step."
            )
        _log(name, loss, layer_number, layers)
        z = MoEAuxLossAutoScaler.apply(z, weight * loss * tokens / config.num_layers)
    return z


def _log(name: str, loss: Tensor, layer_number: int, layers: int) -> None:
    """Leaves a loss where Megatron-Core logs those of experts: new ones in a tracker, before that in a table."""
    try:
        from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    except ImportError:
        from megatron.core.transformer.moe.moe_utils import save_to_aux_losses_tracker

        save_to_aux_losses_tracker(name, loss, layer_number, layers)
    else:
        get_moe_metrics_tracker().record(name, loss, layer_number, layers)
