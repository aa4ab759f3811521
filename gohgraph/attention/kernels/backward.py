"""The backward kernels: both compute the maps of a tile again; one goes over keys, one over queries."""

from __future__ import annotations

import triton
import triton.language as tl

from gohgraph.attention.kernels.tiles import (
    LOG2E,
    load_heads,
    load_mix,
    load_rows,
    may_attend,
    places_of_mix,
    products_of_heads,
    store_heads,
)


@triton.jit
def _maps_of_tile(
    q,
    k,
    v,
    w,
    mask,
    dz,
    lse,
    product,
    rows,
    columns,
    num_rows,
    num_columns,
    w_row,
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
    CHUNK: tl.constexpr,
):
    """Returns scores a, weights P and the gradients dS' = P (dz v - product) of mixed scores, `[M, H, N]` each."""
    every = tl.arange(0, H)
    scores = scale * products_of_heads(
        q, k, rows, columns, num_rows, num_columns, 0, HEADS, DIM, GROUP, H, CHUNK, PRECISION
    )
    mixed = tl.dot(load_mix(w, rows, num_rows, every, every, w_row, HEADS), scores, input_precision=PRECISION)
    keep = may_attend(
        mask, rows, columns, num_rows, num_columns, every, mask_head, mask_row, mask_column, HEADS, CAUSAL, MASKED
    )
    log_sum = load_rows(lse, rows, num_rows, every, HEADS)  # [M, H]
    weights = tl.where(keep, tl.exp2(mixed * LOG2E - log_sum[:, :, None]), 0.0)
    dweights = products_of_heads(
        dz, v, rows, columns, num_rows, num_columns, 0, HEADS, DIM, GROUP, H, CHUNK, PRECISION
    )
    products = load_rows(product, rows, num_rows, every, HEADS)  # [M, H]
    return scores, weights, weights * (dweights - products[:, :, None])


@triton.jit
def backward_queries_kernel(
    q,
    k,
    v,
    w,
    mask,
    dz,
    lse,
    product,
    dq,
    dw,
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
    """Writes the gradients of q `[T, HEADS, DIM]` and of w `[T, HEADS, HEADS]`, for M queries and BLOCK senders.

    With dS_j = sum_i w_ij dS'_i: dq_j = sum_s dS_j k_j(s) / sqrt(D), dw_ij = sum_s dS'_i a_j. Grid as in forward.
    """
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * M + tl.arange(0, M)
    first_head = tl.program_id(1) * BLOCK
    senders, every = first_head + tl.arange(0, BLOCK), tl.arange(0, H)
    first = batch * num_rows * HEADS
    q += first * DIM
    k += batch * num_columns * (HEADS // GROUP) * DIM
    v += batch * num_columns * (HEADS // GROUP) * DIM
    w += batch * w_batch
    mix = load_mix(w, rows, num_rows, every, senders, w_row, HEADS)  # [M, H, BLOCK]
    dqueries = tl.zeros([BLOCK, M, D], tl.float32)
    dmix = tl.zeros([M, H, BLOCK], tl.float32)
    end = num_columns
    if CAUSAL:
        end = tl.minimum(num_columns, (tl.program_id(0) + 1) * M)
    for start in range(0, end, N):
        columns = start + tl.arange(0, N)
        scores, _, dmixed = _maps_of_tile(
            q, k, v, w, mask + batch * mask_batch, dz + first * DIM, lse + first, product + first, rows, columns,
            num_rows, num_columns, w_row, mask_head, mask_row, mask_column, scale, HEADS, DIM, GROUP, CAUSAL, MASKED,
            PRECISION, H, CHUNK,
        )  # [M, H, N] each
        # A tile in registers has no parts: those of fewer senders than all are computed once more.
        if BLOCK != H:
            scores = scale * products_of_heads(
                q, k, rows, columns, num_rows, num_columns, first_head, HEADS, DIM, GROUP, BLOCK, CHUNK, PRECISION
            )  # [M, BLOCK, N]
        dmix = tl.dot(dmixed, tl.permute(scores, (0, 2, 1)), dmix, input_precision=PRECISION)
        dscores = tl.dot(tl.permute(mix, (0, 2, 1)), dmixed, input_precision=PRECISION)  # [M, BLOCK, N]
        keys = load_heads(k, columns, num_columns, first_head, 0, HEADS, DIM, GROUP, BLOCK, D)  # [BLOCK, N, D]
        dscores = tl.permute(dscores, (1, 0, 2)).to(keys.dtype)  # [BLOCK, M, N]
        dqueries = tl.dot(dscores, keys, dqueries, input_precision=PRECISION)
    store_heads(dq + first * DIM, dqueries * scale, rows, num_rows, first_head, HEADS, DIM, BLOCK, D)
    places, inside = places_of_mix(rows, num_rows, every, senders, HEADS * HEADS, HEADS)
    tl.store(dw + first * HEADS + places, dmix.to(dw.dtype.element_ty), mask=inside)


@triton.jit
def backward_keys_kernel(
    q,
    k,
    v,
    w,
    mask,
    dz,
    lse,
    product,
    dk,
    dv,
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
    """Writes the gradients of k and v, for each query head `[S, HEADS, DIM]`, for N keys and BLOCK heads.

    dk_j(s) = sum_t dS_j q_j(t) / sqrt(D), dv_i(s) = sum_t P_i dz_i(t). Grid (S / N, HEADS / BLOCK, B).
    """
    batch = tl.program_id(2).to(tl.int64)
    columns = tl.program_id(0) * N + tl.arange(0, N)
    first_head = tl.program_id(1) * BLOCK
    heads, every = first_head + tl.arange(0, BLOCK), tl.arange(0, H)
    first = batch * num_rows * HEADS
    q += first * DIM
    dz += first * DIM
    k += batch * num_columns * (HEADS // GROUP) * DIM
    v += batch * num_columns * (HEADS // GROUP) * DIM
    w += batch * w_batch
    dkeys = tl.zeros([BLOCK, N, D], tl.float32)
    dvalues = tl.zeros([BLOCK, N, D], tl.float32)
    begin = 0
    if CAUSAL:
        begin = tl.program_id(0) * N // M * M
    for start in range(begin, num_rows, M):
        rows = start + tl.arange(0, M)
        scores, weights, dmixed = _maps_of_tile(
            q, k, v, w, mask + batch * mask_batch, dz, lse + first, product + first, rows, columns,
            num_rows, num_columns, w_row, mask_head, mask_row, mask_column, scale, HEADS, DIM, GROUP, CAUSAL, MASKED,
            PRECISION, H, CHUNK,
        )  # [M, H, N] each
        if BLOCK != H:
            mixed = tl.dot(load_mix(w, rows, num_rows, heads, every, w_row, HEADS), scores, input_precision=PRECISION)
            keep = may_attend(
                mask + batch * mask_batch, rows, columns, num_rows, num_columns, heads, mask_head, mask_row,
                mask_column, HEADS, CAUSAL, MASKED,
            )
            log_sum = load_rows(lse + first, rows, num_rows, heads, HEADS)  # [M, BLOCK]
            weights = tl.where(keep, tl.exp2(mixed * LOG2E - log_sum[:, :, None]), 0.0)  # [M, BLOCK, N]
        grad = load_heads(dz, rows, num_rows, first_head, 0, HEADS, DIM, 1, BLOCK, D)  # [BLOCK, M, D]
        weights = tl.permute(weights, (1, 2, 0)).to(grad.dtype)  # [BLOCK, N, M]
        dvalues = tl.dot(weights, grad, dvalues, input_precision=PRECISION)
        mix = load_mix(w, rows, num_rows, every, heads, w_row, HEADS)  # [M, H, BLOCK]
        dscores = tl.dot(tl.permute(mix, (0, 2, 1)), dmixed, input_precision=PRECISION)  # [M, BLOCK, N]
        queries = load_heads(q, rows, num_rows, first_head, 0, HEADS, DIM, 1, BLOCK, D)  # [BLOCK, M, D]
        dscores = tl.permute(dscores, (1, 2, 0)).to(queries.dtype)  # [BLOCK, N, M]
        dkeys = tl.dot(dscores, queries, dkeys, input_precision=PRECISION)
    into = batch * num_columns * HEADS * DIM
    store_heads(dk + into, dkeys * scale, columns, num_columns, first_head, HEADS, DIM, BLOCK, D)
    store_heads(dv + into, dvalues, columns, num_columns, first_head, HEADS, DIM, BLOCK, D)
