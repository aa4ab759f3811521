"""Attention with messages between its scores over many keys: some queries and some keys at a time.

Whole rows of maps over many keys leave a core's cache, and each takes new memory. Here a tile goes over its keys block
by block, in memory that all blocks share, with the largest score and the sum of a row carried on (online softmax, as
in FlashAttention, arXiv 2205.14135); backward goes over the tiles that see a block of keys. Threads share out tiles and
blocks of keys. Messages between weights need whole rows.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gohgraph.attention.kernels.folding import fold, unfold
from gohgraph.attention.sharing import dealt, most_parts, shared_out

# A block's queries, half as many over fewer keys, its numbers a query (H * keys), and the fewest keys. Attention alone,
# forward and backward, one thread of an AMD EPYC, as ratio to torch's, 128 queries and 64: 1,024 keys and 8 heads of 64
# 1.43, 1.35, 32 of 16 2.17, 1.91; 2,048 keys 1.37, 1.39; 4,096 1.52, 1.55.
ROWS, ROWS_FROM_KEYS, NUMBERS, FEWEST_KEYS = 128, 2048, 2**12, 128

# exp(x) = 2^(x log2 e): torch's powers of 2 take 0.4 of the time of its exponential.
LOG2_E, LN_2 = math.log2(math.e), math.log(2.0)

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
    """Queries `[B, T, H, D]`, keys `[B, S, H, D]`, values `[B, S, R, D]`, messages `[B, T, R, H]`, a mask."""

    q: Tensor
    k: Tensor
    v: Tensor
    mix: Tensor
    keep_mask: Tensor | None
    is_causal: bool

    @classmethod
    def of(cls, *arguments: Any) -> _Inputs:
        """Takes a mask `[B, 1 or R, 1 or T, 1 or S]`."""
        made = cls(*arguments)
        if made.keep_mask is None:
            return made
        shape = (-1, made.receivers, made.q.shape[1], made.k.shape[1])
        return made._replace(keep_mask=made.keep_mask.expand(shape))  # [B, R, T, S]

    @property
    def receivers(self) -> int:
        return self.mix.shape[-2]

    @property
    def scale(self) -> float:
        """Of scores; here it is part of products, so that backward needs no scaled queries beside those there are."""
        return self.q.shape[-1] ** -0.5

    @property
    def rows(self) -> int:
        """How many queries a block has."""
        return ROWS if self.k.shape[1] >= ROWS_FROM_KEYS else ROWS // 2

    @property
    def width(self) -> int:
        """How many keys a block has."""
        return max(FEWEST_KEYS, NUMBERS // max(self.q.shape[2], self.receivers))

    def tiles(self) -> list[list[Block]]:
        """Returns of some queries after the others the blocks of keys they may see."""
        keys = _slices(self.k.shape[1], self.width)
        return [
            self._seen([Block(item, rows, some) for some in keys])
            for item in range(len(self.q))
            for rows in _slices(self.q.shape[1], self.rows)
        ]

    def columns(self) -> list[list[Block]]:
        """Returns of some keys after the others the blocks of queries that may see them."""
        rows = _slices(self.q.shape[1], self.rows)
        # Two for each part: under a causal mask a part takes one that many queries see and one that few do.
        fair = math.ceil(self.k.shape[1] * len(self.q) / (2 * self.parts)) if self.parts > 1 else self.width
        return [
            self._seen([Block(item, some, keys) for some in rows])
            for item in range(len(self.q))
            for keys in _slices(self.k.shape[1], min(self.width, max(FEWEST_KEYS, fair)))
        ]

    def _seen(self, blocks: list[Block]) -> list[Block]:
        if not self.is_causal:
            return blocks
        seen = [block._replace(keys=slice(block.keys.start, min(block[1].stop, block.keys.stop))) for block in blocks]
        return [block for block in seen if block.keys.start < block.keys.stop]

    @property
    def parts(self) -> int:
        """Into how many parts work falls, each in a thread of its own."""
        return most_parts() if self.q.is_cpu else 1

    def dealt(self, tasks: list[list[Block]]) -> list[list[list[Block]]]:
        """Deals tasks out to threads."""
        return dealt(tasks, min(self.parts, len(tasks)))


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


class _Maps:
    """The maps of one block after another, in memory that is theirs for all blocks."""

    def __init__(self, inputs: _Inputs, keys: Tensor, count: int) -> None:
        self.inputs, self.keys = inputs, keys  # [B, H, D, S]
        size = max(inputs.q.shape[2], inputs.receivers) * inputs.rows * min(inputs.k.shape[1], inputs.width)
        self.memory = [inputs.q.new_empty(size) for _ in range(count)]

    def place(self, index: int, *shape: int) -> Tensor:
        """One of the memories as a map."""
        size = shape[0] * shape[1] * shape[2]
        return self.memory[index][:size].view(shape)

    def of(self, block: Block) -> tuple[Tensor, Tensor]:
        """Scores `[H, t, n]` before messages, `[t, R, n]` after, -inf where unseen; both times log2 e."""
        b, rows, some = block
        inputs, (count, n) = self.inputs, (rows.stop - rows.start, some.stop - some.start)
        scores = self.place(0, inputs.q.shape[2], count, n)
        q, keys = inputs.q[b, rows].transpose(0, 1), self.keys[b, :, :, some]  # [H, t, D], [H, D, n]
        scores.baddbmm_(q, keys, beta=0, alpha=inputs.scale * LOG2_E)  # [H, t, n]
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
        q: queries `[B, T, H, D]`.
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
        inputs = _Inputs.of(*arguments)
        keys, values = inputs.k.permute(0, 2, 3, 1), inputs.v.transpose(1, 2)  # [B, H, D, S], [B, R, S, D]
        shape = (*inputs.q.shape[:2], inputs.receivers)
        # Of queries without any key the outputs are 0, and the weights in backward.
        z, sums = inputs.q.new_zeros(*shape, inputs.v.shape[-1]), inputs.q.new_full((*shape, 1), float("inf"))

        def attend(tiles: list[list[Block]]) -> None:
            maps = _Maps(inputs, keys, 2)
            for blocks in filter(None, tiles):
                item, rows, _ = blocks[0]
                z[item, rows], sums[item, rows] = _outputs(maps, values, blocks)

        shared_out(attend, inputs.dealt(inputs.tiles()))
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


def _outputs(maps: _Maps, values: Tensor, blocks: list[Block]) -> tuple[Tensor, Tensor]:
    """The outputs of a tile `[t, R, D]`, and the logarithm of what its rows sum up to, `[t, R, 1]`, to the base 2."""
    item, rows, _ = blocks[0]
    count, receivers = rows.stop - rows.start, maps.inputs.receivers
    # Finite where a row has had no key so far, so that no weight of it is a NaN.
    most = values.new_full((count, receivers, 1), torch.finfo(values.dtype).min)  # [t, R, 1]
    total, part = torch.zeros_like(most), values.new_zeros(receivers, count, values.shape[-1])  # [R, t, D]
    for block in blocks:
        _, mixed = maps.of(block)
        above = torch.maximum(most, mixed.amax(dim=-1, keepdim=True))
        shrunk, most = most.sub_(above).exp2_(), above
        weights = mixed.sub_(above).exp2_()
        total = total.mul_(shrunk).add_(weights.sum(dim=-1, keepdim=True))
        part.mul_(shrunk.transpose(0, 1))
        part.baddbmm_(weights.transpose(0, 1), values[item, :, block.keys])  # [R, t, D]
    sums = torch.where(total > 0, most + total.log2(), float("inf"))
    return part.transpose(0, 1) / total.masked_fill_(total == 0, 1.0), sums


class _BlockedGradients(torch.autograd.Function):
    """The backward pass as a function, so that `torch.func.vmap` can fold its inputs too."""

    @staticmethod
    def forward(z: Tensor, sums: Tensor, grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        inputs = _Inputs.of(*arguments)
        gradients = _Gradients(inputs, z, sums, grad)
        (dq, dmix), *others = shared_out(gradients.of, inputs.dealt(inputs.columns()) or [[]])
        for of_queries, of_messages in others:
            dq += of_queries
            dmix += of_messages
        dq = dq.mul_(inputs.scale).transpose(2, 3).flatten(1, 2)[:, : inputs.q.shape[1]]  # [B, T, H, D]
        return dq, gradients.dk, gradients.dv, dmix.mul_(LN_2)

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


class _Gradients:
    """The gradients of keys and values, and what some keys add to those of queries and messages."""

    def __init__(self, inputs: _Inputs, z: Tensor, sums: Tensor, grad: Tensor) -> None:
        self.inputs, self.sums, self.grad = inputs, sums, grad
        self.keys, self.values = (x.permute(0, 2, 3, 1) for x in (inputs.k, inputs.v))  # [B, H, D, S], [B, R, D, S]
        # sum_s P dP for every row, without another pass over the maps.
        self.products = (grad * z).sum(dim=-1, keepdim=True).neg_()  # [B, T, R, 1]
        self.dk, self.dv = (x.new_zeros(x.shape) for x in (inputs.k, inputs.v))  # [B, S, H, D], [B, S, R, D]

    def of(self, columns: list[list[Block]]) -> tuple[Tensor, Tensor]:
        """Writes those of some keys; returns what they add for queries, `[B, tiles, H, t, D]`, and for messages."""
        q, mix, rows, maps = self.inputs.q, self.inputs.mix, self.inputs.rows, _Maps(self.inputs, self.keys, 3)
        # Every tile by itself: adding to a part of something else would be a product for each head.
        dq = q.new_zeros(len(q), -(-q.shape[1] // rows), q.shape[2], rows, q.shape[3])
        dmix = mix.new_zeros(mix.shape)  # [B, T, R, H]
        for blocks in filter(None, columns):
            item, _, keys = blocks[-1]
            n = keys.stop - keys.start
            dk, dv = (x.new_zeros(*x.shape[1:3], n) for x in (self.keys, self.values))  # [H, D, n], [R, D, n]
            for block in blocks:
                tile = dq[item, block.rows.start // rows]
                self._add(maps, block, tile, dk, dv, dmix[item, block.rows])
            self.dk[item, keys] = dk.mul_(self.inputs.scale).permute(2, 0, 1)  # [n, H, D]
            self.dv[item, keys] = dv.permute(2, 0, 1)  # [n, R, D]
        return dq, dmix

    def _add(self, maps: _Maps, block: Block, dq: Tensor, dk: Tensor, dv: Tensor, dmix: Tensor) -> None:
        item, rows, keys = block
        n, inputs = slice(0, keys.stop - keys.start), self.inputs
        q, mix, dz, product = (x[item, rows] for x in (inputs.q, inputs.mix, self.grad, self.products))  # [t, ...] each
        scores, mixed = maps.of(block)
        weights = mixed.sub_(self.sums[item, rows]).exp2_()  # [t, R, n]
        dv[:, :, n].baddbmm_(dz.permute(1, 2, 0), weights.transpose(0, 1))  # [R, D, n]
        dweights = maps.place(2, inputs.receivers, len(q), n.stop)
        torch.baddbmm(product.transpose(0, 1), dz.transpose(0, 1), self.values[item, :, :, keys], out=dweights)
        dmixed = dweights.transpose(0, 1).mul_(weights)  # [t, R, n]
        dmix.baddbmm_(dmixed, scores.permute(1, 2, 0))  # [t, R, H]
        dscores = maps.place(1, len(q), q.shape[1], n.stop)
        torch.bmm(mix.transpose(1, 2), dmixed, out=dscores)  # [t, H, n]
        dq[:, : len(q)].baddbmm_(dscores.transpose(0, 1), inputs.k[item, keys].transpose(0, 1))  # [H, t, D]
        dk[:, :, n].baddbmm_(q.permute(1, 2, 0), dscores.transpose(0, 1))  # [H, D, n]
