"""The forward kernel: some queries of a sequence, and some heads, over all keys those may see."""

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
    C: tl.constexpr,
):
    """Writes z `[T, HEADS, DIM]` and the base-2 log-sum-exp of the mixed scores, `[T, HEADS]`.

    A program does M queries and BLOCK receiving heads of one sequence: grid (T / M, HEADS / BLOCK, B).
    """
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * C.M + tl.arange(0, C.M)
    first_head = tl.program_id(1) * C.BLOCK
    heads = first_head + tl.arange(0, C.BLOCK)
    first = batch * num_rows * C.HEADS
    q += first * C.DIM
    k += batch * num_columns * (C.HEADS // C.GROUP) * C.DIM
    v += batch * num_columns * (C.HEADS // C.GROUP) * C.DIM
    mix = load_mix(w + batch * w_batch, rows, num_rows, heads, tl.arange(0, C.H), w_row, C.HEADS)  # [M, BLOCK, H]
    sequence_mask = (mask + batch * mask_batch, mask_head, mask_row, mask_column)
    largest = tl.full([C.M, C.BLOCK], float("-inf"), tl.float32)
    total = tl.full([C.M, C.BLOCK], 0.0, tl.float32)
    outputs = tl.full([C.BLOCK, C.M, C.D], 0.0, tl.float32)
    end = num_columns
    if C.CAUSAL:
        end = tl.minimum(num_columns, (tl.program_id(0) + 1) * C.M)
    for start in range(0, end, C.N):
        columns = start + tl.arange(0, C.N)
        scores = scale * products_of_heads(
            q, k, rows, columns, num_rows, num_columns, 0, C.H, C
        )  # [M, H, N]
        mixed = tl.dot(mix, scores, input_precision=C.PRECISION)  # [M, BLOCK, N]
        keep = may_attend(sequence_mask, rows, columns, num_rows, num_columns, heads, C)
        mixed = tl.where(keep, mixed * LOG2E, float("-inf"))
        largest_now = tl.maximum(largest, tl.max(mixed, axis=2))  # [M, BLOCK]
        # A row that has not met a key it may attend to has -inf here, which must not be taken from another.
        shift = tl.where(largest_now == float("-inf"), 0.0, largest_now)
        weights = tl.exp2(mixed - shift[:, :, None])  # [M, BLOCK, N]
        shrink = tl.exp2(largest - shift)  # [M, BLOCK]
        total = total * shrink + tl.sum(weights, axis=2)
        largest = largest_now
        values = load_heads(v, columns, num_columns, first_head, 0, C.GROUP, C.BLOCK, C.D, C)  # [BLOCK, N, D]
        weights = tl.permute(weights, (1, 0, 2)).to(values.dtype)  # [BLOCK, M, N]
        outputs = tl.dot(weights, values, outputs * tl.permute(shrink, (1, 0))[:, :, None], input_precision=C.PRECISION)
    # A row without any key gives its sum, zeros; backward keeps none of its weights, so its total is not read.
    total = tl.where(total > 0, total, 1.0)
    outputs = outputs / tl.permute(total, (1, 0))[:, :, None]
    store_heads(z + first * C.DIM, outputs, rows, num_rows, first_head, C)
    log_sum = largest + tl.log2(total)
    inside = (rows < num_rows)[:, None] & (heads < C.HEADS)[None, :]
    tl.store(lse + first + rows[:, None] * C.HEADS + heads[None, :], log_sum, mask=inside)
