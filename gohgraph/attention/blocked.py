"""Attention with messages between its scores over many keys: some queries and some keys at a time.

Whole rows of maps over many keys leave a core's cache, and each takes new memory. Here a tile goes over its keys block
by block, in memory that all blocks share, with the largest score and the sum of a row carried on (online softmax, as
in FlashAttention, arXiv 2205.14135). Messages between weights need whole rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gohgraph.attention.kernels.folding import fold, unfold

# Numbers of a block of maps (rows * H * keys), its queries, and the fewest keys of one. With half as many of both the
# attention of 8 heads of 64 over 4,096 keys took up to a third more time, with twice as many as much.
BLOCK_NUMBERS, ROWS, FEWEST_KEYS = 2**19, 128, 128

SECOND_GRADIENTS = (
    "Expected first gradients alone of attention in tiles (got second ones). Do run forward within "
    "torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or call mixed_attention."
)


class Block(NamedTuple):
    """Some queries of one sequence, and some of the keys they may see."""

    item: int
    rows: slice
    keys: slice


class _Inputs(NamedTuple):
    """Queries `[B, T, H, D]`, scaled, keys `[B, S, H, D]`, values `[B, S, R, D]`, messages `[B, T, R, H]`, a mask."""

    q: Tensor
    k: Tensor
    v: Tensor
    mix: Tensor
    keep_mask: Tensor | None
    is_causal: bool

    @property
    def receivers(self) -> int:
        return self.mix.shape[-2]

    def tiles(self) -> Iterator[tuple[int, slice, list[Block]]]:
        """Yields the queries of every sequence in turn, and with them the blocks of keys they may see."""
        batch, tokens, heads, _ = self.q.shape
        width = max(FEWEST_KEYS, BLOCK_NUMBERS // (ROWS * max(heads, self.receivers)))
        for item in range(batch):
            for start in range(0, tokens, ROWS):
                rows = slice(start, min(start + ROWS, tokens))
                end = rows.stop if self.is_causal else self.k.shape[1]
                edges = [*range(0, end, width), end]
                keys = [slice(first, last) for first, last in zip(edges, edges[1:], strict=False)]
                yield item, rows, [Block(item, rows, some) for some in keys]


class _Maps:
    """The maps of one block after another, in memory that is theirs for all blocks."""

    def __init__(self, inputs: _Inputs, count: int) -> None:
        self.inputs = inputs
        self.keys = inputs.k.permute(0, 2, 3, 1).contiguous()  # [B, H, D, S]
        heads = max(inputs.q.shape[2], inputs.receivers)
        size = heads * ROWS * min(inputs.k.shape[1], max(FEWEST_KEYS, BLOCK_NUMBERS // (ROWS * heads)))
        self.memory = [inputs.q.new_empty(size) for _ in range(count)]

    def place(self, index: int, *shape: int) -> Tensor:
        """One of the memories as a map."""
        size = shape[0] * shape[1] * shape[2]
        return self.memory[index][:size].view(shape)

    def of(self, block: Block) -> tuple[Tensor, Tensor]:
        """Scores `[H, t, n]` before messages, and `[t, R, n]` after them, -inf where a query may not attend."""
        b, rows, some = block
        inputs, (count, n) = self.inputs, (rows.stop - rows.start, some.stop - some.start)
        scores = self.place(0, inputs.q.shape[2], count, n)
        torch.bmm(inputs.q[b, rows].transpose(0, 1), self.keys[b, :, :, some], out=scores)  # [H, t, n]
        mixed = self.place(1, count, inputs.receivers, n)
        torch.bmm(inputs.mix[b, rows], scores.transpose(0, 1), out=mixed)  # [t, R, n]
        if inputs.is_causal and some.stop > rows.start + 1:
            # Keys before the first query are seen by all, and filling by a mask is slow.
            first = max(some.start, rows.start)
            seen = torch.arange(rows.start, rows.stop, device=mixed.device).unsqueeze(1)  # [t, 1]
            later = torch.arange(first, some.stop, device=mixed.device) > seen  # [t, n']
            mixed[..., first - some.start :].masked_fill_(later.unsqueeze(1), float("-inf"))
        if inputs.keep_mask is not None:
            keep = inputs.keep_mask[b, :, rows, some].transpose(0, 1)  # [t, R, n]
            mixed.masked_fill_(~keep, float("-inf"))
        return scores, mixed


def blocked_attention(
    q: Tensor, k: Tensor, v: Tensor, mix: Tensor, keep_mask: Tensor | None, is_causal: bool
) -> Tensor:
    """Returns what `tiled_attention` does under messages between scores alone, going over blocks of keys.

    Args:
        q: queries `[B, T, H, D]`, scaled.
        k, v: `[B, S, H, D]` and `[B, S, R, D]`.
        mix: `[B, T, R, H]`, rows receive.
        keep_mask: bool `[B, 1 or R, 1 or T, 1 or S]`, or `None`.
        is_causal: query t sees keys up to t.

    Example:
        >>> q, k, v = torch.randn(3, 2, 7, 5, 4)
        >>> blocked_attention(q, k, v, torch.randn(2, 7, 5, 5), None, is_causal=True).shape
        torch.Size([2, 7, 5, 4])
    """
    return _BlockedAttention.apply(q, k, v, mix, keep_mask, is_causal)[0]


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        inputs = _expanded(_Inputs(*arguments))
        maps, values = _Maps(inputs, 2), inputs.v.transpose(1, 2).contiguous()  # [B, R, S, D]
        shape = (*inputs.q.shape[:2], inputs.receivers)
        z, sums = inputs.q.new_empty(*shape, inputs.v.shape[-1]), inputs.q.new_empty(*shape, 1)
        for item, rows, blocks in inputs.tiles():
            count = rows.stop - rows.start
            most = sums.new_full((count, inputs.receivers, 1), float("-inf"))  # [t, R, 1]
            total, part = torch.zeros_like(most), z.new_zeros(inputs.receivers, count, z.shape[-1])  # [R, t, D]
            for block in blocks:
                _, mixed = maps.of(block)
                above = torch.maximum(most, mixed.amax(dim=-1, keepdim=True))
                # Rows without any key so far have no largest score: theirs is 0.
                shift = above.masked_fill(above == float("-inf"), 0.0)
                shrunk, most = (most - shift).exp_(), above
                weights = mixed.sub_(shift).exp_()
                total = total.mul_(shrunk).add_(weights.sum(dim=-1, keepdim=True))
                part.mul_(shrunk.transpose(0, 1))
                part.baddbmm_(weights.transpose(0, 1), values[item, :, block.keys])  # [R, t, D]
            # So that rows without any key have weights of 0 in backward.
            sums[item, rows] = torch.where(total > 0, most + total.log(), float("inf"))
            z[item, rows] = part.transpose(0, 1) / total.masked_fill_(total == 0, 1.0)  # [t, R, D]
        return z, sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.is_causal = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        *tensors, z, sums = ctx.saved_tensors
        return *_BlockedGradients.apply(z, sums, grad, *tensors, ctx.is_causal), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        outputs = _BlockedAttention.apply(*fold(info.batch_size, in_dims, inputs))  # [N*B, *] each
        return tuple(unfold(info.batch_size, x) for x in outputs), (0, 0)


class _BlockedGradients(torch.autograd.Function):
    """The backward pass as a function, so that `torch.func.vmap` can fold its inputs too."""

    @staticmethod
    def forward(z: Tensor, sums: Tensor, grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        inputs = _expanded(_Inputs(*arguments))
        maps, values = _Maps(inputs, 3), inputs.v.permute(0, 2, 3, 1).contiguous()  # [B, R, D, S]
        # sum_s P dP for every row, without another pass over the maps.
        products = (grad * z).sum(dim=-1, keepdim=True).neg_()  # [B, T, R, 1]
        dq, dmix = torch.zeros_like(inputs.q), torch.zeros_like(inputs.mix, memory_format=torch.contiguous_format)
        dk, dv = torch.zeros_like(maps.keys), torch.zeros_like(values)  # [B, H, D, S], [B, R, D, S]
        for item, rows, blocks in inputs.tiles():
            q, mix, dz = (x[item, rows] for x in (inputs.q, inputs.mix, grad))  # [t, ...] each
            shift, product = sums[item, rows], products[item, rows].transpose(0, 1)  # [t, R, 1], [R, t, 1]
            part = q.new_zeros(q.shape[1], len(q), q.shape[2])  # [H, t, D]
            for block in blocks:
                scores, mixed = maps.of(block)
                weights, n = mixed.sub_(shift).exp_(), block.keys  # [t, R, n]
                dv[item, :, :, n].baddbmm_(dz.permute(1, 2, 0), weights.transpose(0, 1))  # [R, D, n]
                dweights = maps.place(2, inputs.receivers, len(q), weights.shape[-1])
                torch.baddbmm(product, dz.transpose(0, 1), values[item, :, :, n], out=dweights)  # [R, t, n]
                dmixed = dweights.transpose(0, 1).mul_(weights)  # [t, R, n]
                dmix[item, rows].baddbmm_(dmixed, scores.permute(1, 2, 0))  # [t, R, H]
                dscores = maps.place(1, len(q), q.shape[1], weights.shape[-1])
                torch.bmm(mix.transpose(1, 2), dmixed, out=dscores)  # [t, H, n]
                part.baddbmm_(dscores.transpose(0, 1), inputs.k[item, n].transpose(0, 1))  # [H, t, D]
                dk[item, :, :, n].baddbmm_(q.permute(1, 2, 0), dscores.transpose(0, 1))  # [H, D, n]
            dq[item, rows] = part.transpose(0, 1)  # [t, H, D]
        return dq, *(x.permute(0, 3, 1, 2) for x in (dk, dv)), dmix

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps nothing: there is no second backward pass."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise RuntimeError(SECOND_GRADIENTS)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        gradients = _BlockedGradients.apply(*fold(info.batch_size, in_dims, inputs))  # [N*B, *] each
        return tuple(unfold(info.batch_size, x) for x in gradients), (0,) * len(gradients)


def _expanded(inputs: _Inputs) -> _Inputs:
    """With a mask `[B, R, T, S]`, of one `[B, 1 or R, 1 or T, 1 or S]`."""
    if inputs.keep_mask is None:
        return inputs
    shape = (-1, inputs.receivers, inputs.q.shape[1], inputs.k.shape[1])
    return inputs._replace(keep_mask=inputs.keep_mask.expand(shape))
