"""Mixture-of-Head routing: each token chooses the attention heads that work for it."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gohgraph.common.checks import check_int
from gohgraph.common.modules import is_exported, is_traced
from gohgraph.graphs.config import RoutingConfig


class Routing(NamedTuple):
    """What a router decided for the tokens it saw.

    Means are over real tokens, and over ranks where ranks share them; `None` in decoding, which does not compute them.

    Args:
        gates: weight of every head, `[*, H]`, float32 at least; 0 where it is off.
        active: bool `[*, H]`, True where a head works for the token.
        balance_loss: scalar, 1 at perfect balance, more where the heads chosen more often are those of the higher
            scores, at most h_r / k; 0 without routed heads or real tokens.
        z_loss: scalar, mean squared log-sum-exp of the routed logits (ST-MoE, arXiv 2202.08906, equation 5).
        load: share of tokens each head is active for, `[H]`, detached; 1 for shared heads.
        entropy: mean entropy of the routed scores p of a token, nats in [0, log h_r], detached.

    Example:
        >>> routing = HeadRouter(d_model=16, num_heads=5, num_shared=1, top_k=2)(torch.randn(2, 3, 16))
        >>> routing.active.shape, round(routing.load.sum().item(), 3)
        (torch.Size([2, 3, 5]), 3.0)
    """

    gates: Tensor
    active: Tensor
    balance_loss: Tensor | None = None
    z_loss: Tensor | None = None
    load: Tensor | None = None
    entropy: Tensor | None = None


class HeadRouter(nn.Module):
    r"""Mixture-of-Head router: the first h_s heads are always active, of the other h_r each token uses its top k.

    .. math::
        p &= \mathrm{softmax}(W_r x), \qquad r_i = k\, p_i\, [i \in \text{top-}k] \,/ \sum_{j \in \text{top-}k} p_j \\
        s &= h_s\, \mathrm{softmax}(W_s x), \qquad w = 2\, \mathrm{softmax}(W_h x), \qquad
        g = \mathrm{concat}(w_0 s,\; w_1 r) \\
        L_\text{balance} &= (h_r / k) \sum_i f_i P_i

    f_i is the share of tokens that chose routed head i, P_i the mean of p_i. Where f and P are equally ordered, 1 is
    the minimum (Chebyshev's sum inequality); where they disagree the loss may lie a little below. With zero weights and
    k = h_r every gate is exactly 1: plain attention, bit for bit. Without shared heads g = w_1 r, without routed ones
    g = w_0 s. Ties go to the head of the lower index.

    Source: MoH (Jin et al. 2024, arXiv 2410.11842, equations 5 to 8). Differs in the renormalised gates being scaled by
    k, and shared ones by h_s, as its released code does and the paper does not say; and in the factor of the loss: that
    code takes mean_i(f_i P_i) h_r^2 = k L_balance, whose minimum k depends on the budget.

    Args:
        d_model: M.
        num_heads: H = h_s + h_r.
        num_shared: h_s in 0..H.
        top_k: k in 1..h_r; 0 when all heads are shared. May be set later (`router.top_k = 3`).
        straight_through: gates are 1 or 0 forward and g backward, to continue from a model trained without a router
            (MoH, section 3.4): with k = h_r that model is not changed at all, whatever the weights.
        bias_rate: above 0, a bias is added to p for the choice of heads alone (arXiv 2408.15664, equation 3); it is
            moved so far a step by `update_balance_bias`, not by gradients.

    Attributes:
        routed, shared, kinds: W_r `[h_r, M]`, W_s `[h_s, M]`, W_h `[2, M]`, whose logits weigh shared against routed.
        process_group: ranks whose tokens make the statistics of a training step together; `None` (default) for this
            rank alone. Set by `share_statistics`.

    Shape:
        x `[*, M]`, keep_mask bool `[*]` (True = a real token) -> `Routing` of gates `[*, H]`.

    Raises:
        TypeError, ValueError: a number that is no int or out of its range.

    Example:
        >>> router = HeadRouter(d_model=16, num_heads=8, num_shared=2, top_k=3)
        >>> routing = router(torch.randn(2, 5, 16))
        >>> routing.gates.shape, routing.active.sum(-1).unique().tolist()
        (torch.Size([2, 5, 8]), [5])
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_shared: int,
        top_k: int,
        *,
        straight_through: bool = False,
        bias_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_int("d_model", d_model, low=1)
        check_int("num_heads", num_heads, low=1)
        check_int("num_shared", num_shared, low=0, high=num_heads)
        if not bias_rate >= 0:
            raise ValueError(f"Expected bias_rate >= 0 (got {bias_rate!r}). Do pass e.g. 0.001, or 0 for no bias.")
        self.num_heads, self.num_shared, self.num_routed = num_heads, num_shared, num_heads - num_shared
        self.top_k, self.straight_through, self.bias_rate = top_k, straight_through, bias_rate
        self.routed = nn.Parameter(torch.empty(self.num_routed, d_model))
        self.shared = nn.Parameter(torch.empty(self.num_shared, d_model))
        self.kinds = nn.Parameter(torch.empty(2, d_model))
        self.balance_bias: Tensor | None
        self.register_buffer("balance_bias", torch.zeros(self.num_routed) if bias_rate > 0 else None)
        self.process_group: Any = None
        self.reset_parameters()

    @classmethod
    def from_config(cls, config: RoutingConfig, d_model: int, num_heads: int, *, layer: int = 0) -> HeadRouter:
        """Builds the router a `RoutingConfig` names, for the layer of that index."""
        return cls(
            d_model,
            num_heads,
            config.num_shared,
            config.top_k if isinstance(config.top_k, int) else config.top_k[layer],
            straight_through=config.straight_through,
            bias_rate=config.bias_rate,
        )

    @property
    def top_k(self) -> int:
        """k, the number of routed heads a token uses."""
        return self._top_k

    @top_k.setter
    def top_k(self, value: int) -> None:
        check_int("top_k", value, low=min(1, self.num_routed), high=self.num_routed)
        self._top_k = value

    @property
    def num_active(self) -> int:
        """Heads that work for a token, h_s + k."""
        return self.num_shared + self._top_k

    def reset_parameters(self) -> None:
        """Draws the weights from N(0, 0.02²); the balance bias returns to 0."""
        for weight in (self.routed, self.shared, self.kinds):
            nn.init.normal_(weight, std=0.02)
        if self.balance_bias is not None:
            nn.init.zeros_(self.balance_bias)

    def forward(self, x: Tensor, keep_mask: Tensor | None = None, *, statistics: bool = True) -> Routing:
        """Chooses and weighs the heads of each token of `x [*, M]`.

        Args:
            keep_mask: bool `[*]`, True = a real token: padding is left out of the means.
            statistics: False leaves out all means.
        """
        self._check(x, keep_mask)
        # A choice between close scores must not depend on the eight bits of bfloat16.
        kind = x.device.type
        # Meta tensors have no autocast. To ask torch whether a device has one is what older compilers cannot follow.
        is_autocast = kind != "meta" and torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if is_autocast else nullcontext():
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            # One product for all three: in decoding, calls cost more than numbers.
            weight = torch.cat((self.routed, self.shared, self.kinds)).to(x.dtype)  # [h_r + h_s + 2, M]
            logits = F.linear(x, weight)  # [*, h_r + h_s + 2]
            # To count tokens would fix their number in what is exported.
            is_one = not is_traced() and x.device.type == "cpu" and logits.shape[:-1].numel() == 1
            if is_one and not statistics and not torch.is_grad_enabled():
                return self._of_one_token(logits)
            routed, shared, group_gate = logits.split((self.num_routed, self.num_shared, 2), dim=-1)  # [*, h_r], ...
            chosen = self._choose(routed.detach())  # [*, h_r]
            r = _scaled_softmax(torch.where(chosen, routed, float("-inf")), self.top_k)  # [*, h_r]
            s = _scaled_softmax(shared, self.num_shared)  # [*, h_s]
            w = 2 * (group_gate - group_gate.flip(-1)).sigmoid()  # [*, 2], the softmax of two
            gates = torch.cat((w[..., :1] * s, w[..., 1:] * r), dim=-1)  # [*, H]
            active = F.pad(chosen, (self.num_shared, 0), value=True)  # [*, H]
            if self.straight_through:
                gates = active.to(gates.dtype) + (gates - gates.detach())
            return Routing(gates, active, *(self._statistics(routed, chosen, keep_mask) if statistics else ()))

    if TYPE_CHECKING:
        __call__ = forward

    @torch.no_grad()
    def update_balance_bias(self, load: Tensor) -> None:
        r"""Moves the balance bias towards equal loads after an optimizer step.

        .. math:: b_i \leftarrow b_i + u\, \mathrm{sign}(\overline{\text{load}} - \text{load}_i)

        u is `bias_rate`, above 0; 0.001 in arXiv 2408.15664 (section 4.2).

        Args:
            load: `[H]`, of all tokens of the step (`Routing.load`, averaged over micro-batches).
        """
        if self.balance_bias is None:
            raise ValueError(f"Expected a balance bias (got bias_rate={self.bias_rate}). Do build it with 0.001.")
        routed = load[self.num_shared :].to(self.balance_bias)
        self.balance_bias += self.bias_rate * (routed.mean() - routed).sign()

    def _check(self, x: Tensor, keep_mask: Tensor | None) -> None:
        is_mask = keep_mask is None or (keep_mask.dtype == torch.bool and keep_mask.shape == x.shape[:-1])
        if x.shape[-1] != self.kinds.shape[1] or not is_mask:
            mask = "none" if keep_mask is None else f"{keep_mask.dtype} {list(keep_mask.shape)}"
            raise ValueError(
                f"Expected x of shape [*, {self.kinds.shape[1]}] and a bool keep_mask of shape [*] (got "
                f"{list(x.shape)} and {mask}). Do pass the attention block's input and its token mask."
            )

    def _choose(self, routed: Tensor) -> Tensor:
        if self.top_k == self.num_routed:
            return torch.ones_like(routed, dtype=torch.bool)
        scores = self._scores(routed)
        if is_exported():
            return _ranks(scores) < self.top_k
        best = scores.argsort(dim=-1, descending=True, stable=True)[..., : self.top_k]  # [*, k]
        return torch.zeros_like(routed, dtype=torch.bool).scatter(-1, best, True)

    def _scores(self, routed: Tensor) -> Tensor:
        """What heads are chosen by: logits rank as p does, and still where p is too small for a float."""
        return routed if self.balance_bias is None else routed.softmax(dim=-1) + self.balance_bias

    def _of_one_token(self, logits: Tensor) -> Routing:
        """The same without gradients for one token, in Python floats: torch's forty calls take twice the time."""
        numbers, split = logits.flatten().tolist(), self.num_routed
        routed, shared, group_gate = numbers[:split], numbers[split:-2], numbers[-2:]
        # Rounded as for many tokens: in float64 heads of equal bias and tiny p would not be ties.
        scores = self._scores(logits.flatten()[:split]).tolist()
        best = sorted(range(split), key=scores.__getitem__, reverse=True)[: self.top_k]
        tilt = math.tanh((group_gate[0] - group_gate[1]) / 2)
        gates = [(1 + tilt) * s for s in _scaled_shares(shared, self.num_shared)] + [0.0] * split
        active = [True] * self.num_shared + [False] * split
        for head, r in zip(best, _scaled_shares([routed[head] for head in best], self.top_k), strict=True):
            gates[self.num_shared + head], active[self.num_shared + head] = (1 - tilt) * r, True
        if self.straight_through:
            gates = [float(works) for works in active]
        shape = (*logits.shape[:-1], self.num_heads)
        return Routing(logits.new_tensor(gates).view(shape), torch.tensor(active).view(shape))  # [*, H] each

    def _statistics(
        self, routed: Tensor, chosen: Tensor, keep_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns balance loss, z-loss, load and entropy."""
        p = routed.softmax(dim=-1)  # [*, h_r]
        zero, shared = p.new_zeros(()), p.new_ones(self.num_shared)
        if self.num_routed == 0:
            return zero, zero, shared, zero
        z = routed.logsumexp(dim=-1).square()  # [*]
        entropy = torch.special.entr(p.detach()).sum(dim=-1)  # [*]
        of_token = (chosen.to(p.dtype), p, *(value.unsqueeze(-1) for value in (z, entropy, torch.ones_like(z))))
        each = torch.cat(of_token, dim=-1)  # [*, 2*h_r + 3]
        if keep_mask is not None:
            each = torch.where(keep_mask.unsqueeze(-1), each, 0.0)
        sums = self._over_ranks(each.reshape(-1, each.shape[-1]).sum(dim=0))  # [2*h_r + 3]
        mean = sums[:-1] / sums[-1].detach().clamp(min=1)
        f, mass = mean[: self.num_routed], mean[self.num_routed : -2]  # [h_r] each
        balance = self.num_routed / self.top_k * (f * mass).sum()
        return balance, mean[-2], torch.cat((shared, f)).detach(), mean[-1].detach()

    def _over_ranks(self, sums: Tensor) -> Tensor:
        """Adds the sums of all ranks; the mean of their gradients, as DDP takes it, is that of the added sums."""
        if self.process_group is None or not self.training:
            return sums
        total = sums.detach().clone()
        torch.distributed.all_reduce(total, group=self.process_group)
        ranks = torch.distributed.get_world_size(self.process_group)
        return total + ranks * (sums - sums.detach())

    def __getstate__(self) -> dict[str, Any]:
        # A process group can be neither copied nor pickled: a copy of the router is on its own.
        return {**self.__dict__, "process_group": None}

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_shared={self.num_shared}, top_k={self.top_k}, "
            f"straight_through={self.straight_through}, bias_rate={self.bias_rate}"
        )


def share_statistics(model: nn.Module, process_group: Any) -> None:
    """Lets all routers of `model` count the tokens of all ranks of a group in training mode; `None` undoes it.

    Every rank must then run the same training steps; in eval mode a rank is on its own.
    """
    for router in routers(model):
        router.process_group = process_group


def routers(model: nn.Module) -> list[HeadRouter]:
    """Returns the routers inside `model`, in model order, the order of `ModelOutput.routing` too."""
    return [module for module in model.modules() if isinstance(module, HeadRouter)]


def _scaled_softmax(logits: Tensor, total: int) -> Tensor:
    """Softmax whose weights sum to `total`; exactly 1 each when `total` equal logits share it, which softmax is not."""
    if logits.shape[-1] == 0:
        return logits
    weights = (logits - logits.detach().amax(dim=-1, keepdim=True)).exp()
    # torch takes a number / tensor as a reciprocal times the number, and 41 * (1 / 41) is not 1.
    return weights * total / weights.sum(dim=-1, keepdim=True)


def _scaled_shares(logits: list[float], total: int) -> list[float]:
    largest = max(logits, default=0.0)
    weights = [math.exp(logit - largest) for logit in logits]
    whole = sum(weights)
    return [weight * total / whole for weight in weights]


def _ranks(scores: Tensor) -> Tensor:
    """The places `[*, h_r]` of scores from the largest on, of equal ones the first before, for what is traced.

    ONNX has no stable sort, and torch.jit no scatter of booleans.
    """
    this, other = scores.unsqueeze(-1), scores.unsqueeze(-2)  # [*, h_r, 1], [*, 1, h_r]
    heads = torch.arange(scores.shape[-1], device=scores.device)  # [h_r]
    is_before = (other > this) | (other == this) & (heads < heads[:, None])  # [*, h_r, h_r]
    return is_before.sum(dim=-1)
