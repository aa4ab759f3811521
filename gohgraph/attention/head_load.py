"""How evenly heads are loaded: measures of the load a router reports."""

import torch
from torch import Tensor


def load_cv(load: Tensor, num_shared: int) -> Tensor:
    r"""Returns the coefficient of variation of the load over routed heads, `[*]`, 0 when it is balanced.

    .. math:: \mathrm{CV} = \sqrt{\mathrm{mean}_i (\mathrm{load}_i - \overline{\mathrm{load}})^2}
        \,/\, \overline{\mathrm{load}}

    At most sqrt(h_r / k - 1), when all tokens use the same k of h_r routed heads; 0 without load or routed heads.

    Args:
        load: share of tokens each head is active for, `[*, H]` (`Routing.load`).
        num_shared: h_s, the first heads, which are left out.

    Example:
        >>> load_cv(torch.tensor([[1.0, 0.5, 0.5], [1.0, 0.75, 0.25]]), num_shared=1)
        tensor([0.0000, 0.5000])
    """
    routed = load[..., num_shared:]  # [*, h_r]
    if routed.shape[-1] == 0:
        return load.new_zeros(load.shape[:-1])
    mean = routed.mean(dim=-1)
    return routed.std(dim=-1, correction=0) / mean.clamp(min=torch.finfo(load.dtype).tiny)


def load_entropy(load: Tensor, num_shared: int) -> Tensor:
    r"""Returns the entropy of the load's distribution over routed heads as a share of its maximum, log h_r.

    .. math:: - \sum_i q_i \log q_i \,/\, \log h_r, \qquad q_i = \mathrm{load}_i / \sum_j \mathrm{load}_j

    1 when it is balanced, or there is but one routed head or none; log k / log h_r when all tokens use the same k.
    Arguments and shape as in `load_cv`.

    Example:
        >>> load_entropy(torch.tensor([[1.0, 0.5, 0.5], [1.0, 1.0, 0.0]]), num_shared=1)
        tensor([1., 0.])
    """
    routed = load[..., num_shared:]  # [*, h_r]
    heads = routed.shape[-1]
    if heads < 2:
        return load.new_ones(load.shape[:-1])
    q = routed / routed.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(load.dtype).tiny)
    return torch.special.entr(q).sum(dim=-1) / torch.tensor(heads, dtype=load.dtype).log().item()
