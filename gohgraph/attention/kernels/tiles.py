"""What the kernels share: tiles of heads in memory, and the products of heads that scores are made of.

Triton has no structures but tuples: what is compiled in is one constant C, `launch.Constants`, and a mask in a kernel
is the tuple of its pointer and strides.
"""

import triton
import triton.language as tl

# The hardware's exponential is that of base 2.
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_heads(
    pointer,
    rows,
    num_rows,
    first_head,
    first_dim,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
):
    """Reads a tile `[BLOCK, rows, WIDTH]` of a tensor `[num_rows, HEADS / GROUP, DIM]`; beyond its ends are zeros."""
    heads, dims = first_head + tl.arange(0, BLOCK), first_dim + tl.arange(0, WIDTH)
    places = rows[None, :, None] * (C.HEADS // GROUP) + (heads // GROUP)[:, None, None]  # [BLOCK, rows, 1]
    inside = (heads < C.HEADS)[:, None, None] & (rows < num_rows)[None, :, None] & (dims < C.DIM)[None, None, :]
    return tl.load(pointer + places * C.DIM + dims[None, None, :], mask=inside, other=0.0)


@triton.jit
def store_heads(pointer, tile, rows, num_rows, first_head, C: tl.constexpr):
    """Writes a tile `[BLOCK, rows, D]` to a tensor `[num_rows, HEADS, DIM]`, but for what lies beyond its ends."""
    heads, dims = first_head + tl.arange(0, C.BLOCK), tl.arange(0, C.D)
    places = rows[None, :, None] * C.HEADS + heads[:, None, None]  # [BLOCK, rows, 1]
    inside = (heads < C.HEADS)[:, None, None] & (rows < num_rows)[None, :, None] & (dims < C.DIM)[None, None, :]
    tl.store(pointer + places * C.DIM + dims[None, None, :], tile.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def places_of_mix(rows, num_rows, receivers, senders, stride, HEADS: tl.constexpr):
    """Returns where the w_ij of rows, receivers and senders lie, `[rows, receivers, senders]`, and which there are."""
    places = rows[:, None, None] * stride + receivers[None, :, None] * HEADS + senders[None, None, :]
    inside = (rows < num_rows)[:, None, None] & (receivers < HEADS)[None, :, None] & (senders < HEADS)[None, None, :]
    return places, inside


@triton.jit
def load_mix(pointer, rows, num_rows, receivers, senders, stride, HEADS: tl.constexpr):
    """Reads w `[rows, receivers, senders]` of a tensor `[num_rows, HEADS, HEADS]` as float32."""
    places, inside = places_of_mix(rows, num_rows, receivers, senders, stride, HEADS)
    return tl.load(pointer + places, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_rows(pointer, rows, num_rows, heads, HEADS: tl.constexpr):
    """Reads `[rows, heads]` of a tensor `[num_rows, HEADS]`; beyond its ends are zeros."""
    inside = (rows < num_rows)[:, None] & (heads < HEADS)[None, :]
    return tl.load(pointer + rows[:, None] * HEADS + heads[None, :], mask=inside, other=0.0)


@triton.jit
def products_of_heads(a, b, rows, columns, num_rows, num_columns, first_head, BLOCK: tl.constexpr, C: tl.constexpr):
    """Returns a_i(t) . b_i(s) for BLOCK heads, `[rows, BLOCK, columns]`, of a `[T, HEADS, DIM]`, b `[S, G, DIM]`."""
    products = tl.zeros([BLOCK, rows.shape[0], columns.shape[0]], tl.float32)
    # In pieces of the features: whole ones of all heads do not fit into shared memory.
    for dim in range(0, C.DIM, C.CHUNK):
        left = load_heads(a, rows, num_rows, first_head, dim, 1, BLOCK, C.CHUNK, C)
        right = load_heads(b, columns, num_columns, first_head, dim, C.GROUP, BLOCK, C.CHUNK, C)
        products = tl.dot(left, tl.permute(right, (0, 2, 1)), products, input_precision=C.PRECISION)
    return tl.permute(products, (1, 0, 2))


@triton.jit
def may_attend(mask, rows, columns, num_rows, num_columns, heads, C: tl.constexpr):
    """Returns where queries may attend, broadcastable to `[rows, heads, columns]`."""
    pointer, stride_head, stride_row, stride_column = mask
    keep = (rows < num_rows)[:, None, None] & (columns < num_columns)[None, None, :]
    if C.CAUSAL:
        keep = keep & (columns[None, None, :] <= rows[:, None, None])
    if C.MASKED:
        keep = keep & (heads < C.HEADS)[None, :, None]
        # The mask of one sequence has up to H x T x S numbers: more than 32 bits count.
        places = rows.to(tl.int64)[:, None, None] * stride_row + columns[None, None, :].to(tl.int64) * stride_column
        places = places + heads[None, :, None].to(tl.int64) * stride_head
        keep = tl.load(pointer + places, mask=keep, other=0) != 0
    return keep
