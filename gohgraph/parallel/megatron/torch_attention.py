"""Megatron-Core's core attention by torch's kernels, on any device."""

from contextlib import nullcontext
from typing import Any

import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from gohgraph.attention.call import Mask

CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


class TorchCoreAttention(MegatronModule):
    """Stands in the `core_attention` slot and calls `scaled_dot_product_attention` (flash attention where it can).

    Megatron-Core's own `DotProductAttention` needs CUDA and holds maps of T x S numbers; this one does neither.

    Args:
        config: of the transformer: dropout, head size, softmax.
        layer_number: from 1 on.
        attn_mask_type: of the mask where the call names none.
        attention_dropout, softmax_scale: in place of the config's and of 1/sqrt(D).
        **options: what else the slot is built with; not needed here.

    Shape:
        query `[s, b, H, D]`, key `[t, b, G, D]`, value `[t, b, G, D]`; mask bool, broadcastable to `[b, H, s, t]`, True
        = may **not** attend (Megatron's polarity) -> `[s, b, H*D]`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(config=config)
        for name, plain in (("window_size", None), ("softmax_type", "vanilla")):
            if getattr(config, name, plain) != plain:
                raise ValueError(
                    f"Expected {name} = {plain!r} for torch's attention (got {getattr(config, name)!r}). Do pass a "
                    "layer_spec with Megatron-Core's own core attention."
                )
        self.attn_mask_type, self.scale = attn_mask_type, softmax_scale or config.kv_channels**-0.5
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attends; queries and keys may be wider than values."""
        keep, causal = self.mask(query, attention_mask, attn_mask_type)
        width = value.shape[-1]
        if query.shape[-1] > width:
            value = F.pad(value, (0, query.shape[-1] - width))  # [t, b, G, D']
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, H, s, D'] each
        dropout = self.dropout if self.training else 0.0
        # As in Megatron-Core: ranks hold other heads and drop other weights, while what they share drops equally.
        forks = dropout and query.is_cuda and not self.config.sequence_parallel
        with get_cuda_rng_tracker().fork() if forks else nullcontext():
            z = F.scaled_dot_product_attention(
                q, k, v, keep, dropout, is_causal=causal, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        return z[..., :width].permute(2, 0, 1, 3).flatten(-2)  # [s, b, H*D]

    def mask(self, query: Tensor, attention_mask: Tensor | None, mask_type: AttnMaskType | None = None) -> Mask:
        """Returns what a call attends to, for queries `[s, b, H, D]` and the call's own mask in Megatron's polarity."""
        if attention_mask is not None:
            return Mask(~attention_mask)
        return Mask(causal=query.shape[0] > 1 and (mask_type or self.attn_mask_type) in CAUSAL)
