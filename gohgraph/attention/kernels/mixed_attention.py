"""Attention with messages between scores, in one pass over tiles of all heads: the Triton kernels as one function."""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Of how many heads the maps of a tile fit into registers and shared memory.
MOST_HEADS = {torch.float16: 32, torch.bfloat16: 32, torch.float32: 16}
LARGEST_HEAD_DIM = 256
# The oldest release of Triton that was seen to compile the kernels, to two places.
OLDEST_TRITON = (3, 5)
# Bytes of shared memory a program may take: that of the A100 and its successors, not of consumer cards.
SHARED_MEMORY = 160 * 2**10


def flash_mixed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mix_scores: Tensor,
    keep_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    r"""Attention with linear messages between scores, without a map in memory, by Triton kernels.

    .. math:: P_i(t, s) = \mathrm{softmax}_s \sum_j w_{ij}(t)\, q_j(t) \cdot k_j(s) / \sqrt{D}, \qquad
        z_i(t) = \sum_s P_i(t, s)\, v_i(s)

    A program holds 16 queries. For 16 keys at a time it computes the scores of all H heads, mixes them by one product
    over heads for each query, and goes on as flash attention does: running maximum, running sum, weights times values.
    Forward leaves the log-sum-exp of every row; backward computes the tiles again, in one kernel over keys (gradients
    of q and of w) and one over queries (of k and v), without atomics, so that gradients are the same in every run.

    All heads of a tile at once cost 2 H products forward and 7 H backward, as flash attention does but for two
    recomputed, whatever the graph: a complete one costs what a ring does. A program for each receiving head would
    compute its k senders' scores again, k + 1 products on larger and faster tiles, which pays where k is 2 or 3 (as
    wide heads do) and not in backward, where a sender needs all the senders of each of its receivers. The price are
    small tiles, of 16 x 16, and heads padded to 16 or 32. Where the outputs of all heads do not fit
    (H * D above 1024, 512 in float32) a program writes a block of heads and computes the scores of all: once more for
    each further block.

    Equal to `mixed_attention` on a float32 copy but for the rounding of tensor cores: products are of the inputs' type,
    added in float32; scores are mixed in TF32, in float32 in three such products, unless
    `torch.set_float32_matmul_precision` says otherwise. Gradients are for one backward pass.

    Source: tiles, running softmax and recomputation as in FlashAttention-2 (arXiv 2307.08691), which has no messages.

    Args:
        q: queries `[B, T, H, D]`, float16, bfloat16 or float32.
        k, v: keys and values `[B, S, G, D]` of the same type, G dividing H.
        mix_scores: w, floats broadcastable to `[B, T, H, H]`, rows receive.
        keep_mask: bool, broadcastable to `[B, H, T, S]`, True = may attend; a row without any gives zeros.
        is_causal: query t sees keys up to t; T = S. Not beside a mask.

    Returns:
        Head outputs `[B, T, H, D]`.

    Raises:
        ImportError: triton is not installed.
        ValueError: a mask beside `is_causal`, or unequal lengths; a type, heads, head_dim or length the kernels do not
            take.
    """
    _check(q, k, v, keep_mask, is_causal)
    batch, tokens, heads, _ = q.shape
    w = mix_scores.expand(batch, tokens, heads, heads)  # [B, T, H, H]
    # Static graphs stay one matrix for all tokens; only a matrix itself has to lie in order.
    w = w if w.stride()[2:] == (heads, 1) else w.contiguous()
    if keep_mask is not None:
        keep_mask = keep_mask.expand(batch, heads, tokens, k.shape[1])  # [B, H, T, S]
    return _FlashMixedAttention.apply(q.contiguous(), k.contiguous(), v.contiguous(), w, keep_mask, is_causal)


def kernel_takes(device: torch.device, dtype: torch.dtype, num_heads: int, head_dim: int) -> bool:
    """Whether `flash_mixed_attention` runs on a device, for heads of this type, number and size.

    It does on NVIDIA GPUs of compute capability 8.0 and more with 160 KiB of shared memory for a program (A100, H100
    and later; not consumer cards), with Triton 3.5 or newer, for up to 32 heads in half precision and 16 in float32,
    of up to 256 features.

    Example:
        >>> kernel_takes(torch.device("cpu"), torch.float32, num_heads=8, head_dim=64)
        False
    """
    if device.type != "cuda" or torch.version.hip or not _has_triton():
        return False
    if num_heads > MOST_HEADS.get(dtype, 0) or head_dim > LARGEST_HEAD_DIM:
        return False
    return _is_large(device.index if device.index is not None else torch.cuda.current_device())


@lru_cache
def _has_triton() -> bool:
    try:
        found = version("triton")
    except PackageNotFoundError:
        return False
    return tuple(map(int, found.split(".")[:2])) >= OLDEST_TRITON


@lru_cache
def _is_large(index: int) -> bool:
    properties = torch.cuda.get_device_properties(index)
    return properties.major >= 8 and properties.shared_memory_per_block_optin >= SHARED_MEMORY


class _FlashMixedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, w: Tensor, keep_mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        launch = _launch()
        z, lse = launch.forward(launch.Inputs(q, k, v, w, keep_mask, is_causal))
        ctx.save_for_backward(q, k, v, w, keep_mask, z, lse)
        ctx.is_causal = is_causal
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, z, lse = ctx.saved_tensors
        launch = _launch()
        return *launch.backward(launch.Inputs(*inputs, ctx.is_causal), z, lse, grad.contiguous()), None, None


def _launch() -> Any:
    try:
        from gohgraph.attention.kernels import launch
    except ImportError as error:
        raise ImportError(
            "Expected triton for kernels on CUDA (got none). Do pip install 'gohgraph[triton]', or tiled_attention."
        ) from error
    return launch


def _check(q: Tensor, k: Tensor, v: Tensor, keep_mask: Tensor | None, is_causal: bool) -> None:
    if is_causal and keep_mask is not None:
        raise ValueError("Expected keep_mask or is_causal (got both). Do make causality part of the mask.")
    if is_causal and q.shape[1] != k.shape[1]:
        raise ValueError(f"Expected as many keys as queries (got {k.shape[1]}, {q.shape[1]}). Do pass a keep_mask.")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in MOST_HEADS:
        raise ValueError(
            f"Expected q, k and v of one type of {list(MOST_HEADS)} (got {q.dtype}, {k.dtype}, {v.dtype}). Do convert "
            "them, or call tiled_attention."
        )
    if max(q[0].numel(), k[0].numel(), q.shape[1] * q.shape[2] ** 2) >= 2**31:
        got = f"q {list(q.shape)}, k {list(k.shape)}"
        raise ValueError(f"Expected sequences of less than 2^31 numbers (got {got}). Do cut them.")
    if q.shape[2] > MOST_HEADS[q.dtype] or q.shape[3] > LARGEST_HEAD_DIM:
        raise ValueError(
            f"Expected up to {MOST_HEADS[q.dtype]} heads of up to {LARGEST_HEAD_DIM} features in {q.dtype} (got "
            f"{q.shape[2]} of {q.shape[3]}). Do call tiled_attention."
        )
