"""How much heads matter to a model's loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gohgraph.analysis.losses import Loss, batch_loss, check_batches
from gohgraph.conv import HeadGraphConv
from gohgraph.objects import MultiHeadAttention
from gohgraph.places import block_of, site_of


def head_importance(model: nn.Module, loss: Loss, batches: Sequence[Any]) -> dict[str, Tensor]:
    r"""Returns how much the loss depends on every head: the expected sensitivity to a mask on the head.

    .. math:: I_h = \mathrm{mean}_x \left| \frac{\partial L(x)}{\partial \xi_h} \right|, \qquad
        z_h \to \xi_h z_h, \quad \xi_h = 1

    x is a sequence; the mask stands on what the output projection reads of a head. One backward pass a batch.

    Source: Michel et al. 2019, arXiv 1905.10650, equation 2. Differs: not normalised by the norm of a layer's vector.

    Args:
        model: used as it is; call `model.eval()` first.
        loss: of `(model, batch)`, a mean over the sequences of the batch: a scalar, or an output with `.loss`.
        batches: a list; the first dimension of the activations is that of sequences.

    Returns:
        `[H]` by the name of the attention block: every `MultiHeadAttention`, and every other module with a graph over
        head outputs.

    Raises:
        ValueError: no batches, or no such block.

    Example:
        >>> import gohgraph as goh
        >>> shape = dict(d_model=8, num_heads=2, num_layers=1, d_ff=8)
        >>> model = goh.LanguageModel(goh.TransformerConfig(9, **shape, head_graph=goh.HeadGraphConfig()))
        >>> tokens = torch.tensor([[1, 2, 3, 4]])
        >>> loss = lambda model, tokens: model(tokens[:, :-1], targets=tokens[:, 1:])
        >>> head_importance(model, loss, [tokens])["decoder.layers.0.attention.object"].shape
        torch.Size([2])
    """
    check_batches(batches)
    masks: dict[str, list[Tensor]] = {}
    hooks = [_masking(name, block, masks) for name, block in _blocks(model).items()]
    totals: dict[str, Tensor] = {}
    try:
        for batch in batches:
            masks.clear()
            with torch.enable_grad():
                value = batch_loss(model, loss, batch)
            names = [name for name, made in masks.items() for _ in made]
            grads = torch.autograd.grad(value, [mask for made in masks.values() for mask in made])
            for name, grad in zip(names, grads, strict=True):
                # The loss is a mean over sequences: each one's own gradient is as many times larger.
                size = grad.flatten(1).double().cpu().abs().mean(dim=0) * len(grad)  # [H]
                totals[name] = totals.get(name, 0) + size / len(batches)
    finally:
        for hook in hooks:
            hook.remove()
    return totals


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    """What masks are put on, by block: our attention, or elsewhere the graph at the heads' outputs."""
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, MultiHeadAttention)}
    for name, module in model.named_modules():
        is_own = any(f"{name}.".startswith(f"{block}.".removeprefix(".")) for block in blocks)
        if isinstance(module, HeadGraphConv) and not is_own and site_of(name) == "outputs":
            blocks[block_of(name)] = module
    if not blocks:
        raise ValueError("Expected a model with attention of this library (got none). Do convert it first.")
    return blocks


def _masking(name: str, block: nn.Module, masks: dict[str, list[Tensor]]):
    def masked(z: Tensor) -> Tensor:
        mask = z.new_ones(len(z), *[1] * (z.dim() - 3), z.shape[-2], 1).requires_grad_()  # [B, 1, H, 1]
        masks.setdefault(name, []).append(mask)
        return z * mask

    if isinstance(block, MultiHeadAttention):
        shape = (block.num_heads, block.head_dim)
        return block.output.register_forward_pre_hook(
            lambda module, inputs: (masked(inputs[0].unflatten(-1, shape)).flatten(-2),)  # [B, T, H, D] -> [B, T, M]
        )
    return block.register_forward_hook(
        lambda module, inputs, z: (masked(z[0]), *z[1:]) if isinstance(z, tuple) else masked(z)
    )
