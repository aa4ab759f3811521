"""What one call of attention is asked to compute, whoever asks."""

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gohgraph.attention.grouped import TokenGroups, group_tokens
from gohgraph.attention.maps import causal_mask
from gohgraph.attention.runs import interleaved, interleaved_mask
from gohgraph.attention.skipped import ActiveHeads
from gohgraph.common.checks import there
from gohgraph.common.modules import is_exported, is_traced
from gohgraph.graphs.protocol import Messages


class Mask(NamedTuple):
    """Which keys a query may attend to.

    Args:
        keep: broadcastable to `[B, H, T, S]`: bool, True = may attend; or a float that is added to the scores, as
            torch's masks are. `None` for all keys.
        causal: the last T of S tokens see keys up to themselves.
    """

    keep: Tensor | None = None
    causal: bool = False

    @property
    def is_float(self) -> bool:
        """True for numbers that are added to the scores."""
        return self.keep is not None and self.keep.is_floating_point()

    def without_zeros(self) -> "Mask":
        """Returns a float mask that does nothing but leave out keys, of 0 and -inf alone, as the bool it stands for.

        Torch's own encoders make such masks of padding. Only on a CPU: elsewhere a look at the numbers waits for them.
        """
        keep = self.keep
        if keep is None or not self.is_float or keep.device.type != "cpu" or keep.requires_grad:
            return self
        # What is traced or mapped has no numbers to look at.
        if is_traced() or type(keep) is not Tensor or torch._C._functorch.is_batchedtensor(keep):
            return self
        keeps = keep == 0
        return self._replace(keep=keeps) if bool((keeps | (keep == float("-inf"))).all()) else self

    def for_kernel(self, q: Tensor, k: Tensor) -> tuple[Tensor | None, bool]:
        """Returns a mask tensor or `None`, and whether the kernel's own causality does: a square without padding."""
        tokens, keys = q.shape[1], k.shape[1]
        # One query may see every key there is.
        if not self.causal or tokens == 1:
            return self.keep, False
        if self.keep is None and tokens == keys:
            return None, True
        return self.whole(q, k), False

    def whole(self, q: Tensor, k: Tensor) -> Tensor | None:
        """Returns keep and causality as one tensor, broadcastable to `[B, H, T, S]`."""
        tokens, keys = q.shape[1], k.shape[1]
        if not self.causal or tokens == 1:
            return self.keep
        seen = causal_mask(tokens, keys, q.device)  # [T, S]
        if self.keep is None:
            return seen
        return self.keep.masked_fill(~seen, float("-inf")) if self.is_float else seen & self.keep


NO_MASK = Mask()
# Head outputs `[B, T, H, D]`, and the attention weights or `None`.
Result = tuple[Tensor, Any]


class Core(NamedTuple):
    """Another library's attention, beneath ours.

    Args:
        attend: `(q [B, T, H, D], k, v [B, S, G, D], scale, is_wide) -> (z [B, T, H, D], weights or None)`. It knows its
            mask itself. `is_wide`: queries, keys and values are those of `Messages.widen`, one key head a query head.
        opaque: why nothing else can stand in for it, e.g. a position bias; empty where the call's mask tells all.
        widest: the largest head size it takes; `None` for any.
    """

    attend: Callable[..., tuple[Tensor, Any]]
    opaque: str = ""
    widest: int | None = None


class Routed:
    """The heads a router left active, for the forms that leave out the others.

    Args:
        active: bool `[B, T, H]`.
        num_shared: the first heads, active for every token.
        num_active: heads that are active for a token.
        heads: of single tokens, their active heads, where the projections of the others were left out already;
            otherwise why they were not.
    """

    def __init__(self, active: Tensor, num_shared: int, num_active: int, heads: ActiveHeads | str) -> None:
        self.active, self.num_shared, self.num_active, self.heads = active, num_shared, num_active, heads

    @cached_property
    def groups(self) -> TokenGroups:
        """The tokens of every routed head."""
        return group_tokens(self.active, self.num_shared)


class Call(NamedTuple):
    """One call of attention.

    Args:
        q: queries `[B, T, H, D]`.
        k, v: keys and values `[B, S, G, D]`, G dividing H.
        mask: which keys a query may attend to.
        dropout: probability of dropping an attention weight.
        scores, weights: messages before and after the softmax.
        routed: the heads that are active, `None` for all.
        need_weights: the weights `[B, T, H, S]` are asked for, too.
        core: another library's attention beneath, `None` for torch's.
        scale: of the scores, `None` for 1/sqrt(D).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask = NO_MASK
    dropout: float = 0.0
    scores: Messages | None = None
    weights: Messages | None = None
    routed: Routed | None = None
    need_weights: bool = False
    core: Core | None = None
    scale: float | None = None

    @property
    def messages(self) -> list[Messages]:
        """The graphs over maps that there are."""
        return [graph for graph in (self.scores, self.weights) if graph is not None]

    @property
    def scaled_q(self) -> Tensor:
        """The queries as forms of scale 1/sqrt(D) take them."""
        factor = 1.0 if self.scale is None else self.scale * self.q.shape[-1] ** 0.5
        return self.q if factor == 1 else self.q * factor

    @property
    def is_compiling(self) -> bool:
        """Whether the call is traced, for other inputs too."""
        return is_traced()

    @property
    def is_exported(self) -> bool:
        """Whether the call is traced for programs that know torch's own operators alone."""
        return is_exported()

    def joined(self) -> "Call":
        """Returns plain attention over the keys of runs of heads, for scores that join them; `parted` undoes it."""
        run = there(self.scores).graph.traits.run
        q, k, v = (interleaved(heads, run) for heads in self[:3])  # [B, run*T or run*S, H/run, D]
        mask = Mask(interleaved_mask(self.mask.keep, self.q, self.k, run), self.mask.causal)
        return self._replace(q=q, k=k, v=v, mask=mask, scores=None)
