"""Attention with messages between its maps, a few queries at a time: no map is ever whole in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gohgraph.attention.blocked import SECOND_GRADIENTS, blocked_attention
from gohgraph.attention.kernels.folding import fold, unfold
from gohgraph.attention.sharing import most_parts
from gohgraph.common.checks import there

if TYPE_CHECKING:
    from gohgraph.attention.edge_matrices import EdgeMatrices

# Numbers of a tile of maps (rows * H * S), of which backward holds three: they stay in a core's cache between products,
# and count little beside a block. Time is flat up to the double; with fewer rows products are too flat to be fast, with
# more they waste much above the diagonal.
TILE_NUMBERS = 2**18
FEWEST_ROWS, MOST_ROWS = 64, 128

# Of many heads the products over heads outweigh the others, and do not need as many queries: so few that there are as
# many rows of maps (512 tokens, batch 2, d_model 512, block in training, ratio of time and memory to plain, one thread:
# 32 heads 1.39 and 1.36 -> 1.29 and 1.23, 64 heads 1.53 and 2.45 -> 1.44 and 2.04).
FEWEST_ROWS_OF_MAPS = 1024

# From so many keys on, whole rows of a tile leave the cache, and messages between scores alone go over blocks of keys
# (attention alone, forward and backward, processor time on one thread of an AMD EPYC, to that of tiles: 8 heads of 64
# over 512 keys 1.03, 1,024 0.90 and in another run 1.04; 16 of 32 over 1,024 0.88, 32 of 16 0.82, over 2,048 0.65).
# Where threads share blocks out, each reads first what operators shared out otherwise: of few heads under a causal
# mask, which leaves half of the work, from twice as many (1,024 tokens, two threads, time to plain, blocks and rows: a
# block of d_model 128 and 8 heads 1.96, 1.34, of 512 1.16, 1.07; a Llama of 512 with 8 heads 1.11 to 1.16, 1.06 to 1.16
# in several runs, 16 heads 1.18, 1.11 to 1.28, 32 heads 1.37, 1.30 to 1.56; under a padding mask 1.53, 2.13).
BLOCKS_FROM_KEYS, SHARED_BLOCKS_FROM_KEYS, FEW_HEADS = 1024, 2048, 8


class Tile(NamedTuple):
    """Some queries of one sequence, and the keys they may see.

    Args:
        item: index in the batch.
        rows: the queries.
        keys: the number of keys, from the first one.
    """

    item: int
    rows: slice
    keys: int


def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mix_scores: Tensor | EdgeMatrices | None = None,
    mix_weights: Tensor | None = None,
    keep_mask: Tensor | None = None,
    is_causal: bool = False,
    tiles: Callable[..., Tensor] | None = None,
    blocks: Callable[..., Tensor] | None = None,
) -> Tensor:
    r"""Attention with linear messages between scores, between the weights they become, or both, in tiles of queries.

    .. math:: P_i(t, s) = \mathrm{softmax}_s \sum_j w_{ij}(t)\, q_j(t) \cdot k_j(s) / \sqrt{D}, \qquad
        z_i(t) = \sum_s \sum_j u_{ij}(t)\, P_j(t, s)\, v_i(s)

    with w = `mix_scores` and u = `mix_weights`. Equal to `mixed_attention`, its slow reference, at the price of about
    plain attention for every graph up to the complete one. Backward computes the maps again, tile by tile, so memory
    grows with T and not with T x S. Gradients are for one backward pass: second ones need `mixed_attention`. Under
    `torch.func.vmap`, as for the gradients of every sample, the mapped dimension is part of the batch.

    Source: tiles and recomputation as in FlashAttention (arXiv 2205.14135); here a tile holds the maps of all heads and
    whole rows, so that its softmax is the ordinary one.

    Args:
        q: queries `[B, T, H, D]`.
        k: keys `[B, S, G, D]`, G dividing H.
        v: values `[B, S, G', D]`, G' dividing the heads that receive, R; outputs are `[B, T, R, D]`, zeros if S = 0.
        mix_scores, mix_weights: w and u, `[B, T, R, H]` or `[R, H]`, rows receive; `None` for the identity.
            `EdgeMatrices` go with `tiles=edge_tiles`.
        keep_mask: bool, broadcastable to `[B, H, T, S]`, True = may attend; a row without any gives zeros.
        is_causal: query t sees keys up to t; T = S. Not beside a mask.
        tiles: what computes them, `tiled_operator.tiles` where torch compiles, `edge_tiles` where edges are too many;
            `None` for a function of autograd.
        blocks: the same for messages between scores alone over many keys.

    Example:
        >>> q, k, v = torch.randn(3, 2, 7, 5, 4)
        >>> tiled_attention(q, k, v, torch.randn(2, 7, 5, 5), is_causal=True).shape
        torch.Size([2, 7, 5, 4])
    """
    if is_causal and keep_mask is not None:
        raise ValueError("Expected keep_mask or is_causal (got both). Do make causality part of the mask.")
    batch, tokens, heads, head_dim = q.shape
    last = mix_weights if mix_weights is not None else mix_scores
    receivers = heads if last is None else last.shape[-2]
    k = k.repeat_interleave(heads // k.shape[2], dim=2) if heads != k.shape[2] else k  # [B, S, H, D]
    v = v.repeat_interleave(receivers // v.shape[2], dim=2) if receivers != v.shape[2] else v  # [B, S, R, D]
    mixes = [
        w.to(q.dtype).expand(batch, tokens, -1, -1) if isinstance(w, Tensor) else w for w in (mix_scores, mix_weights)
    ]
    if keep_mask is not None:
        # Only the batch, which a mapped dimension may join: what is the same for all heads stays one.
        keep_mask = keep_mask[(None,) * (4 - keep_mask.dim())].expand(batch, -1, -1, -1)  # [B, 1 or H, 1 or T, 1 or S]
    # Inputs have one dtype; autocast would turn only some of the products inside into another.
    with torch.autocast(q.device.type, enabled=False):
        # Sums over blocks are carried on: half precision would lose them.
        is_precise = q.dtype in (torch.float32, torch.float64)
        scores, weights = mixes
        # What is compiled cannot ask for the number of threads.
        is_shared_out = is_causal and heads <= FEW_HEADS and blocks is None and q.is_cpu and most_parts() > 1
        is_long = k.shape[1] >= (SHARED_BLOCKS_FROM_KEYS if is_shared_out else BLOCKS_FROM_KEYS)
        k, v = k.to(q.dtype), v.to(q.dtype)
        if isinstance(scores, Tensor) and weights is None and is_precise and is_long:
            blocks = blocked_attention if blocks is None else blocks
            return blocks(q, k, v, scores, keep_mask, is_causal)
        tiles = _TiledAttention.apply if tiles is None else tiles
        return tiles(q * head_dim**-0.5, k, v, *mixes, keep_mask, is_causal)


def tiles_of(batch: int, tokens: int, heads: int, keys: int, is_causal: bool) -> Iterator[Tile]:
    """Yields the tiles that cover all queries of all sequences.

    Example:
        >>> [tile.keys for tile in tiles_of(1, 300, 8, 300, is_causal=True)]
        [96, 192, 288, 300]
    """
    fewest = min(FEWEST_ROWS, max(8, FEWEST_ROWS_OF_MAPS // max(1, heads)))
    rows = min(MOST_ROWS, max(fewest, TILE_NUMBERS // max(1, heads * keys) // 16 * 16))
    for item in range(batch):
        for start in range(0, tokens, rows):
            stop = min(start + rows, tokens)
            yield Tile(item, slice(start, stop), stop if is_causal else keys)


class _Inputs(NamedTuple):
    """The inputs of `tiled_attention` as its tiles read them: queries scaled, keys and values of every head."""

    q: Tensor
    k: Tensor
    v: Tensor
    mix_scores: Tensor | EdgeMatrices | None
    mix_weights: Tensor | None
    keep_mask: Tensor | None
    is_causal: bool

    @classmethod
    def of(cls, *inputs: Any) -> _Inputs:
        """Takes a mask `[B, 1 or H, 1 or T, 1 or S]`."""
        made = cls(*inputs)
        if made.keep_mask is None:
            return made
        batch, tokens, heads, _ = made.q.shape
        rows = heads if made.mix_scores is None else made.mix_scores.shape[-2]
        return made._replace(keep_mask=made.keep_mask.expand(batch, rows, tokens, made.k.shape[1]))  # [B, R, T, S]

    def tiles(self) -> Iterator[Tile]:
        batch, tokens, heads = self.q.shape[:3]
        return tiles_of(batch, tokens, heads, self.k.shape[1], self.is_causal)

    def maps(self, keys: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        """Scores `[H, t, n]` before messages, and the weights `[t, H, n]` after them, for keys `[B, H, D, S]`."""
        b, rows, n = tile
        scores = torch.bmm(self.q[b, rows].transpose(0, 1), keys[b, :, :, :n])  # [H, t, n]
        mixed = scores.transpose(0, 1)  # [t, H, n]
        mixed = mixed.clone() if self.mix_scores is None else torch.bmm(self.mix_scores[b, rows], mixed)
        if self.is_causal:
            size = rows.stop - rows.start
            later = torch.ones(size, size, dtype=torch.bool, device=keys.device).triu(1).unsqueeze(1)  # [t, 1, t]
            mixed[..., rows].masked_fill_(later, float("-inf"))
        if self.keep_mask is None:
            return scores, mixed.softmax(dim=-1)
        keep = self.keep_mask[b, :, rows, :n].transpose(0, 1)  # [t, H, n]
        weights = mixed.masked_fill_(~keep, float("-inf")).softmax(dim=-1)
        return scores, weights.masked_fill_(~keep.any(dim=-1, keepdim=True), 0.0)


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        inputs = _Inputs.of(*arguments)
        z = inputs.q.new_empty(*inputs.q.shape[:2], *inputs.v.shape[2:])  # [B, T, R, D]
        values = inputs.v.transpose(1, 2).contiguous()  # [B, H, S, D]
        keys = inputs.k.permute(0, 2, 3, 1).contiguous()  # [B, H, D, S]

        # In a function of its own, a tile's maps are freed before the next one's are made.
        def outputs(tile: Tile) -> Tensor:
            _, weights = inputs.maps(keys, tile)
            if inputs.mix_weights is not None:
                weights = torch.bmm(inputs.mix_weights[tile.item, tile.rows], weights)  # [t, H, n]
            return torch.bmm(weights.transpose(0, 1), values[tile.item, :, : tile.keys])  # [H, t, D]

        for tile in inputs.tiles():
            z[tile.item, tile.rows] = outputs(tile).transpose(0, 1)  # [t, H, D]
        return z

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.is_causal = inputs
        ctx.save_for_backward(*tensors, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, z = ctx.saved_tensors
        gradients = iter(_TiledGradients.apply(z, grad, *tensors, ctx.is_causal))
        # Of q, k, v and the mixes that there are.
        return (*(None if x is None else next(gradients) for x in tensors[:5]), None, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        z = _TiledAttention.apply(*fold(info.batch_size, in_dims, inputs))  # [N*B, T, H, D]
        return unfold(info.batch_size, z), 0


class _TiledGradients(torch.autograd.Function):
    """The backward pass as a function, so that `torch.func.vmap` can fold its inputs too."""

    @staticmethod
    def forward(z: Tensor, grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        inputs = _Inputs.of(*arguments)
        gradients = _Gradients(inputs, z, grad)
        for tile in inputs.tiles():
            gradients.add(tile)
        return gradients.of_inputs()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps nothing: there is no second backward pass."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise RuntimeError(SECOND_GRADIENTS)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        gradients = _TiledGradients.apply(*fold(info.batch_size, in_dims, inputs))  # [N*B, *] each
        return tuple(unfold(info.batch_size, x) for x in gradients), (0,) * len(gradients)


class _Gradients:
    """Gradients of the inputs; those of keys and values, to which every tile adds, lie as products are fastest."""

    def __init__(self, inputs: _Inputs, z: Tensor, grad: Tensor) -> None:
        self.inputs, self.dz = inputs, grad
        self.keys, self.values = (x.permute(0, 2, 3, 1).contiguous() for x in (inputs.k, inputs.v))  # [B, H, D, S]
        # sum_s P dP for every row, without another pass over the maps; messages between weights need that pass.
        has_products = inputs.mix_weights is None
        self.products = (grad * z).sum(dim=-1, keepdim=True) if has_products else None  # [B, T, H, 1]
        self.dq = torch.empty_like(inputs.q)
        # In float32 at least: a sum over many tiles loses the digits of bfloat16 that each of them has.
        sums = torch.promote_types(grad.dtype, torch.float32)
        self.dk, self.dv = (torch.zeros_like(x, dtype=sums) for x in (self.keys, self.values))  # [B, H, D, S]
        mixes = (inputs.mix_scores, inputs.mix_weights)
        self.dmix_scores, self.dmix_weights = map(_room, mixes)

    def add(self, tile: Tile) -> None:
        """Computes the maps of a tile again, at most three at once (four if weights mix), and adds their part."""
        b, rows, n = tile
        q, k, mix_scores = self.inputs.q, self.inputs.k, self.inputs.mix_scores
        scores, weights = self.inputs.maps(self.keys, tile)
        dscores = self._through_weights(tile, weights)  # [t, H, n]
        del weights
        if mix_scores is not None:
            dmix = torch.bmm(dscores, scores.permute(1, 2, 0))  # [t, H, H]
            dscores = torch.bmm(mix_scores[b, rows].transpose(1, 2), dscores)  # [t, H, n]
            # Last: they may take the place of what they are the gradients of.
            there(self.dmix_scores)[b, rows] = dmix
        dscores = dscores.transpose(0, 1)  # [H, t, n]
        self.dq[b, rows] = torch.bmm(dscores, k[b, :n].transpose(0, 1)).transpose(0, 1)  # [t, H, D]
        self.dk[b, :, :, :n] += torch.bmm(q[b, rows].permute(1, 2, 0), dscores)  # [H, D, n]

    def of_inputs(self) -> tuple[Tensor, ...]:
        """Returns the gradients in the order of the inputs, without those of mixes that there are not."""
        dk, dv = (x.to(self.dz.dtype).permute(0, 3, 1, 2) for x in (self.dk, self.dv))  # [B, S, H, D]
        return self.dq, dk, dv, *(w for w in (self.dmix_scores, self.dmix_weights) if w is not None)

    def _through_weights(self, tile: Tile, weights: Tensor) -> Tensor:
        """Adds to the values' gradients and returns those of the scores after messages, `[t, H, n]`."""
        b, rows, n = tile
        mix_weights = self.inputs.mix_weights
        dz = self.dz[b, rows].transpose(0, 1)  # [H, t, D]
        dweights = torch.bmm(dz, self.values[b, :, :, :n]).transpose(0, 1)  # [t, H, n]
        if mix_weights is None:
            self.dv[b, :, :, :n] += torch.bmm(dz.transpose(1, 2), weights.transpose(0, 1))  # [H, D, n]
            return dweights.sub_(there(self.products)[b, rows]).mul_(weights)
        there(self.dmix_weights)[b, rows] = torch.bmm(dweights, weights.transpose(1, 2))  # [t, H, H]
        mixed = torch.bmm(mix_weights[b, rows], weights)  # [t, H, n]
        self.dv[b, :, :, :n] += torch.bmm(dz.transpose(1, 2), mixed.transpose(0, 1))  # [H, D, n]
        del mixed
        dweights = torch.bmm(mix_weights[b, rows].transpose(1, 2), dweights)  # [t, H, n]
        product = (dweights * weights).sum(dim=-1, keepdim=True)  # [t, H, 1]
        return dweights.sub_(product).mul_(weights)


def _room(mix: Any) -> Any:
    """What takes in the gradients of a mix by item and rows; matrices that no tensor holds have their own."""
    if mix is None or isinstance(mix, Tensor):
        return mix if mix is None else mix.new_empty(mix.shape)
    return mix.room()
