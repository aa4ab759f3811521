"""How much heads matter to a model's loss."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gohgraph.analysis.losses import Loss, batch_loss, check_batches
from gohgraph.analysis.module_names import block_of, site_of
from gohgraph.attention.block import MultiHeadAttention
from gohgraph.convert.conversion import find_blocks
from gohgraph.graphs.edge_graph import EdgeGraph


def head_importance(
    model: nn.Module, loss: Loss, batches: Sequence[Any], *, example: dict[str, Any] | None = None
) -> dict[str, Tensor]:
    r"""Returns how much the loss depends on every head: the expected sensitivity to a mask on the head.

    .. math:: I_h = \mathrm{mean}_x \left| \frac{\partial L(x)}{\partial \xi_h} \right|, \qquad
        z_h \to \xi_h z_h, \quad \xi_h = 1

    x is a sequence; the mask stands on what the output projection reads of a head. One backward pass a batch.

    Source: Michel et al. 2019, arXiv 1905.10650, equation 2. Differs: not normalised by the norm of a layer's vector.

    Args:
        model: used as it is; call `model.eval()` first.
        loss: of `(model, batch)`, a mean over the sequences of the batch: a scalar, or an output with `.loss`.
        batches: a list; the first dimension of the activations is that of sequences.
        example: as in `convert`.

    Returns:
        `[H]` by the name of the attention block: every `MultiHeadAttention`, and every other module with a graph over
        head outputs; in a model without any of these, what `convert` would give graphs to.

    Raises:
        ValueError: no list of batches, or a model without attention whose output projection is known.

    Example:
        >>> import gohgraph as goh
        >>> model = goh.LanguageModel(goh.TransformerConfig(9, d_model=8, num_heads=2, num_layers=1, d_ff=8)).eval()
        >>> tokens = torch.randint(9, (4, 6))
        >>> importance = head_importance(model, lambda model, batch: model(batch, targets=batch.roll(-1, 1)), [tokens])
        >>> {name: values.shape for name, values in importance.items()}
        {'decoder.layers.0.attention.object': torch.Size([2])}
    """
    check_batches(batches)
    masks: dict[str, list[Tensor]] = {}
    totals: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name, block in _blocks(model, example).items():
            hooks.enter_context(_masking(name, block, masks))
        for batch in batches:
            masks.clear()
            with torch.enable_grad():
                value = batch_loss(model, loss, batch)
            names = [name for name, made in masks.items() for _ in made]
            grads = torch.autograd.grad(value, [mask for made in masks.values() for mask in made])
            for name, grad in zip(names, grads, strict=True):
                # The loss is a mean over sequences: each one's own gradient is as many times larger.
                size = grad.flatten(1).cpu().double().abs().mean(dim=0) * len(grad)  # [H]
                totals[name] = totals.get(name, 0) + size / len(batches)
    return totals


def _blocks(model: nn.Module, example: dict[str, Any] | None) -> dict[str, tuple[nn.Module, int | None]]:
    """What masks are put on, by block: an output projection of so many heads, or the graph at the heads' outputs."""
    modules = dict(model.named_modules())
    attention = {name: block for name, block in modules.items() if isinstance(block, MultiHeadAttention)}
    blocks: dict[str, tuple[nn.Module, int | None]] = {n: (b.output, b.num_heads) for n, b in attention.items()}
    for name, module in modules.items():
        is_inside = any(f"{name}.".startswith(f"{block}.".removeprefix(".")) for block in attention)
        if isinstance(module, EdgeGraph) and not is_inside and site_of(name) == "outputs":
            blocks[block_of(name)] = (module, None)
    if not blocks:
        convertible = find_blocks(model, example).blocks.values()
        blocks = {b.name: (b.projection, b.num_heads) for b in convertible if b.projection is not None}
    if not blocks:
        raise ValueError(
            f"Expected attention with a known output projection (got none in {type(model).__name__}). Do see what "
            "convert finds."
        )
    return blocks


def _masking(name: str, block: tuple[nn.Module, int | None], masks: dict[str, list[Tensor]]) -> RemovableHandle:
    module, heads = block

    def masked(z: Tensor) -> Tensor:
        mask = z.new_ones(len(z), *[1] * (z.dim() - 3), z.shape[-2], 1).requires_grad_()  # [B, 1, H, 1]
        masks.setdefault(name, []).append(mask)
        return z * mask

    if heads is not None:
        return module.register_forward_pre_hook(
            # [B, T, M] -> [B, T, H, D] -> [B, T, M]
            lambda module, inputs: (masked(inputs[0].unflatten(-1, (heads, -1))).flatten(-2), *inputs[1:])
        )
    return module.register_forward_hook(lambda module, inputs, z: masked(z))
