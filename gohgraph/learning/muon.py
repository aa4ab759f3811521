"""Muon for matrices beside AdamW for everything else, as one optimizer."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from gohgraph.common.checks import there
from gohgraph.parallel.gradients import layout_of, spread_as, whole

# The groups of `parameter_groups` that Muon trains.
MUON_GROUPS = ("matrices", "matrices of graphs", "decayed matrices of graphs")
# Of the polynomial a x + b x³ + c x⁵, whose iterates bring every singular value in (0, 1] into about (0.7, 1.2).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalized(matrices: Tensor, steps: int = 5) -> Tensor:
    r"""Sets all singular values of matrices `[P, n, m]` to about 1, by Newton-Schulz steps.

    .. math:: X \leftarrow a X + b (X X^T) X + c (X X^T)^2 X

    On a CPU in float32, elsewhere in bfloat16: few CPUs have units for it, and the others take three times as long.

    Example:
        >>> values = torch.linalg.svdvals(orthogonalized(torch.randn(2, 5, 3)))
        >>> bool((values > 0.3).all() and (values < 1.3).all())
        True
    """
    a, b, c = NEWTON_SCHULZ
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.float() if matrices.device.type == "cpu" else matrices.bfloat16()  # [P, n, m]
    x = x.mT if is_tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # [P, n, n]
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrices.dtype)


class Muon(Optimizer):
    r"""Momentum whose every step has singular values of about 1: for the matrices inside layers.

    .. math:: M \leftarrow \mu M + (1 - \mu) G, \qquad
        W \leftarrow (1 - \eta \lambda) W - \eta \sqrt{\max(1, n / m)}\; \mathrm{orth}(\mu M + (1 - \mu) G)

    Source: Jordan et al. 2024 (kellerjordan.github.io/posts/muon). `torch.optim.Muon` computes the same, one matrix
    after another and in bfloat16 on every device; here matrices of one shape are orthogonalised together. Those whose
    parts lie on several ranks are gathered for it, on every rank.

    Args:
        parameters: matrices `[n, m]`, stacks of them `[P, n, m]`, or groups of both.
        lr: eta.
        weight_decay: lambda.
        momentum: mu, in [0, 1).

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2, 3))
        >>> weight.sum().backward()
        >>> Muon([weight], lr=0.1).step()
        >>> round(torch.linalg.matrix_norm(weight.detach(), ord=2).item(), 1)
        0.1
    """

    def __init__(
        self, parameters: Iterable[Any], lr: float = 0.02, weight_decay: float = 0.1, momentum: float = 0.95
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() not in (2, 3):
                    raise ValueError(
                        f"Expected matrices for Muon (got a parameter of shape {list(parameter.shape)}). Do give it to "
                        "AdamW."
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Moves all parameters once; `closure` computes the loss again where it is given."""
        loss = _evaluated(closure)
        for group in self.param_groups:
            by_kind: dict[Any, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    kind = (parameter.shape, parameter.dtype, parameter.device, layout_of(parameter))
                    by_kind.setdefault(kind, []).append(parameter)
            for alike in by_kind.values():
                self._move(alike, group)
        return loss

    def _move(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        lr, mu, (rows, columns) = group["lr"], group["momentum"], parameters[0].shape[-2:]
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        gradients = [there(parameter.grad) for parameter in parameters]
        momenta = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        # One by one: not every torch knows the form for lists of sharded tensors.
        for momentum, gradient in zip(momenta, gradients, strict=True):
            momentum.lerp_(gradient, 1 - mu)
        ahead = [whole(gradient.lerp(momentum, mu)) for gradient, momentum in zip(gradients, momenta, strict=True)]
        stacked = torch.stack(ahead)  # [K, n, m] or [K, P, n, m]
        directions = orthogonalized(stacked.flatten(0, -3)).view_as(stacked).unbind()  # K of [n, m] or [P, n, m]
        updates = [spread_as(parameter, update) for parameter, update in zip(parameters, directions, strict=True)]
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        torch._foreach_add_(parameters, updates, alpha=-lr * max(1, rows / columns) ** 0.5)


class MuonWithAdamW(Optimizer):
    """`Muon` on groups whose name says matrices and AdamW (arXiv 1711.05101) on all others: one state, one step.

    Args:
        groups: dictionaries with `params`, `name`, `lr` and `weight_decay`.
        betas: of AdamW.
        fused: whether AdamW runs in torch's fused form.

    Example:
        >>> weight, bias = torch.nn.Parameter(torch.eye(2, 3)), torch.nn.Parameter(torch.zeros(2))
        >>> groups = [{"params": [weight], "name": "matrices"}, {"params": [bias], "name": "vectors", "lr": 0.1}]
        >>> optimizer = MuonWithAdamW(groups)
        >>> (weight.sum() + bias.sum()).backward()
        >>> optimizer.step()
        >>> bias.data
        tensor([-0.1000, -0.1000])
    """

    def __init__(
        self, groups: Sequence[dict[str, Any]], *, betas: tuple[float, float] = (0.9, 0.95), fused: bool = False
    ) -> None:
        by_muon = [group for group in groups if group["name"] in MUON_GROUPS]
        by_adamw = [group for group in groups if group["name"] not in MUON_GROUPS]
        self._parts: list[Optimizer] = [Muon(by_muon)] if by_muon else []
        if by_adamw:
            self._parts.append(AdamW(by_adamw, betas=betas, fused=fused))
        # The groups are the very dictionaries of the parts: a schedule changes them in one place.
        super().__init__([group for part in self._parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Moves all parameters once; `closure` computes the loss again where it is given."""
        loss = _evaluated(closure)
        for part in self._parts:
            # Loading a state replaces groups and state: the parts are handed what is current.
            is_muon = isinstance(part, Muon)
            part.param_groups = [group for group in self.param_groups if (group["name"] in MUON_GROUPS) is is_muon]
            part.state = self.state
            part.step()
        return loss


def _evaluated(closure: Callable[[], Any] | None) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
