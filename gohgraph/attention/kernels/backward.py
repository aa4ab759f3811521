"""The backward kernels: both compute the maps of a tile again; one goes over keys, one over queries."""

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
    scale,
    C: tl.constexpr,
):
    """Returns scores a, weights P and the gradients dS' = P (dz v - product) of mixed scores, `[M, H, N]` each."""
    every = tl.arange(0, C.H)
    scores = scale * products_of_heads(
        q, k, rows, columns, num_rows, num_columns, 0, C.H, C
    )
    mixed = tl.dot(load_mix(w, rows, num_rows, every, every, w_row, C.HEADS), scores, input_precision=C.PRECISION)
    keep = may_attend(mask, rows, columns, num_rows, num_columns, every, C)
    log_sum = load_rows(lse, rows, num_rows, every, C.HEADS)  # [M, H]
    weights = tl.where(keep, tl.exp2(mixed * LOG2E - log_sum[:, :, None]), 0.0)
    dweights = products_of_heads(
        dz, v, rows, columns, num_rows, num_columns, 0, C.H, C
    )
    products = load_rows(product, rows, num_rows, every, C.HEADS)  # [M, H]
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
    C: tl.constexpr,
):
    """Writes the gradients of q `[T, HEADS, DIM]` and of w `[T, HEADS, HEADS]`, for M queries and BLOCK senders.

    With dS_j = sum_i w_ij dS'_i: dq_j = sum_s dS_j k_j(s) / sqrt(D), dw_ij = sum_s dS'_i a_j. Grid as in forward.
    """
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * C.M + tl.arange(0, C.M)
    first_head = tl.program_id(1) * C.BLOCK
    senders, every = first_head + tl.arange(0, C.BLOCK), tl.arange(0, C.H)
    first = batch * num_rows * C.HEADS
    q += first * C.DIM
    dz += first * C.DIM
    lse += first
    product += first
    k += batch * num_columns * (C.HEADS // C.GROUP) * C.DIM
    v += batch * num_columns * (C.HEADS // C.GROUP) * C.DIM
    w += batch * w_batch
    sequence_mask = (mask + batch * mask_batch, mask_head, mask_row, mask_column)
    mix = load_mix(w, rows, num_rows, every, senders, w_row, C.HEADS)  # [M, H, BLOCK]
    dqueries = tl.full([C.BLOCK, C.M, C.D], 0.0, tl.float32)
    dmix = tl.full([C.M, C.H, C.BLOCK], 0.0, tl.float32)
    end = num_columns
    if C.CAUSAL:
        end = tl.minimum(num_columns, (tl.program_id(0) + 1) * C.M)
    for start in range(0, end, C.N):
        columns = start + tl.arange(0, C.N)
        scores, _, dmixed = _maps_of_tile(
            q, k, v, w, sequence_mask, dz, lse, product, rows, columns, num_rows, num_columns, w_row, scale, C
        )  # [M, H, N] each
        # A tile in registers has no parts: those of fewer senders than all are computed once more.
        if C.BLOCK != C.H:
            scores = scale * products_of_heads(
                q, k, rows, columns, num_rows, num_columns, first_head, C.BLOCK, C
            )  # [M, BLOCK, N]
        dmix = tl.dot(dmixed, tl.permute(scores, (0, 2, 1)), dmix, input_precision=C.PRECISION)
        dscores = tl.dot(tl.permute(mix, (0, 2, 1)), dmixed, input_precision=C.PRECISION)  # [M, BLOCK, N]
        keys = load_heads(k, columns, num_columns, first_head, 0, C.GROUP, C.BLOCK, C.D, C)  # [BLOCK, N, D]
        dscores = tl.permute(dscores, (1, 0, 2)).to(keys.dtype)  # [BLOCK, M, N]
        dqueries = tl.dot(dscores, keys, dqueries, input_precision=C.PRECISION)
    store_heads(dq + first * C.DIM, dqueries * scale, rows, num_rows, first_head, C)
    places, inside = places_of_mix(rows, num_rows, every, senders, C.HEADS * C.HEADS, C.HEADS)
    tl.store(dw + first * C.HEADS + places, dmix.to(dw.dtype.element_ty), mask=inside)


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
    C: tl.constexpr,
):
    """Writes the gradients of k and v, for each query head `[S, HEADS, DIM]`, for N keys and BLOCK heads.

    dk_j(s) = sum_t dS_j q_j(t) / sqrt(D), dv_i(s) = sum_t P_i dz_i(t). Grid (S / N, HEADS / BLOCK, B).
    """
    batch = tl.program_id(2).to(tl.int64)
    columns = tl.program_id(0) * C.N + tl.arange(0, C.N)
    first_head = tl.program_id(1) * C.BLOCK
    heads, every = first_head + tl.arange(0, C.BLOCK), tl.arange(0, C.H)
    first = batch * num_rows * C.HEADS
    q += first * C.DIM
    dz += first * C.DIM
    lse += first
    product += first
    k += batch * num_columns * (C.HEADS // C.GROUP) * C.DIM
    v += batch * num_columns * (C.HEADS // C.GROUP) * C.DIM
    w += batch * w_batch
    sequence_mask = (mask + batch * mask_batch, mask_head, mask_row, mask_column)
    dkeys = tl.full([C.BLOCK, C.N, C.D], 0.0, tl.float32)
    dvalues = tl.full([C.BLOCK, C.N, C.D], 0.0, tl.float32)
    begin = 0
    if C.CAUSAL:
        begin = tl.program_id(0) * C.N // C.M * C.M
    for start in range(begin, num_rows, C.M):
        rows = start + tl.arange(0, C.M)
        scores, weights, dmixed = _maps_of_tile(
            q, k, v, w, sequence_mask, dz, lse, product, rows, columns, num_rows, num_columns, w_row, scale, C
        )  # [M, H, N] each
        if C.BLOCK != C.H:
            mix = load_mix(w, rows, num_rows, heads, every, w_row, C.HEADS)  # [M, BLOCK, H]
            mixed = tl.dot(mix, scores, input_precision=C.PRECISION)
            keep = may_attend(sequence_mask, rows, columns, num_rows, num_columns, heads, C)
            log_sum = load_rows(lse, rows, num_rows, heads, C.HEADS)  # [M, BLOCK]
            weights = tl.where(keep, tl.exp2(mixed * LOG2E - log_sum[:, :, None]), 0.0)  # [M, BLOCK, N]
        grad = load_heads(dz, rows, num_rows, first_head, 0, 1, C.BLOCK, C.D, C)  # [BLOCK, M, D]
        weights = tl.permute(weights, (1, 2, 0)).to(grad.dtype)  # [BLOCK, N, M]
        dvalues = tl.dot(weights, grad, dvalues, input_precision=C.PRECISION)
        to_receivers = load_mix(w, rows, num_rows, every, heads, w_row, C.HEADS)  # [M, H, BLOCK]
        dscores = tl.dot(tl.permute(to_receivers, (0, 2, 1)), dmixed, input_precision=C.PRECISION)  # [M, BLOCK, N]
        queries = load_heads(q, rows, num_rows, first_head, 0, 1, C.BLOCK, C.D, C)  # [BLOCK, M, D]
        dscores = tl.permute(dscores, (1, 2, 0)).to(queries.dtype)  # [BLOCK, N, M]
        dkeys = tl.dot(dscores, queries, dkeys, input_precision=C.PRECISION)
    into = batch * num_columns * C.HEADS * C.DIM
    store_heads(dk + into, dkeys * scale, columns, num_columns, first_head, C)
    store_heads(dv + into, dvalues, columns, num_columns, first_head, C)
