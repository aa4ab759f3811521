"""The forward kernel: some queries of a sequence, and some heads, over all keys those may see."""

from __future__ import annotations

import triton
import triton.language as tl

from gohgraph.attention.kernels.tiles import LOG2E, load_heads, load_mix, may_attend, products_of_heads, store_heads


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    w,
    mask,
    z,
    lse,
    num_rows,
    num_columns,
    w_batch,
    w_row,
    mask_batch,
    mask_head,
    mask_row,
    mask_column,
    scale,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Writes z `[T, HEADS, DIM]` and the base-2 log-sum-exp of the mixed scores, `[T, HEADS]`.

    A program does M queries and BLOCK receiving heads of one sequence: grid (T / M, HEADS / BLOCK, B).
    """
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * M + tl.arange(0, M)
    first_head = tl.program_id(1) * BLOCK
    heads = first_head + tl.arange(0, BLOCK)
    first = batch * num_rows * HEADS
    q += first * DIM
    k += batch * num_columns * (HEADS // GROUP) * DIM
    v += batch * num_columns * (HEADS // GROUP) * DIM
    mix = load_mix(w + batch * w_batch, rows, num_rows, heads, tl.arange(0, H), w_row, HEADS)  # [M, BLOCK, H]
    largest = tl.full([M, BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([M, BLOCK], tl.float32)
    found = tl.zeros([BLOCK, M, D], tl.float32)
    end = num_columns
    if CAUSAL:
        end = tl.minimum(num_columns, (tl.program_id(0) + 1) * M)
    for start in range(0, end, N):
        columns = start + tl.arange(0, N)
        scores = scale * products_of_heads(
            q, k, rows, columns, num_rows, num_columns, 0, HEADS, DIM, GROUP, H, CHUNK, PRECISION
        )  # [M, H, N]
        mixed = tl.dot(mix, scores, input_precision=PRECISION)  # [M, BLOCK, N]
        keep = may_attend(
            mask + batch * mask_batch, rows, columns, num_rows, num_columns, heads, mask_head, mask_row, mask_column,
            HEADS, CAUSAL, MASKED,
        )
        mixed = tl.where(keep, mixed * LOG2E, float("-inf"))
        largest_now = tl.maximum(largest, tl.max(mixed, axis=2))  # [M, BLOCK]
        # A row that has not met a key it may attend to has -inf here, which must not be taken from another.
        shift = tl.where(largest_now == float("-inf"), 0.0, largest_now)
        weights = tl.exp2(mixed - shift[:, :, None])  # [M, BLOCK, N]
        shrink = tl.exp2(largest - shift)  # [M, BLOCK]
        total = total * shrink + tl.sum(weights, axis=2)
        largest = largest_now
        values = load_heads(v, columns, num_columns, first_head, 0, HEADS, DIM, GROUP, BLOCK, D)  # [BLOCK, N, D]
        weights = tl.permute(weights, (1, 0, 2)).to(values.dtype)  # [BLOCK, M, N]
        found = tl.dot(weights, values, found * tl.permute(shrink, (1, 0))[:, :, None], input_precision=PRECISION)
    # A row without any key has found zeros, and gives them; backward keeps none of its weights, so its sum is not read.
    total = tl.where(total > 0, total, 1.0)
    found = found / tl.permute(total, (1, 0))[:, :, None]
    store_heads(z + first * DIM, found, rows, num_rows, first_head, HEADS, DIM, BLOCK, D)
    log_sum = largest + tl.log2(total)
    inside = (rows < num_rows)[:, None] & (heads < HEADS)[None, :]
    tl.store(lse + first + rows[:, None] * HEADS + heads[None, :], log_sum, mask=inside)
