"""A drop-in for `torch.nn.MultiheadAttention` whose heads exchange messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gohgraph.attention.routing import HeadRouter
from gohgraph.attention.slots import HeadSlots, Slots
from gohgraph.common.checks import check_int, check_probability, there
from gohgraph.convert import torch_masks

if TYPE_CHECKING:
    from typing_extensions import Unpack

PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class GraphMultiheadAttention(HeadSlots):
    r"""`torch.nn.MultiheadAttention` with slots for head graphs: the same arguments, masks, results and weight names.

    .. math::
        y(t) = \sum_i g_i(t)\, W_O^i\, z'_i(t), \qquad z' = \mathrm{output\_graph}(z, x), \qquad
        z_i = \mathrm{softmax}(a'_i)\, v_i, \qquad a' = \mathrm{score\_graph}(a, x)

    x is the query. With empty slots, or new graphs, it computes what torch's module does, and it takes that module's
    state dict. It is no subclass of it: in eval mode without gradients `nn.TransformerEncoderLayer` would hand the
    weights of one to a fused kernel that knows no graphs. Differs from torch where a query may attend to no key at all:
    its output is zero in every case, torch's is NaN when weights are asked for.

    `nn.Transformer` draws all matrices anew when it is built, those of graphs in a custom encoder or decoder too: call
    `reset_parameters` of these afterwards, or build it plain and `convert` it.

    Args:
        embed_dim: M, the width of query and output; a multiple of `num_heads`.
        num_heads: H.
        dropout: probability of dropping an attention weight in training.
        bias: biases in the projections.
        add_bias_kv: a learned key and value more.
        add_zero_attn: a key and value of zeros more.
        kdim, vdim: widths of key and value, `None` for M.
        batch_first: inputs are `[B, T, M]`; otherwise `[T, B, M]`.
        device, dtype: of the weights.
        output_graph, score_graph, router: as in `HeadSlots`, over contexts of size M; `None` for none.

    Shape:
        query `[T, B, M]` or `[B, T, M]` (without a batch `[T, M]`), key `[S, B, kdim]`, value `[S, B, vdim]` likewise.

    Raises:
        ValueError: M no multiple of H, a number out of range, or a slot `HeadSlots` refuses.

    Example:
        >>> import gohgraph as goh
        >>> graph = goh.HeadGraphConv(goh.head_graph(4), head_dim=8, context_dim=32)
        >>> attention = GraphMultiheadAttention(32, 4, batch_first=True, output_graph=graph)
        >>> x = torch.randn(2, 5, 32)
        >>> y, weights = attention(x, x, x)
        >>> y.shape, weights.shape
        (torch.Size([2, 5, 32]), torch.Size([2, 5, 5]))
    """

    in_proj_weight: nn.Parameter | None
    q_proj_weight: nn.Parameter | None
    k_proj_weight: nn.Parameter | None
    v_proj_weight: nn.Parameter | None
    in_proj_bias: nn.Parameter | None
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        output_graph: nn.Module | None = None,
        score_graph: nn.Module | None = None,
        router: HeadRouter | None = None,
    ) -> None:
        _check_options(embed_dim, num_heads, dropout, kdim, vdim)
        super().__init__(num_heads, output_graph=output_graph, score_graph=score_graph, router=router)
        kdim, vdim = embed_dim if kdim is None else kdim, embed_dim if vdim is None else vdim
        self.embed_dim, self.kdim, self.vdim, self.head_dim = embed_dim, kdim, vdim, embed_dim // num_heads
        self.dropout, self.batch_first, self.add_zero_attn = dropout, batch_first, add_zero_attn
        self.is_packed = kdim == vdim == embed_dim
        # What torch's encoders read before they take a fused path past this module: False keeps them here.
        self._qkv_same_embed_dim = False
        shapes: dict[str, tuple[int, ...] | None] = dict.fromkeys(PROJECTIONS)
        if self.is_packed:
            shapes["in_proj_weight"] = (3 * embed_dim, embed_dim)
        else:
            shapes |= zip(PROJECTIONS[1:], ((embed_dim, size) for size in (embed_dim, kdim, vdim)), strict=True)
        shapes["in_proj_bias"] = (3 * embed_dim,) if bias else None
        shapes["bias_k"] = shapes["bias_v"] = (1, 1, embed_dim) if add_bias_kv else None
        for name, shape in shapes.items():
            empty = None if shape is None else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name, empty)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention, **slots: Unpack[Slots]) -> GraphMultiheadAttention:
        """Returns a drop-in that has the very weights of torch's module, and the given slots.

        Raises:
            TypeError: not torch's own class: a subclass may compute something else.
        """
        _check_class(module)
        new = cls(**_options(module), device="meta", **slots)
        _share_weights(module, new)
        return new

    def to_torch(self) -> nn.MultiheadAttention:
        """Returns torch's module with the very weights of this one, without head graphs and router."""
        plain = nn.MultiheadAttention(**_options(self), device="meta")
        _share_weights(self, plain)
        return plain

    @classmethod
    def adopt(cls, module: nn.MultiheadAttention, **slots: Unpack[Slots]) -> None:
        """Turns torch's module itself into the drop-in: its weights, hooks, names and pruning masks stay as they are.

        Raises:
            TypeError: as in `from_torch`.
        """
        _check_class(module)
        new = cast(GraphMultiheadAttention, module)
        new.__class__ = cls
        new.fill_slots(new.num_heads, **slots)
        new.order_heads(None)
        new.is_packed, new._qkv_same_embed_dim = new._qkv_same_embed_dim, False

    def release(self) -> None:
        """Turns the drop-in itself back into torch's module, without head graphs and router."""
        self.empty_slots()
        self._qkv_same_embed_dim = self.__dict__.pop("is_packed")
        cast(nn.Module, self).__class__ = nn.MultiheadAttention

    def reset_parameters(self) -> None:
        """Draws the weights as torch's module does; graphs and router stay."""
        for name in PROJECTIONS:
            if getattr(self, name) is not None:
                nn.init.xavier_uniform_(getattr(self, name))
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        if self.bias_k is not None and self.bias_v is not None:
            nn.init.xavier_normal_(self.bias_k)
            nn.init.xavier_normal_(self.bias_v)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends from query to key and value; masks have torch's polarity.

        Args:
            query, key, value: as in the class.
            key_padding_mask: `[B, S]`; True, or a number added to scores, where a key is left out.
            need_weights: returns the attention weights too, which holds maps in memory.
            attn_mask: `[T, S]` or `[B*H, T, S]`; True, or a number added to scores, where a query must not attend.
            average_attn_weights: returns the mean of the weights over heads.
            is_causal: says that `attn_mask` is the causal mask.

        Returns:
            The output, shaped as the query, and the weights `[B, T, S]`, `[B, H, T, S]` per head, or `None`.

        Raises:
            ValueError: shapes, masks or nested tensors that do not fit.
        """
        self._check_inputs(query, key, value, key_padding_mask, attn_mask, is_causal)
        batched, together = query.dim() == 3, query is key is value
        q, k, v, x = self._project(query, key, value)  # [B, T or S, H, D] and [B, T, M]
        hint = is_causal and key_padding_mask is None and not need_weights
        if hint:
            mask = torch_masks.causal(q, k)
        else:
            mask = torch_masks.joined(key_padding_mask, attn_mask, self.num_heads, q.dtype, k.shape[1])
        token_mask = None
        if together and key_padding_mask is not None:
            token_mask = torch_masks.attended(key_padding_mask).reshape(x.shape[:2])  # [B, T]
        routing = self.route(x, token_mask)
        dropout = self.dropout if self.training else 0.0
        z, weights = self.attend(q, k, v, x, mask, dropout=dropout, routing=routing, need_weights=need_weights)
        z = self.pass_messages(z, x, routing)  # [B, T, H, D]
        # Rows in torch's order: the projection then rounds as torch's does.
        y = self.out_proj(z.transpose(0, 1).flatten(0, 1).flatten(-2)).unflatten(0, (z.shape[1], len(z)))  # [T, B, M]
        y = y.squeeze(1) if not batched else y.transpose(0, 1) if self.batch_first else y
        if weights is None or not need_weights:
            return y, None
        weights = weights.mean(dim=2) if average_attn_weights else weights.transpose(1, 2)  # [B, T, S], [B, H, T, S]
        return y, weights if batched else weights.squeeze(0)

    if TYPE_CHECKING:
        __call__ = forward

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        same_query, same_value = query is key, key is value
        query, key, value = (self._time_first(x) for x in (query, key, value))  # [T, B, M]
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if self.is_packed and same_query and same_value:
            q, k, v = F.linear(query, there(self.in_proj_weight), self.in_proj_bias).chunk(3, dim=-1)  # [T, B, M] each
        else:
            separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            weights = there(self.in_proj_weight).chunk(3) if self.is_packed else map(there, separate)
            q, k, v = map(F.linear, (query, key, value), weights, biases)  # [T or S, B, M]
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (torch.cat((x, more.expand(1, x.shape[1], -1))) for x, more in ((k, self.bias_k), (v, self.bias_v)))
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k, v))  # [S + 1, B, M]
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(0, 1) for x in (q, k, v))
        return q, k, v, query.transpose(0, 1)

    def _time_first(self, x: Tensor) -> Tensor:
        return x.unsqueeze(1) if x.dim() == 2 else x.transpose(0, 1) if self.batch_first else x  # [T, B, M]

    def _check_inputs(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> None:
        if query.is_nested or key.is_nested or value.is_nested:
            raise ValueError(
                "Expected padded tensors (got nested ones). Do set use_nested_tensor = False on the encoder around."
            )
        widths = (self.embed_dim, self.kdim, self.vdim)
        dims, lengths = {x.dim() for x in (query, key, value)}, {key.shape[:-1] == value.shape[:-1]}
        if dims not in ({2}, {3}) or lengths != {True} or (query.shape[-1], key.shape[-1], value.shape[-1]) != widths:
            raise ValueError(
                f"Expected query, key and value of widths {widths}, all with a batch or all without (got "
                f"{list(query.shape)}, {list(key.shape)}, {list(value.shape)}). Do check batch_first, kdim and vdim."
            )
        if query.dim() == 3 and query.shape[1 - self.batch_first] != key.shape[1 - self.batch_first]:
            raise ValueError(
                f"Expected one batch size, batch_first={self.batch_first} (got {list(query.shape)} and "
                f"{list(key.shape)}). Do transpose the inputs, or change batch_first."
            )
        if is_causal and attn_mask is None:
            raise ValueError(
                "Expected attn_mask beside the hint is_causal=True (got None). Do pass the causal mask, e.g. of "
                "nn.Transformer.generate_square_subsequent_mask."
            )
        batch = query.shape[1 - self.batch_first] if query.dim() == 3 else 1
        tokens, keys = (x.shape[int(self.batch_first) if x.dim() == 3 else 0] for x in (query, key))
        shapes = {
            "key_padding_mask": (padding, [(batch, keys)] if query.dim() == 3 else [(keys,)]),
            "attn_mask": (attn_mask, [(tokens, keys), (batch * self.num_heads, tokens, keys)]),
        }
        for name, (mask, allowed) in shapes.items():
            if mask is not None and (mask.shape not in allowed or not torch_masks.is_mask(mask)):
                raise ValueError(
                    f"Expected a bool or float {name} of shape {' or '.join(map(str, allowed))} (got {mask.dtype} "
                    f"{list(mask.shape)}). Do reshape it; True leaves out."
                )

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"


def _options(module: nn.MultiheadAttention | GraphMultiheadAttention) -> dict[str, Any]:
    names = ("embed_dim", "num_heads", "dropout", "kdim", "vdim", "add_zero_attn", "batch_first")
    options = {name: getattr(module, name) for name in names}
    return {**options, "bias": module.in_proj_bias is not None, "add_bias_kv": module.bias_k is not None}


def _share_weights(
    source: nn.MultiheadAttention | GraphMultiheadAttention, target: nn.MultiheadAttention | GraphMultiheadAttention
) -> None:
    for name in (*PROJECTIONS, "in_proj_bias"):
        setattr(target, name, getattr(source, name))
    # torch keeps absent ones as plain attributes.
    if source.bias_k is not None:
        target.bias_k, target.bias_v = source.bias_k, source.bias_v
    target.out_proj = source.out_proj
    target.train(source.training)


def _check_class(module: nn.Module) -> None:
    if type(module) is not nn.MultiheadAttention:
        raise TypeError(f"Expected a torch.nn.MultiheadAttention (got {type(module).__name__}). Do pass one.")


def _check_options(embed_dim: int, num_heads: int, dropout: float, kdim: int | None, vdim: int | None) -> None:
    sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "kdim": kdim or 1, "vdim": vdim or 1}
    for name, value in sizes.items():
        check_int(name, value, low=1)
    if embed_dim % num_heads:
        raise ValueError(f"Expected embed_dim to be a multiple of {num_heads} (got {embed_dim}). Do change either.")
    check_probability("dropout", dropout)
