"""Low-rank updates of weights (LoRA), the opponent and companion of head graphs as adapters."""

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gohgraph.common.checks import check_int

ATTENTION = ("query", "key", "value", "output")
ALL_LINEAR = (*ATTENTION, "inner", "outer", "gate")


class LowRankUpdate(nn.Module):
    r"""Adds a learned matrix of low rank to a weight (Hu et al. 2021, arXiv 2106.09685, equation 3).

    .. math:: W' = W + \frac{\alpha}{r} B A

    The conventions are PEFT's: A is drawn as a linear layer's weight, B is zero, so that a new update changes nothing;
    both carry PEFT's names. Differs from PEFT in being a parametrization of the weight and not a second path: without
    dropout on its input the output is the same.

    Args:
        out_features, in_features: of the weight.
        rank: r >= 1.
        alpha: scale; `None` for r, which makes the factor 1.

    Shape:
        weight `[out, in]` -> `[out, in]`.

    Example:
        >>> weight = torch.randn(5, 3)
        >>> torch.equal(LowRankUpdate(5, 3, rank=2)(weight), weight)
        True
    """

    def __init__(self, out_features: int, in_features: int, rank: int, alpha: float | None = None) -> None:
        super().__init__()
        check_int("rank", rank, low=1)
        self.scale = 1.0 if alpha is None else alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the updated weight."""
        return weight + self.scale * self.lora_B @ self.lora_A  # [out, in]


def add_low_rank(
    model: nn.Module, rank: int, *, alpha: float | None = None, targets: Collection[str] = ALL_LINEAR
) -> list[str]:
    """Gives linear layers of a model a low-rank update each, in place.

    Args:
        model: changed in place.
        rank, alpha: of `LowRankUpdate`.
        targets: last names of the layers, `ATTENTION` or `ALL_LINEAR` (of blocks, not the output head, as PEFT's
            "all-linear").

    Returns the names of the layers. A layer that has an update already is refused, and names that no layer has.

    Example:
        >>> import gohgraph as goh
        >>> model = goh.LanguageModel(goh.TransformerConfig(7, d_model=6, num_heads=3, num_layers=1, d_ff=5))
        >>> [name.split(".")[-1] for name in add_low_rank(model, rank=2, targets=ATTENTION)]
        ['query', 'key', 'value', 'output']
    """
    layers = _layers(model, targets)
    if updated := [name for name, layer in layers.items() if parametrize.is_parametrized(layer, "weight")]:
        raise ValueError(f"Expected linear layers without an update (got {updated[:4]}). Do build the model anew.")
    for layer in layers.values():
        rows, columns = layer.weight.shape
        update = LowRankUpdate(rows, columns, rank, alpha).to(layer.weight.device, layer.weight.dtype)
        parametrize.register_parametrization(layer, "weight", update)
    return list(layers)


def matching_rank(model: nn.Module, parameters: int, targets: Collection[str] = ALL_LINEAR) -> int:
    """Returns the rank, at least 1, whose updates have as nearly `parameters` parameters as whole ranks allow.

    Example:
        >>> matching_rank(nn.ModuleDict({"query": nn.Linear(3, 5)}), 17)
        2
    """
    return max(1, round(parameters / sum(sum(layer.weight.shape) for layer in _layers(model, targets).values())))


def _layers(model: nn.Module, targets: Collection[str]) -> dict[str, nn.Linear]:
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    layers = {name: layer for name, layer in linear.items() if name.split(".")[-1] in targets}
    if not layers:
        names = sorted({name.split(".")[-1] for name in linear})
        raise ValueError(f"Expected linear layers named {list(targets)} (got {names}). Do pass other targets.")
    return layers
