"""Attention with messages between scores, in one pass over tiles of all heads: the Triton kernels as one function."""

from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from gohgraph.attention.kernels.folding import fold, unfold
from gohgraph.common.packages import needs

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
    recomputed, whatever the graph: a complete one costs what a ring does. The price are small tiles, of 16 x 16, and
    heads padded to 16 or 32. Where the outputs of all heads do not fit (H * D above 1024, 512 in float32) a program
    writes a block of heads and computes the scores of all: once more for each further block.

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

    Raises:
        ImportError: triton is not installed.
        ValueError: a type, heads, head_dim or length that the kernels do not take.
    """
    _check(q, k, v, keep_mask, is_causal)
    batch, tokens, heads, _ = q.shape
    w = mix_scores.expand(batch, tokens, heads, heads)  # [B, T, H, H]
    if keep_mask is not None:
        keep_mask = keep_mask.expand(batch, heads, tokens, k.shape[1])  # [B, H, T, S]
    return _FlashMixedAttention.apply(*_in_order((q, k, v, w, keep_mask, is_causal)))[0]


def kernel_refuses(device: torch.device, dtype: torch.dtype, num_heads: int, head_dim: int) -> str:
    """Why `flash_mixed_attention` does not run on a device, for heads of this type, number and size; empty if it does.

    It does on NVIDIA GPUs of compute capability 8.0 and more with 160 KiB of shared memory for a program (A100, H100
    and later; not consumer cards), with Triton 3.5 or newer, for up to 32 heads in half precision and 16 in float32,
    of up to 256 features.

    Example:
        >>> kernel_refuses(torch.device("cpu"), torch.float32, num_heads=8, head_dim=64)
        'cpu is no NVIDIA GPU'
    """
    if device.type != "cuda" or torch.version.hip:
        return f"{device} is no NVIDIA GPU"
    if not _has_triton():
        return "Triton {}.{} or newer is not installed".format(*OLDEST_TRITON)
    if dtype not in MOST_HEADS:
        return f"{dtype} is none of {list(MOST_HEADS)}"
    if num_heads > MOST_HEADS[dtype] or head_dim > LARGEST_HEAD_DIM:
        most = f"up to {MOST_HEADS[dtype]} heads of up to {LARGEST_HEAD_DIM} features in {dtype}"
        return f"{num_heads} heads of {head_dim} features are not {most}"
    if not _is_large(device.index if device.index is not None else torch.cuda.current_device()):
        return f"{device} has a compute capability below 8.0 or less than {SHARED_MEMORY >> 10} KiB of shared memory"
    return ""


@lru_cache
def _has_triton() -> bool:
    try:
        installed = version("triton")
    except PackageNotFoundError:
        return False
    return tuple(map(int, installed.split(".")[:2])) >= OLDEST_TRITON


@lru_cache
def _is_large(index: int) -> bool:
    # torch does not declare all of them.
    properties: Any = torch.cuda.get_device_properties(index)
    return properties.major >= 8 and properties.shared_memory_per_block_optin >= SHARED_MEMORY


class _FlashMixedAttention(torch.autograd.Function):
    """Gives z and, for backward, the log-sum-exp of every row."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        launch = _launch()
        return launch.forward(launch.Inputs(*inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.is_causal = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, z, lse = ctx.saved_tensors
        return *_FlashGradients.apply(z, lse, grad, *tensors, ctx.is_causal), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        outputs = _FlashMixedAttention.apply(*_in_order(fold(info.batch_size, in_dims, inputs)))
        return tuple(unfold(info.batch_size, x) for x in outputs), (0, 0)


class _FlashGradients(torch.autograd.Function):
    """The backward pass as a function, so that `torch.func.vmap` can fold its inputs too."""

    @staticmethod
    def forward(z: Tensor, lse: Tensor, grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        launch = _launch()
        return launch.backward(launch.Inputs(*inputs), z, lse, grad.contiguous())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps nothing: there is no second backward pass."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise RuntimeError(
            "Expected first gradients alone of the kernels (got second ones). Do run forward within "
            "torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or call mixed_attention."
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        z, lse, grad, *others = fold(info.batch_size, in_dims, inputs)
        gradients = _FlashGradients.apply(z.contiguous(), lse.contiguous(), grad, *_in_order(others))
        return tuple(unfold(info.batch_size, x) for x in gradients), (0,) * len(gradients)


def _in_order(inputs: Sequence[Any]) -> tuple[Any, ...]:
    """Lays out q, k, v and the matrices w as the kernels read them; the mask has strides of its own."""
    q, k, v, w, *others = inputs
    # Static graphs stay one matrix for all tokens; only a matrix itself has to lie in order.
    w = w if w.stride()[2:] == (w.shape[-1], 1) else w.contiguous()
    return q.contiguous(), k.contiguous(), v.contiguous(), w, *others


def _launch() -> Any:
    with needs("triton for kernels on CUDA", "triton"):
        from gohgraph.attention.kernels import launch
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
    if max(q.shape[1:].numel(), k.shape[1:].numel(), q.shape[1] * q.shape[2] ** 2) >= 2**31:
        got = f"q {list(q.shape)}, k {list(k.shape)}"
        raise ValueError(f"Expected sequences of less than 2^31 numbers (got {got}). Do cut them.")
    if q.shape[2] > MOST_HEADS[q.dtype] or q.shape[3] > LARGEST_HEAD_DIM:
        raise ValueError(
            f"Expected up to {MOST_HEADS[q.dtype]} heads of up to {LARGEST_HEAD_DIM} features in {q.dtype} (got "
            f"{q.shape[2]} of {q.shape[3]}). Do call tiled_attention."
        )
