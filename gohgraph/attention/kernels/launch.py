"""How the kernels are launched: sizes of their tiles, and their arguments from tensors."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from gohgraph.attention.kernels.backward import backward_keys_kernel, backward_queries_kernel
from gohgraph.attention.kernels.forward import forward_kernel

# Queries and keys of a tile: the fewest that tensor cores take. Scores of 32 heads fill the registers then.
ROWS = COLUMNS = 16
OPTIONS = {"num_warps": 8, "num_stages": 1}
# Numbers over heads and features, by bytes of each, that a row of an operand may have to fit into shared memory.
ROW_NUMBERS = {2: 1024, 4: 512}
# What products need in releases of Triton before 3.9.
FEWEST = 16


class Inputs(NamedTuple):
    """What both passes read.

    Args:
        q, k, v: contiguous, `[B, T, H, D]` and twice `[B, S, G, D]`.
        w: `[B, T, H, H]`, its last two dimensions contiguous.
        keep_mask: bool `[B, H, T, S]`, or `None`.
        is_causal: query t sees keys up to t.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    w: Tensor
    keep_mask: Tensor | None
    is_causal: bool


# No tuple: launchers take those apart.
@dataclass(frozen=True)
class Constants:
    """What is compiled into a kernel.

    Args:
        HEADS, DIM: H and D.
        GROUP: query heads of a key/value head.
        CAUSAL, MASKED: which keys a query sees.
        PRECISION: of products in float32.
        H, BLOCK, D, CHUNK, M, N: see `sizes`; M queries and N keys.
    """

    HEADS: int
    DIM: int
    GROUP: int
    CAUSAL: bool
    MASKED: bool
    PRECISION: str
    H: int
    BLOCK: int
    D: int
    CHUNK: int
    M: int
    N: int


def sizes(heads: int, head_dim: int, itemsize: int) -> dict[str, int]:
    """Returns the sizes of tiles: all heads (H), those a program writes (BLOCK), features (D), those at once (CHUNK).

    Example:
        >>> sizes(32, 128, itemsize=2)
        {'H': 32, 'BLOCK': 8, 'D': 128, 'CHUNK': 32, 'M': 16, 'N': 16}
    """
    every, dims = (max(FEWEST, triton.next_power_of_2(size)) for size in (heads, head_dim))
    numbers = ROW_NUMBERS[itemsize]
    block, chunk = min(every, numbers // dims), min(dims, max(FEWEST, numbers // every))
    return {"H": every, "BLOCK": block, "D": dims, "CHUNK": chunk, "M": ROWS, "N": COLUMNS}


def constants(q: Tensor, groups: int, *, masked: bool, is_causal: bool) -> dict[str, Constants]:
    """Returns what is compiled into a kernel for queries `[*, H, D]` over so many key/value heads, as its argument."""
    heads, head_dim = q.shape[-2:]
    exact = q.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    # Three products on tensor cores are about as exact as one in float32.
    precision, tile = "tf32x3" if exact else "tf32", sizes(heads, head_dim, q.element_size())
    return {"C": Constants(heads, head_dim, heads // groups, is_causal, masked, precision, **tile)}


def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Returns z `[B, T, H, D]` and the base-2 log-sum-exp of the mixed scores of every row, `[B, T, H]`."""
    q = inputs.q
    z, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    _launch(forward_kernel, q.shape[1], inputs, z, lse)
    return z, lse


def backward(inputs: Inputs, z: Tensor, lse: Tensor, dz: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k, v and w from that of z."""
    q, k, v, w = inputs[:4]
    product = (dz.float() * z.float()).sum(dim=-1)  # [B, T, H]
    dq, dw = torch.empty_like(q), w.new_empty(w.shape)
    grouped = q.shape[2] != k.shape[2]
    # Heads that share keys each leave their own gradient, to be added up in float32.
    dk, dv = (q.new_empty((*k.shape[:2], *q.shape[2:]), dtype=torch.float32 if grouped else q.dtype) for _ in range(2))
    _launch(backward_queries_kernel, q.shape[1], inputs, dz, lse, product, dq, dw)
    _launch(backward_keys_kernel, k.shape[1], inputs, dz, lse, product, dk, dv)
    if grouped:
        dk, dv = (x.unflatten(2, (k.shape[2], -1)).sum(dim=3).to(k.dtype) for x in (dk, dv))  # [B, S, G, D]
    return dq, dk, dv, dw


def _launch(kernel: Any, length: int, inputs: Inputs, *tensors: Tensor) -> None:
    q, k, v, w, keep_mask, is_causal = inputs
    compiled_in = constants(q, k.shape[2], masked=keep_mask is not None, is_causal=is_causal)
    # A pointer has to be there even where it is not read.
    mask, strides = (w, (0, 0, 0, 0)) if keep_mask is None else (keep_mask.view(torch.uint8), keep_mask.stride())
    numbers = (q.shape[1], k.shape[1], *w.stride()[:2], *strides, q.shape[3] ** -0.5)
    # Tiles of queries and of keys have one size.
    grid = (triton.cdiv(length, ROWS), triton.cdiv(q.shape[2], compiled_in["C"].BLOCK), q.shape[0])
    with torch.cuda.device_of(q):
        kernel[grid](q, k, v, w, mask, *tensors, *numbers, **compiled_in, **OPTIONS)
